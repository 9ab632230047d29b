"""What a model's attention layers are given to read, while a forward pass runs.

The attention input of a layer is its normalised hidden state, where the model normalises before
attention, and its hidden state where it does not (OLMo2). It is seen by a hook on each attention
module, which is there for as long as a `with` statement lasts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvzip.errors import KVzipError

Observe = Callable[[int, Tensor], None]
"""Called with a layer's index and its attention input, `[B, t, hidden]`."""

OUTPUT_PROJECTIONS = ("o_proj", "dense")
"""What models call the linear map behind attention: nearly all of them, and Phi-2 and GPT-NeoX."""


@contextmanager
def observed_hidden_states(model: PreTrainedModel, observe: Observe) -> Iterator[None]:
    """Call `observe` with the input of every attention module, before the module runs.

    In one forward pass layers come in order; a layer's own cache is updated after its call. Layers
    without attention (linear attention of a hybrid model) are not seen.

    Args:
        model: any decoder in transformers' form.
        observe: what to call; tensors are those of the model, not copies.

    Raises:
        KVzipError: if the model's attention modules are not found.

    Example:
        >>> with observed_hidden_states(model, lambda index, hidden: print(index, hidden.shape)):
        ...     model(input_ids)
    """
    with ExitStack() as hooks:
        for index, module in attention_modules(model).items():
            hook = module.register_forward_pre_hook(_pass_on(index, observe), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of each layer that has one, by the layer's index, in order.

    Raises:
        KVzipError: if there are none, or two for one layer.
    """
    found: dict[int, nn.Module] = {}
    for module in (model.get_decoder() or model).modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or _output_projection(module) is None:
            continue
        if index in found:
            raise KVzipError(
                f"{type(model).__name__} has two attention modules in layer {index}, "
                f"{type(found[index]).__name__} and {type(module).__name__}: its hidden states "
                "cannot be observed"
            )
        found[index] = module
    if not found:
        raise KVzipError(
            f"{type(model).__name__} has no attention modules with a layer_idx and an output "
            f"projection ({' or '.join(OUTPUT_PROJECTIONS)}): its hidden states cannot be observed"
        )
    return dict(sorted(found.items()))


def output_weight(module: nn.Module) -> Tensor:
    """Weight `[hidden, Hq * D]` of an attention module's output projection.

    Raises:
        KVzipError: if it is quantised, or not in memory.
    """
    projection = _output_projection(module)
    weight: Any = getattr(projection, "weight", None)
    if hasattr(weight, "to_local"):
        weight = weight.to_local()  # of the heads that this process has
    if not _is_plain_matrix(weight):
        raise KVzipError(
            f"the output projection of {type(module).__name__} has no plain weight matrix (it is a "
            f"{type(projection).__name__}): load the model without quantisation"
        )
    if weight.is_meta:
        raise KVzipError(
            f"the output projection of {type(module).__name__} is not in memory: load the model "
            "without offloading"
        )
    return weight.detach()


def _is_plain_matrix(weight: Any) -> TypeGuard[Tensor]:
    if not isinstance(weight, Tensor) or hasattr(weight, "__tensor_flatten__"):
        return False  # missing, or of a kind that stands for quantised weights
    return weight.is_floating_point() and weight.ndim == 2


def _output_projection(module: nn.Module) -> nn.Module | None:
    named = (getattr(module, name, None) for name in OUTPUT_PROJECTIONS)
    return next((part for part in named if isinstance(part, nn.Module)), None)


def _pass_on(index: int, observe: Observe) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    return hook
