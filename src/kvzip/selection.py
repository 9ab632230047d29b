"""Stage 3: from scores and a budget to the pairs that stay. Pure functions."""

from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from kvzip.budget import Budget, Footprint
from kvzip.errors import KVzipError

LEVELS = ("pair", "pair-uniform", "head")


def select(
    scores: Tensor,
    budget: float | Budget,
    level: str = "pair",
    footprint: Footprint | None = None,
    window: int = 0,
) -> Tensor:
    """Choose the pairs to keep (Kim et al., arXiv 2505.23416, sections 3 and 4).

    With b pairs a head on average, that is ratio * n, or the budget's tokens, or what fits into its
    bytes:

    - `pair`: the floor(b * L * H) best pairs over all layers and heads together, so that each head
      gets its own length.
    - `pair-uniform`: the floor(b) best pairs of every head.
    - `head`: all pairs of the floor(b * L * H / n) heads with the largest maximum score, and none
      of the others.

    Exactly that many, on every run and device. Of equal scores the earlier position wins, then the
    lower layer, then the lower head. A threshold keeps the pairs with at least this score, or at
    level `head` all pairs of the heads that have one.

    What `min_per_head` and `keep` of the budget require stays first, and the best of the rest fill
    what is left of it; so at level `head` fewer heads are whole, and the others keep what is
    required.

    Pairs of the last `window` tokens come before the others, as far as an eighth of the budget goes
    (not at level `head`, and not with a threshold: see `with_last`).

    A ratio asks for its number of pairs. Tokens and bytes are limits: where a cache holds less, all
    of that stays.

    Args:
        scores: `[L, H, n]`, floating point; `-inf` marks pairs that are no longer there.
        budget: how much to keep; a number is a ratio, the share of the context's pairs, in (0, 1].
        level: `pair`, `pair-uniform` or `head`.
        footprint: what the cache takes, for a budget in bytes.
        window: last tokens that the scores know too little about.

    Returns:
        `[L, H, n]`, bool, True for the pairs that stay.

    Raises:
        KVzipError: for a bad budget (see `Budget`), an unknown level, a threshold at level
            `pair-uniform`, NaN scores, or a budget that asks for pairs that are not there.
    """
    budget = Budget.of(budget)
    layers, heads, n = scores.shape
    quota = check(budget, level, n, layers * heads, footprint)
    check_scores(scores)
    required = _required(scores, budget)
    if quota is None:
        mask = _above(scores, budget.threshold, level)
    elif level == "head":
        mask = _best_heads(scores, quota, budget)
    else:
        best = _best_of_all if level == "pair" else _best_of_each
        mask = best(favour_last(scores, window, quota), required, quota, budget)
    mask = mask | required
    if (mask & (scores == -torch.inf)).any():
        raise _evicted(scores, budget, level)
    return mask.contiguous()


def check(
    budget: Budget, level: str, n: int, heads: int, footprint: Footprint | None = None
) -> Fraction | None:
    """Everything about a selection that can be checked without scores, before they are made.

    Args:
        budget: how much to keep.
        level: as in `select`.
        n: tokens of the context.
        heads: heads that are pruned, over all layers.
        footprint: as in `select`.

    Returns:
        Pairs that a head keeps on average, None for a threshold.

    Raises:
        KVzipError: as `check_level` and `Budget.per_head`.
    """
    check_level(level, budget)
    return budget.per_head(n, heads, footprint)


def check_level(level: str, budget: Budget) -> None:
    """Raise KVzipError for a level that is unknown or that the budget cannot have."""
    if level not in LEVELS:
        raise KVzipError(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    if budget.threshold is not None and level == "pair-uniform":
        raise KVzipError(
            "a threshold gives every head a length of its own: choose level 'pair' or 'head', "
            "or a ratio, tokens or bytes"
        )


def check_scores(scores: Tensor) -> None:
    """Raise KVzipError if scores hold NaN."""
    if scores.isnan().any():
        raise KVzipError("the scores hold NaN: the model's attention overflowed, try dtype float32")


def best_pairs(scores: Tensor, count: int) -> Tensor:
    """Choose the `count` best pairs over all layers and heads together.

    Args:
        scores: `[L, H, n]`, floating point.
        count: at most L * H * n.

    Returns:
        `[L, H, n]`, bool; of equal scores the earlier position wins.
    """
    layers, heads, n = scores.shape
    ranked = scores.permute(2, 0, 1).reshape(-1)  # position-major
    return _keep_best(ranked, count).view(n, layers, heads).permute(1, 2, 0)


def with_last(mask: Tensor, scores: Tensor, tokens: int) -> Tensor:
    """A mask `[L, H, n]`, and the pairs of the last tokens that are still there by the scores."""
    last = torch.zeros_like(mask)
    last[..., max(0, mask.shape[-1] - tokens) :] = True
    return mask | (last & (scores > -torch.inf))


def favour_last(scores: Tensor, window: int, quota: Fraction) -> Tensor:
    """Scores by which pairs of the last tokens come first, if they are still there.

    Args:
        scores: `[L, H, n]`, `-inf` for pairs that are no longer there.
        window: last tokens to favour, as far as an eighth of the quota goes.
        quota: pairs that a head keeps on average.
    """
    tokens = min(window, floor(quota / 8), scores.shape[-1])
    if not tokens:
        return scores
    earlier, last = scores.split([scores.shape[-1] - tokens, tokens], dim=-1)
    return torch.cat([earlier, last.masked_fill(last > -torch.inf, torch.inf)], dim=-1)


def _required(scores: Tensor, budget: Budget) -> Tensor:
    """`[L, H, n]`: the spans to keep and, where they are fewer, the best pairs of each head."""
    n = scores.shape[-1]
    protected = torch.zeros(n, dtype=torch.bool, device=scores.device)
    for start, end in budget.keep:
        protected[start:end] = True
    missing = budget.required(n) - int(protected.sum())
    if missing == 0:
        return protected.expand_as(scores)
    return _keep_best(scores.masked_fill(protected, -torch.inf), missing) | protected


def _best_of_all(scores: Tensor, required: Tensor, quota: Fraction, budget: Budget) -> Tensor:
    layers, heads, _ = scores.shape
    held = int((scores > -torch.inf).sum())
    count = _available(floor(quota * layers * heads), held, scores, budget, "pair")
    free = count - int(required.sum())
    return best_pairs(scores.masked_fill(required, -torch.inf), max(0, free))


def _best_of_each(scores: Tensor, required: Tensor, quota: Fraction, budget: Budget) -> Tensor:
    count = floor(quota)
    held = scores > -torch.inf
    if budget.ratio is not None:
        _available(count, int(held.sum(-1).min()), scores, budget, "pair-uniform")
    free = count - budget.required(scores.shape[-1])
    return _keep_best(scores.masked_fill(required, -torch.inf), free) & held


def _best_heads(scores: Tensor, quota: Fraction, budget: Budget) -> Tensor:
    layers, heads, n = scores.shape
    beside = budget.required(n)  # what a head keeps that is not among the best
    best = scores.amax(-1).view(-1)
    count = floor((quota - beside) * layers * heads / (n - beside)) if n > beside else len(best)
    count = _available(count, int((best > -torch.inf).sum()), scores, budget, "head")
    return _keep_best(best, count).view(layers, heads, 1).expand_as(scores)


def _above(scores: Tensor, threshold: float | None, level: str) -> Tensor:
    least = torch.tensor(threshold, dtype=scores.dtype, device=scores.device)
    if level == "head":
        return (scores.amax(-1, keepdim=True) >= least).expand_as(scores)
    return scores >= least


def _available(count: int, there: int, scores: Tensor, budget: Budget, level: str) -> int:
    """So many, or, if the budget is a limit, as many as are there."""
    if count > there and budget.ratio is not None:
        raise _evicted(scores, budget, level)
    return min(count, there)


def _evicted(scores: Tensor, budget: Budget, level: str) -> KVzipError:
    left = int((scores > -torch.inf).sum())
    protecting = " and what must stay" * bool(budget.keep or budget.min_per_head)
    return KVzipError(
        f"{budget}{protecting} at level {level!r} asks for pairs that are already evicted: "
        f"{left} of {scores.numel()} are left. Prefill again, or use kv_type='retain'"
    )


def _keep_best(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest along the last dimension; the first of equals wins."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > threshold, scores == threshold
    free = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= free))
