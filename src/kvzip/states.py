"""Cache layers of linear attention: a state of one size in the place of keys and values.

A hybrid model (Qwen3-Next, Qwen3.5) has such layers between those with full attention. Their state
takes the same memory however long the context is, so there is nothing to evict. It cannot be cut
back either: to forget a question the state is put back that stood behind the context.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvzip.errors import KVzipError
from kvzip.layers import Tail

LAYER_TYPE = "linear_attention"
"""What a config calls these layers."""


@dataclass(frozen=True, eq=False)
class State:
    """What a layer remembers of all tokens so far.

    Attributes:
        conv: `[B, C, k]`, the last k inputs of its convolution over C channels.
        recurrent: `[B, heads, D_k, D_v]`, what its recurrence has summed up.
    """

    conv: Tensor
    recurrent: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The same by name."""
        return {"conv": self.conv, "recurrent": self.recurrent}

    def clone(self) -> "State":
        """A copy."""
        return State(self.conv.clone(), self.recurrent.clone())


class StateLayer(LinearAttentionLayer):
    """A layer that is never pruned, and goes back to where its context ended.

    Models read its state through transformers' `Cache` and write to it in place.

    Args:
        context: the state behind the context, None before one was read.
    """

    def __init__(self, context: State | None = None) -> None:
        super().__init__()
        self.context = context
        if context is not None:
            self.restore(context)

    @property
    def state(self) -> State:
        """The state behind all that was read, as the layer holds it: a view.

        Raises:
            KVzipError: if the model has left none.
        """
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        if conv is None or recurrent is None:
            raise KVzipError(
                "a layer of linear attention has left no state, convolution and recurrence: such "
                "models are not supported"
            )
        return State(conv, recurrent)

    def restore(self, state: State) -> None:
        """Go on from a copy of a state."""
        conv, recurrent = state.conv, state.recurrent
        self.lazy_initialization(conv_states=conv)
        self.lazy_initialization(recurrent_states=recurrent)
        self.conv_states[0].copy_(conv)
        self.recurrent_states[0].copy_(recurrent)
        self.has_previous_state[0] = True

    def finish(self) -> "StateLayer":
        """Take what was read for the context."""
        self.context = self.state.clone()
        return self

    def fork(self, tail: Tail | None = None) -> "StateLayer":
        """A layer that shares this context, and goes on from behind it."""
        return StateLayer(self.context)

    def branch(self) -> "StateLayer":
        """A throw-away layer that goes on from behind all that was read."""
        return StateLayer(self.state)

    def restart(self, other: "StateLayer | None") -> None:
        """Go on from where another layer has come to, or from behind the context."""
        self.restore(self._behind_context() if other is None else other.state)

    def adopt(self, answered: "StateLayer") -> None:
        """Take over the states of a fork that went on from this layer's."""
        self.context = answered.context
        self.restore(answered.state)

    def absorb(self, state: State) -> None:
        """Let the context end with a state that stands further on."""
        self.context = state.clone()

    def truncate(self, length: int) -> None:
        """Forget what was read behind the context; any length but 0 leaves all of it."""
        if length == 0:
            self.restore(self._behind_context())

    def context_tensors(self) -> Iterable[Tensor]:
        """The tensors that hold the context's state."""
        yield from self._behind_context().tensors().values()

    def tail_tensors(self) -> Iterable[Tensor]:
        """The tensors that hold the state behind the tail."""
        yield from self.state.tensors().values()

    def _behind_context(self) -> State:
        assert self.context is not None
        return self.context
