"""Train a KVzap surrogate of a model: from attention inputs to logarithms of KVzip+ scores.

Jegou and Jeblick, arXiv 2601.07891, in its section on training. Texts are cut into pieces, each
piece is read and scored (scorer `"reconstruction+"`), and tokens are drawn from it at random. What
is fitted to them is, for each layer that is scored,

- `linear`: ridge regression in closed form. Only X'X and X'Y are held, in float64, so that memory
  does not grow with the text;
- `mlp`: linear, GELU, linear, by gradient descent on the mean squared error. All tokens drawn are
  held on the CPU, in the model's dtype.

Some pieces are held out. How much of the variance of their log-scores is explained (R squared)
says how good a surrogate is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvzip.cache import ContextCache
from kvzip.errors import KVzipError
from kvzip.hidden_states import observed_hidden_states
from kvzip.model import ModelKVzip
from kvzip.prefill import Progress, silent
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

PENALTY = 1.0
"""Of ridge regression, on the squared weights; the bias is free."""
EPOCHS, BATCH, LEARNING_RATE = 15, 512, 5e-3

SCORING, FITTING, CHECKING = "score", "fit", "check"
"""Stages, as `progress` hears of them."""


@dataclass(frozen=True)
class Drawn:
    """Tokens drawn from one piece of text.

    Attributes:
        hidden: attention inputs `[k, d]` of each layer that is scored.
        log_scores: `[L, k, H]`, float32, on the CPU.
    """

    hidden: Sequence[Tensor]
    log_scores: Tensor


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
        KVzipError: if there are not two pieces, one to fit to and one to hold out, or a piece is
            too long for the model.
    """
    if len(pieces) < 2:
        raise KVzipError(
            f"the text makes {len(pieces)} piece{'s' * (len(pieces) != 1)}, and one has to be held "
            "out: give more text, or choose shorter pieces"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pieces), generator=generator).tolist()
    held_out = ceil(HELD_OUT * len(pieces))
    fitted = [pieces[i] for i in order[held_out:]]
    checked = [pieces[i] for i in order[:held_out]]
    tokens = draw(
        model, fitted, drawn, generator, lambda done: progress(SCORING, done, len(fitted))
    )
    fit = Ridge() if hidden_dim is None else Perceptrons(hidden_dim, generator)
    count = 0
    for piece in tokens:
        fit.add(piece)
        count += piece.log_scores.shape[1]
    modules = fit.modules(lambda done, total: progress(FITTING, done, total))
    unseen = draw(model, checked, drawn, generator, lambda done: progress(CHECKING, done, held_out))
    return Trained(modules, explained(modules, unseen), len(fitted), held_out, count)


def draw(
    model: ModelKVzip,
    pieces: Iterable[Tensor],
    drawn: int,
    generator: torch.Generator,
    progress: Callable[[int], None],
) -> Iterator[Drawn]:
    """Read and score pieces, and draw tokens from each of them."""
    for done, piece in enumerate(pieces, start=1):
        rows = torch.randperm(len(piece), generator=generator)[:drawn]
        hidden, kv = _read(model, piece, rows)
        model.score(kv, scorer=TARGET)
        assert kv.scores is not None
        scores = kv.scores.values[..., rows].transpose(1, 2)
        del kv  # before the next piece is read
        yield Drawn(hidden, scores.clamp_min(LEAST_SCORE).log())
        progress(done)


def _read(model: ModelKVzip, piece: Tensor, rows: Tensor) -> tuple[list[Tensor], ContextCache]:
    """Read a piece in one go, and hold the attention inputs of some of its tokens."""
    p = len(model.prompts.prefix_ids())
    hidden: dict[int, Tensor] = {}

    def see(index: int, states: Tensor) -> None:
        hidden[index] = states[0, p + rows.to(states.device)]

    with observed_hidden_states(model.hf_model, see):
        kv = model.read(piece, chunk_size=p + len(piece))
    return [hidden[index] for index in model.geometry.prunable], kv


class Ridge:
    """Ridge regression of every layer, from running sums in float64."""

    def __init__(self) -> None:
        self._sums: list[tuple[Tensor, Tensor]] = []

    def add(self, tokens: Drawn) -> None:
        """Take note of tokens."""
        pairs = zip(tokens.hidden, tokens.log_scores, strict=True)
        new = [_products(*pair) for pair in pairs]
        if self._sums:
            for sums, more in zip(self._sums, new, strict=True):
                for total, part in zip(sums, more, strict=True):
                    total += part
        else:
            self._sums = new

    def modules(self, progress: Callable[[int, int], None]) -> list[Module]:
        """The linear modules that fit best."""
        found = []
        for square, cross in self._sums:
            penalty = torch.full_like(square[0], PENALTY)
            penalty[-1] = 0
            solution = torch.linalg.solve(square + penalty.diag(), cross).float().cpu()
            found.append(Module(solution[:-1].T.contiguous(), solution[-1].contiguous()))
            progress(len(found), len(self._sums))
        return found


def _products(hidden: Tensor, log_scores: Tensor) -> tuple[Tensor, Tensor]:
    """X'X `[d + 1, d + 1]` and X'Y `[d + 1, H]`, with a column of ones behind those of X."""
    rows = F.pad(hidden.double(), (0, 1), value=1.0)
    return rows.T @ rows, rows.T @ log_scores.to(rows)


class Perceptrons:
    """An MLP of every layer, from all tokens.

    Args:
        hidden_dim: its inner width.
        generator: of first weights and batches.
    """

    def __init__(self, hidden_dim: int, generator: torch.Generator) -> None:
        self._hidden_dim = hidden_dim
        self._generator = generator
        self._tokens: list[Drawn] = []
        self._devices: list[torch.device] = []

    def add(self, tokens: Drawn) -> None:
        """Take note of tokens."""
        self._devices = [part.device for part in tokens.hidden]
        self._tokens.append(Drawn([part.cpu() for part in tokens.hidden], tokens.log_scores))

    def modules(self, progress: Callable[[int, int], None]) -> list[Module]:
        """The MLPs that were fitted."""
        found = []
        for layer, device in enumerate(self._devices):
            hidden = torch.cat([tokens.hidden[layer] for tokens in self._tokens]).to(device)
            scores = torch.cat([tokens.log_scores[layer] for tokens in self._tokens]).to(device)
            found.append(self._fit(hidden, scores))
            progress(len(found), len(self._devices))
        return found

    def _fit(self, hidden: Tensor, scores: Tensor) -> Module:
        """Fit with inputs and outputs scaled to mean 0 and variance 1; the weights undo that."""
        mean, deviation = _moments(hidden)
        score_mean, score_deviation = _moments(scores)
        inner = self._linear(hidden.shape[1], self._hidden_dim, hidden.device)
        outer = self._linear(self._hidden_dim, scores.shape[1], hidden.device)
        network = nn.Sequential(inner, nn.GELU(), outer)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
        steps = EPOCHS * ceil(len(hidden) / BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for batch in self._batches(len(hidden)):
            rows = batch.to(hidden.device)
            inputs = (hidden[rows].float() - mean) / deviation
            targets = (scores[rows] - score_mean) / score_deviation
            F.mse_loss(network(inputs), targets).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            inner_weight = inner.weight / deviation
            parts = (
                outer.weight * score_deviation[:, None],
                outer.bias * score_deviation + score_mean,
                inner_weight,
                inner.bias - inner_weight @ mean,
            )
            return Module(*(part.cpu() for part in parts))

    def _batches(self, rows: int) -> Iterator[Tensor]:
        for _ in range(EPOCHS):
            yield from torch.randperm(rows, generator=self._generator).split(BATCH)

    def _linear(self, width: int, out: int, device: torch.device) -> nn.Linear:
        """A linear map with random weights of the usual size."""
        linear = nn.Linear(width, out)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.uniform_(-(width**-0.5), width**-0.5, generator=self._generator)
        return linear.to(device)


def _moments(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, float32; a constant's deviation is 1."""
    deviation, mean = torch.std_mean(columns.float(), dim=0, correction=0)
    return mean, torch.where(deviation > 0, deviation, 1.0)


def explained(modules: Sequence[Module], tokens: Iterable[Drawn]) -> list[float]:
    """The share of the variance of log-scores that each module explains, all heads together.

    That is 1 - sum((y - prediction)^2) / sum((y - mean)^2), with a mean for each head.
    """
    sums = torch.zeros(len(modules), 4, 1, dtype=torch.float64)
    for drawn in tokens:
        triples = zip(modules, drawn.hidden, drawn.log_scores, strict=True)
        sums = sums + torch.stack([_sums(*triple) for triple in triples])
    missed, count, first, second = sums.unbind(1)
    variance = (second - first**2 / count).sum(1)
    return (1 - missed.sum(1) / variance).tolist()


def _sums(module: Module, hidden: Tensor, log_scores: Tensor) -> Tensor:
    """`[4, H]`, float64: squared errors, number, sum and sum of squares of one layer's scores."""
    predicted = module.to(hidden.device, hidden.dtype)(hidden).cpu().double()
    scores = log_scores.double()
    missed = (predicted - scores).square().sum(0)
    count = torch.full_like(missed, len(scores))
    return torch.stack([missed, count, scores.sum(0), scores.square().sum(0)])
