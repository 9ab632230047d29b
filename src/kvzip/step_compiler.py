"""The decoding step as a compiler gets it.

Torch's compiler makes a kernel of what stands between linear layers. These themselves are found in
its graphs first, where it is known that they read a single token: layers of the same token, such as
the projections to queries, keys and values, become one call, what is added to a result becomes
part of the call, and so does the activation of a gated MLP. Of weights in 8 bits, codes and scales
are handed on.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from transformers import PreTrainedModel

from kvzip.single_token import arguments, suits
from kvzip.weights import INT8_PARTS, is_int8_by_row

OPTIONS = {"combo_kernels": True}
"""Of torch's compiler: what is independent, such as work on queries and on keys, is one kernel."""

GATES: dict[Any, tuple[str, dict[str, Any]]] = {
    F.silu: ("silu", {}),
    F.gelu: ("gelu_tanh", {"approximate": "tanh"}),
}
"""Activations of gated MLPs: their names, and the keyword arguments that they are called with."""

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
"""Functions that write to their first argument and are not named for it."""


def compile_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward pass of a model, compiled piece by piece between its attention layers.

    Every layer is compiled for itself, since layers tell the cache which one they are.
    """
    compiled = torch.compile(model, dynamic=False, backend=_compile)
    layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
    limits = {"recompile_limit": 8 * layers, "accumulated_recompile_limit": 64 * layers}

    def forward(**inputs: Any) -> Any:
        with torch._dynamo.config.patch(limits):
            return compiled(**inputs)  # type: ignore[no-untyped-call]

    return forward


def _compile(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx  # takes long to import

    rewrite(module.graph)
    module.recompile()
    compiled: Any = compile_fx(module, inputs, config_patches=OPTIONS)
    return compiled  # type: ignore[no-any-return]


def rewrite(graph: Graph) -> None:
    """Replace linear layers of one token by calls that do more at once.

    What a call reads may be computed later than by the layers in its place. So a graph in which
    anything is written in place is left alone.

    Args:
        graph: of torch's compiler; nodes carry example values.
    """
    if not any(map(_writes, graph.nodes)):
        gate_linear(graph)  # first, since the other joins whatever reads the same token
        join_linear(graph)


def gate_linear(graph: Graph) -> None:
    """Replace gated pairs of linear layers of one token: `activation(gate(x)) * up(x)`.

    Args:
        graph: without writes in place.
    """
    for function, (name, settings) in GATES.items():
        for activated in graph.find_nodes(op="call_function", target=function):
            pair = _gated(activated, settings)
            if pair is None:
                continue
            gate, up, product = pair
            vector = _arguments(gate)[0]
            with graph.inserting_before(product):
                read, scales = _parts(graph, [_arguments(one)[1] for one in (gate, up)])
                call = (vector, *read, name, scales)
                joined = graph.call_function(torch.ops.kvzip.gated_matvec.default, call)
            _take_place(graph, joined, [product, activated, gate, up])


def _gated(activated: Node, settings: dict[str, Any]) -> tuple[Node, Node, Node] | None:
    """The gate, the layer beside it, and their product, if nothing else uses any of it."""
    given = {name: value for name, value in activated.kwargs.items() if name != "inplace"}
    product = _only_user(activated)
    if len(activated.args) != 1 or given != settings:
        return None
    if product is None or product.target is not operator.mul:
        return None
    gate: Any = activated.args[0]
    up = _other(product, activated)
    if not (_is_single_token(gate) and _is_single_token(up)):
        return None
    (vector, matrix, gate_bias), (other, up_matrix, up_bias) = _arguments(gate), _arguments(up)
    alike = _is_quantized(matrix) == _is_quantized(up_matrix)
    paired = vector is other and _example(matrix).shape == _example(up_matrix).shape
    alone = _only_user(gate) is activated and _only_user(up) is product
    plain = gate_bias is None and up_bias is None
    return (gate, up, product) if alike and paired and alone and plain else None


@dataclass(frozen=True)
class LinearCall:
    """A linear layer of one token in a graph, as it stands there.

    Attributes:
        linear: the call.
        total: what adds something else to the result, and is the only one to use it; or None.
    """

    linear: Node
    total: Node | None

    @property
    def result(self) -> Node:
        """What the layer computes, that sum included."""
        return self.linear if self.total is None else self.total

    @property
    def vector(self) -> Node:
        """The token."""
        vector: Node = _arguments(self.linear)[0]
        return vector

    @property
    def matrix(self) -> Node:
        """Its weight."""
        matrix: Node = _arguments(self.linear)[1]
        return matrix

    @property
    def bias(self) -> Node | None:
        """What is added, of as many elements as the weight has rows."""
        added: Node | None = _arguments(self.linear)[2]
        return added if self.total is None else _other(self.total, self.linear)


def join_linear(graph: Graph) -> None:
    """Replace linear layers of one token, those of the same token by a single call.

    A sum with something else, such as the residual stream, becomes part of the call.

    Args:
        graph: without writes in place.
    """
    together: dict[tuple[Node, bool, bool], list[LinearCall]] = {}
    for node in graph.find_nodes(op="call_function", target=F.linear):
        if not _is_single_token(node):
            continue
        layer = LinearCall(node, _sum(node) if _arguments(node)[2] is None else None)
        if layer.total is not None:
            _replace(graph, [layer])
        else:
            alike = layer.vector, layer.bias is None, _is_quantized(layer.matrix)
            together.setdefault(alike, []).append(layer)
    for layers in together.values():
        _replace(graph, layers)


def _sum(linear: Node) -> Node | None:
    """What adds a tensor of the same shape to a result that nothing else uses."""
    total = _only_user(linear)
    if total is None or total.target is not operator.add:
        return None
    other = _other(total, linear)
    if not isinstance(other, Node) or not isinstance(_example(other), Tensor):
        return None
    own, added = _example(linear), _example(other)
    return total if (own.shape, own.dtype) == (added.shape, added.dtype) else None


def _replace(graph: Graph, layers: list[LinearCall]) -> None:
    """By one call, where the first of them is."""
    with graph.inserting_before(layers[0].result):
        matrices = [layer.matrix for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        flat = [graph.call_method("flatten", (bias,)) for bias in biases]
        read, scales = _parts(graph, matrices)
        call = (layers[0].vector, read, flat, scales)
        joined = graph.call_function(torch.ops.kvzip.matvec.default, call)
        parts = [joined]
        if len(layers) > 1:
            sizes = [len(_example(matrix)) for matrix in matrices]
            spans = zip(accumulate(sizes, initial=0), sizes, strict=False)
            cut = partial(graph.call_function, torch.narrow)
            parts = [cut((joined, -1, *span)) for span in spans]
    for layer, part in zip(layers, parts, strict=True):
        _take_place(graph, part, [layer.result, *([layer.linear] if layer.total else [])])


def _parts(graph: Graph, matrices: list[Node]) -> tuple[list[Node], list[Node]]:
    """What is to be read of weights of one kind, and the scales of their rows, if they have any."""
    if not _is_quantized(matrices[0]):
        return matrices, []
    codes, scales = (
        [graph.call_function(getattr, (matrix, part)) for matrix in matrices] for part in INT8_PARTS
    )
    return codes, [graph.call_method("flatten", (one,)) for one in scales]


def _take_place(graph: Graph, new: Node, old: list[Node]) -> None:
    """Use one node in the place of the first of some others, and erase those in their order."""
    new.meta = dict(old[0].meta)
    old[0].replace_all_uses_with(new)
    for node in old:
        graph.erase_node(node)


def _is_single_token(node: Any) -> bool:
    """Whether a node is a linear layer of one token, with weights that stay as they are."""
    if not isinstance(node, Node) or node.target is not F.linear:
        return False
    vector, matrix, bias = _arguments(node)
    constant = all(one is None or one.op in ("placeholder", "get_attr") for one in (matrix, bias))
    return constant and suits(_example(vector), _example(matrix))


def _is_quantized(matrix: Node) -> bool:
    return is_int8_by_row(_example(matrix))


def _other(both: Node, one: Node) -> Any:
    """The other argument of a sum or a product, None if both are the same."""
    others = [part for part in both.args if part is not one]
    return others[0] if len(others) == 1 else None


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _arguments(node: Node) -> tuple[Any, Any, Any]:
    return arguments(*node.args, **node.kwargs)


def _example(node: Node) -> Any:
    return node.meta["example_value"]


def _writes(node: Node) -> bool:
    """Whether a node may write to what it is given."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    by_name = str(name).endswith("_") and not str(name).endswith("__")
    by_name &= getattr(operator, str(name), None) is not node.target  # such as or_
    told = node.kwargs.get("inplace", False) is not False or "out" in node.kwargs
    return node.op.startswith("call") and (by_name or told or node.target in IN_PLACE)
