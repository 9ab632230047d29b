"""Train a KVzap surrogate of a model: from attention inputs to logarithms of KVzip+ scores.

Jegou and Jeblick, arXiv 2601.07891, in its section on training. Texts are cut into pieces, each
piece is read and scored (scorer `"reconstruction+"`), and tokens are drawn from it at random. What
is fitted to them (`fitting`) is, for each layer that is scored,

- `linear`: ridge regression in closed form. Only X'X and X'Y are held, in float64, so that memory
  does not grow with the text;
- `mlp`: linear, GELU, linear, by gradient descent on the mean squared error. All tokens drawn are
  held on the CPU, in the model's dtype, and those of a few layers at a time where these run: the
  layers of such a group take their steps together, each as if alone.

Some pieces are held out. How much of the variance of their log-scores is explained (R squared)
says how good a surrogate is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from kvzip.cache import ContextCache
from kvzip.errors import KVzipError
from kvzip.hidden_states import observed_hidden_states
from kvzip.host_memory import host_memory
from kvzip.model import ModelKVzip
from kvzip.prefill import Progress, silent
from kvzip.scoring import contribution
from kvzip.surrogates.fitting import Drawn, begin_fit, explained
from kvzip.surrogates.kvzap import Module

TARGET = "reconstruction+"
PIECE = 1000
"""Tokens of a piece; as published, all pieces have about this length."""
SHORTEST = 100
"""A shorter rest of a text is left out."""
DRAWN = 500
"""Tokens that are drawn from a piece."""
HELD_OUT = 0.1
"""Share of the pieces that are held out, at least one."""
LEAST_SCORE = 1e-12
"""Smaller scores count as this one, so that a zero has a logarithm."""

SCORING, FITTING, CHECKING = "score", "fit", "check"
"""Stages, as `progress` hears of them."""


@dataclass(frozen=True)
class Trained:
    """A surrogate, and how good it is.

    Attributes:
        modules: one for each layer that is scored.
        r2: share of the log-scores' variance in held-out pieces that each of them explains.
        pieces: that were fitted to.
        held_out: pieces that were not.
        tokens: that were fitted to.
    """

    modules: list[Module]
    r2: list[float]
    pieces: int
    held_out: int
    tokens: int


def cut(texts: Iterable[Tensor], size: int) -> list[Tensor]:
    """Token ids `[n]` of texts in pieces of `size`, without rests that are too short."""
    pieces = [piece for ids in texts for piece in ids.split(size)]
    return [piece for piece in pieces if len(piece) >= min(size, SHORTEST)]


def train(
    model: ModelKVzip,
    pieces: Sequence[Tensor],
    *,
    hidden_dim: int | None,
    drawn: int = DRAWN,
    seed: int = 0,
    progress: Progress = silent,
) -> Trained:
    """Train a surrogate.

    Args:
        model: the model.
        pieces: token ids `[n]` of texts, see `cut`.
        hidden_dim: width of an MLP; None for a linear surrogate.
        drawn: tokens to draw from a piece, all of it where it has fewer.
        seed: of everything that is drawn.
        progress: called with a stage's name, what is done and what there is in all.

    Raises:
        KVzipError: if there are not two pieces, one to fit to and one to hold out, a piece is too
            long for the model, or the tokens of an MLP do not fit into the host's memory.
    """
    generator = torch.Generator().manual_seed(seed)
    fitted, held_out = split(pieces, generator)
    if hidden_dim is not None:
        refuse_too_many(model, sum(min(len(piece), drawn) for piece in fitted))
    fit = begin_fit(hidden_dim, generator)
    count = 0
    for tokens in draw(
        model, fitted, drawn, generator, lambda done: progress(SCORING, done, len(fitted))
    ):
        fit.add(tokens)
        count += tokens.log_scores.shape[1]
    modules = fit.modules(lambda done, total: progress(FITTING, done, total))
    unseen = draw(
        model, held_out, drawn, generator, lambda done: progress(CHECKING, done, len(held_out))
    )
    return Trained(modules, explained(modules, unseen), len(fitted), len(held_out), count)


def split(
    pieces: Sequence[Tensor], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Pieces to fit to, and pieces to hold out, at random.

    Raises:
        KVzipError: if there is not one of each.
    """
    if len(pieces) < 2:
        raise KVzipError(
            f"the text makes {len(pieces)} piece{'s' * (len(pieces) != 1)}, and one has to be held "
            "out: give more text, or choose shorter pieces"
        )
    order = torch.randperm(len(pieces), generator=generator).tolist()
    held_out = ceil(HELD_OUT * len(pieces))
    return [pieces[i] for i in order[held_out:]], [pieces[i] for i in order[:held_out]]


def refuse_too_many(model: ModelKVzip, tokens: int) -> None:
    """Raise KVzipError if so many drawn tokens do not fit into the host's memory, for an MLP."""
    memory = host_memory()
    if memory is None:
        return
    config = model.hf_model.config.get_text_config(decoder=True)
    heads = sum(model.geometry.layers[layer].kv_heads for layer in model.geometry.prunable)
    inputs = len(model.geometry.prunable) * config.hidden_size * model.hf_model.dtype.itemsize
    taken = sum(part.nbytes for part in model.hf_model.parameters() if part.device.type == "cpu")
    needed, room = tokens * (inputs + heads * torch.float32.itemsize), memory - taken
    if needed > room:
        raise KVzipError(
            f"an MLP is fitted to all drawn tokens at once: {tokens:,} of them take "
            f"{needed / 1e9:,.1f} GB of the host's memory, where {max(0, room) / 1e9:,.1f} GB are "
            "left: draw fewer tokens from a piece, give less text, or train a linear surrogate"
        )


def draw(
    model: ModelKVzip,
    pieces: Iterable[Tensor],
    drawn: int,
    generator: torch.Generator,
    progress: Callable[[int], None],
) -> Iterator[Drawn]:
    """Read and score pieces, and draw tokens from each of them."""
    products = None
    for done, piece in enumerate(pieces, start=1):
        rows = torch.randperm(len(piece), generator=generator)[:drawn]
        hidden, kv = read(model, piece, rows)
        if products is None:  # of weights alone: once for all pieces
            products = contribution.projection_products(model.hf_model, kv)
        scores = score(model, kv, products)[..., rows].transpose(1, 2)
        del kv  # before the next piece is read
        yield Drawn(hidden, scores.clamp_min(LEAST_SCORE).log())
        progress(done)


def read(model: ModelKVzip, piece: Tensor, rows: Tensor) -> tuple[list[Tensor], ContextCache]:
    """Read a piece in one go, and hold the attention inputs of some of its tokens.

    Args:
        model: the model.
        piece: token ids `[n]`.
        rows: `[k]`, int64, which tokens.

    Returns:
        `[k, d]` of each layer that is scored, and the cache.
    """
    p = len(model.prompts.prefix_ids())
    places = (p + rows).to(model.hf_model.device, non_blocking=True)  # for all layers, once
    hidden: dict[int, Tensor] = {}

    def see(index: int, states: Tensor) -> None:
        hidden[index] = states[0, places.to(states.device)]

    with observed_hidden_states(model.hf_model, see):
        kv = model.read(piece, chunk_size=p + len(piece))
    return [hidden[index] for index in model.geometry.prunable], kv


def score(model: ModelKVzip, kv: ContextCache, products: Mapping[int, Tensor]) -> Tensor:
    """KVzip+ scores of a piece, `[L, H, n]`, float32, on the CPU.

    Args:
        model: the model.
        kv: the piece, as `read` returns it.
        products: see `contribution.projection_products`.
    """
    scores = contribution.score(
        model.hf_model,
        model.prompts,
        kv,
        max_positions=model.geometry.max_positions,
        products=products,
    )
    return scores.values
