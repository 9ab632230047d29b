"""What is fitted to tokens that were drawn, layer by layer: see `training`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from kvzip.surrogates.kvzap import Module

PENALTY = 1.0
"""Of ridge regression, on the squared weights; the bias is free."""
EPOCHS, BATCH, LEARNING_RATE = 15, 512, 5e-3
LARGEST_GRADIENT = 1.0
"""Norm that a layer's gradient is cut to."""
GROUP_BYTES, GROUP_SHARE = 2**30, 1 / 8
"""Attention inputs of layers that are fitted together take so many bytes on a CPU at most, and such
a share of a GPU's memory, where starting a step takes longer than taking it with a single layer."""


@dataclass(frozen=True)
class Drawn:
    """Tokens drawn from one piece of text.

    Attributes:
        hidden: attention inputs `[k, d]` of each layer that is scored.
        log_scores: `[L, k, H]`, float32, on the CPU.
    """

    hidden: Sequence[Tensor]
    log_scores: Tensor


def begin_fit(hidden_dim: int | None, generator: torch.Generator) -> "Ridge | Perceptrons":
    """What is fitted to tokens: see `train`."""
    return Ridge() if hidden_dim is None else Perceptrons(hidden_dim, generator)


class Ridge:
    """Ridge regression of every layer, from running sums in float64."""

    def __init__(self) -> None:
        self._sums: list[tuple[Tensor, Tensor]] = []  # X'X and X'Y of each layer

    def add(self, tokens: Drawn) -> None:
        """Take note of tokens."""
        if not self._sums:
            self._sums = [_no_products(part, tokens.log_scores) for part in tokens.hidden]
        scores = tokens.log_scores.to(tokens.hidden[0].device, non_blocking=True)  # in one go
        layers = zip(self._sums, tokens.hidden, scores, strict=True)
        for (square, cross), hidden, log_scores in layers:
            rows = F.pad(hidden.double(), (0, 1), value=1.0)
            square.addmm_(rows.T, rows)
            cross.addmm_(rows.T, log_scores.to(rows))

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


def _no_products(hidden: Tensor, log_scores: Tensor) -> tuple[Tensor, Tensor]:
    """X'X `[d + 1, d + 1]` and X'Y `[d + 1, H]` of no rows; a column of ones ends those of X."""
    width = hidden.shape[1] + 1
    square = hidden.new_zeros(width, width, dtype=torch.float64)
    return square, square.new_zeros(width, log_scores.shape[-1])


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
        found: list[Module] = []
        while len(found) < len(self._devices):
            group = self._group(len(found))
            found += self._fit(*self._gathered(group))
            progress(len(found), len(self._devices))
        return found

    def _group(self, first: int) -> range:
        """Layers from `first` on whose tokens one device can hold at once; one at least."""
        size = sum(tokens.hidden[first].nbytes for tokens in self._tokens)
        last = first + max(1, _room(self._devices[first]) // size)
        layers = range(first, min(last, len(self._devices)))
        elsewhere = (layer for layer in layers if self._devices[layer] != self._devices[first])
        return range(first, next(elsewhere, layers.stop))

    def _gathered(self, group: range) -> tuple[Tensor, Tensor]:
        """Attention inputs `[l, k, d]` and log-scores `[l, k, H]` of layers, on their device."""
        device, example = self._devices[group.start], self._tokens[0]
        count = sum(tokens.log_scores.shape[1] for tokens in self._tokens)
        width, heads = example.hidden[group.start].shape[1], example.log_scores.shape[2]
        hidden = torch.empty(len(group), count, width, dtype=example.hidden[0].dtype, device=device)
        scores = torch.empty(len(group), count, heads, device=device)
        end = 0
        for tokens in self._tokens:
            start, end = end, end + tokens.log_scores.shape[1]
            scores[:, start:end] = tokens.log_scores[group.start : group.stop]
            for place, layer in enumerate(group):
                hidden[place, start:end] = tokens.hidden[layer]
        return hidden, scores

    def _fit(self, hidden: Tensor, scores: Tensor) -> list[Module]:
        """Fit with inputs and outputs scaled to mean 0 and variance 1; the weights undo that."""
        layers, count, width = hidden.shape
        mean, deviation = _moments(hidden)
        score_mean, score_deviation = _moments(scores)
        starts, orders = [], []
        for _ in range(layers):
            inner = self._linear(width, self._hidden_dim)
            starts.append((*inner, *self._linear(self._hidden_dim, scores.shape[2])))
            orders.append(self._order(count))
        parameters = [
            torch.stack(parts).to(hidden.device).requires_grad_()
            for parts in zip(*starts, strict=True)
        ]
        inner_weight, inner_bias, weight, bias = parameters
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
        steps = EPOCHS * ceil(count / BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        places = torch.arange(layers, device=hidden.device)[:, None]
        for epoch in torch.stack(orders, dim=1):
            for rows in epoch.to(hidden.device).split(BATCH, dim=1):
                inputs = (hidden[places, rows].float() - mean) / deviation
                targets = (scores[places, rows] - score_mean) / score_deviation
                inside = F.gelu(torch.baddbmm(inner_bias, inputs, inner_weight.mT))
                missed = torch.baddbmm(bias, inside, weight.mT) - targets
                missed.square().mean((1, 2)).sum().backward()
                _clip_gradients(parameters)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        with torch.no_grad():
            unscaled = inner_weight / deviation
            parts = (
                weight * score_deviation.mT,
                bias * score_deviation + score_mean,
                unscaled,
                inner_bias - mean @ unscaled.mT,
            )
            whole = [part.cpu() for part in parts]
        return [
            Module(w.clone(), b[0].clone(), inner_w.clone(), inner_b[0].clone())
            for w, b, inner_w, inner_b in zip(*whole, strict=True)
        ]

    def _order(self, rows: int) -> Tensor:
        """The order of rows in each epoch, `[EPOCHS, rows]`."""
        orders = [torch.randperm(rows, generator=self._generator) for _ in range(EPOCHS)]
        return torch.stack(orders)

    def _linear(self, width: int, out: int) -> tuple[Tensor, Tensor]:
        """Weight `[out, width]` and bias `[1, out]` of a linear map, random, of the usual size."""
        bound = width**-0.5
        weight, bias = torch.empty(out, width), torch.empty(1, out)
        for part in (weight, bias):
            part.uniform_(-bound, bound, generator=self._generator)
        return weight, bias


def _room(device: torch.device) -> int:
    """Bytes that the tokens of a group may take on a device, whatever else is held there."""
    if device.type != "cuda":
        return GROUP_BYTES
    return int(GROUP_SHARE * torch.cuda.get_device_properties(device).total_memory)


def _clip_gradients(parameters: Sequence[Tensor]) -> None:
    """Cut the gradient of each layer, the first dimension of every parameter, to its norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (LARGEST_GRADIENT / (norms + 1e-6)).clamp_max(1)[:, None, None]
    for gradient in gradients:
        gradient *= factors


def _moments(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[l, 1, d]` of the columns of `[l, k, d]`, float32.

    Layers are worked off one by one. A constant's deviation is 1.
    """
    moments = [torch.std_mean(part.float(), 0, correction=0, keepdim=True) for part in columns]
    deviation, mean = map(torch.stack, zip(*moments, strict=True))
    return mean, torch.where(deviation > 0, deviation, 1.0)


def explained(modules: Sequence[Module], tokens: Iterable[Drawn]) -> list[float]:
    """The share of the variance of log-scores that each module explains, all heads together.

    That is 1 - sum((y - prediction)^2) / sum((y - mean)^2), with a mean for each head.
    """
    sums = torch.zeros(len(modules), 4, 1, dtype=torch.float64)
    for drawn in tokens:
        pairs = zip(modules, drawn.hidden, strict=True)
        modules = [module.to(part.device, part.dtype) for module, part in pairs]  # copied once
        triples = zip(modules, drawn.hidden, drawn.log_scores, strict=True)
        sums = sums + torch.stack([_sums(*triple) for triple in triples])
    missed, count, first, second = sums.unbind(1)
    variance = (second - first**2 / count).sum(1)
    return (1 - missed.sum(1) / variance).tolist()


def _sums(module: Module, hidden: Tensor, log_scores: Tensor) -> Tensor:
    """`[4, H]`, float64: squared errors, number, sum and sum of squares of one layer's scores."""
    predicted = module(hidden).cpu().double()
    scores = log_scores.double()
    missed = (predicted - scores).square().sum(0)
    count = torch.full_like(missed, len(scores))
    return torch.stack([missed, count, scores.sum(0), scores.square().sum(0)])
