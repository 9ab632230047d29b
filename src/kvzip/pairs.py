"""Keys and values of one layer, packed head after head: as the model made them, or quantised."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kvzip.budget import Footprint
from kvzip.errors import KVzipError
from kvzip.kernels import Operations
from kvzip.kernels.quantization import (
    Quantization,
    QuantizedRows,
    channel_bytes,
    encode,
    quantize,
    take,
)


class _Packed:
    """What both kinds of pairs share: which positions each head holds."""

    keys: Tensor | QuantizedRows
    kept: Tensor
    lengths: Tensor | None

    @cached_property
    def indptr(self) -> Tensor:
        """`[H + 1]`, int64, where the keys are: head `h` owns rows `indptr[h]:indptr[h + 1]`."""
        return F.pad(self.counts.cumsum(0), (1, 0)).to(self.keys.device)

    @cached_property
    def counts(self) -> Tensor:
        """`[H]`, int64, on the CPU: rows of each head."""
        return self.kept.sum(1) if self.lengths is None else self.lengths

    def _rows(self, kept: Tensor) -> Tensor:
        """`[rows]`, bool: which of the rows that are held are at `kept`, `[H, s]`."""
        return kept.flatten() if self.kept.all() else kept[self.kept.to(kept.device)]

    def _first(self, count: int) -> Tensor:
        """`[H, count]`, int64: the first rows of every head."""
        return self.indptr[:-1, None] + torch.arange(count, device=self.indptr.device)


@dataclass(frozen=True)
class Pairs(_Packed):
    """Keys and values of one layer, packed head after head in the order of their positions.

    Attributes:
        keys: `[rows, D]`.
        values: `[rows, D]`.
        kept: `[H, s]`, bool, on the CPU: which of the s positions each head holds.
        lengths: `[H]`, int64, on the CPU: rows of each head, counted if None.
    """

    keys: Tensor
    values: Tensor
    kept: Tensor
    lengths: Tensor | None = None

    @classmethod
    def dense(cls, keys: Tensor, values: Tensor) -> "Pairs":
        """View contiguous `[H, s, D]` keys and values as packed pairs, without a copy."""
        kept = torch.ones(keys.shape[:2], dtype=torch.bool)
        return cls(keys.flatten(0, 1), values.flatten(0, 1), kept)

    @property
    def quantization(self) -> Quantization | None:
        """None: these are as the model made them."""
        return None

    def footprint(self, prefix_length: int, how: Quantization | None = None) -> Footprint:
        """What the prefix and a pair take, or would take when quantised."""
        parts = (self.keys, self.values)
        heads = len(self.kept)
        if how is None:
            pair = sum(part.shape[1] * part.element_size() for part in parts)
            return Footprint(pair * heads * prefix_length, pair)
        pair = sum(how.row_bytes(part.shape[1]) for part in parts)
        channels = sum(channel_bytes(heads, part.shape[1]) for part in parts)
        return Footprint(pair * heads * prefix_length + channels, pair)

    def check(self, how: Quantization) -> None:
        """Raise KVzipError if these pairs cannot be quantised so."""
        for part in (self.keys, self.values):
            how.groups(part.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that holds keys or values, by name."""
        return {"keys": self.keys, "values": self.values}

    def attention(self, operations: Operations) -> Callable[..., Tensor]:
        """The operation that attends to these keys and values."""
        return operations.zipped_attention

    def dense_keys(self) -> Tensor:
        """Keys as `[H, s, D]`; only where nothing is evicted."""
        return self.keys.view(*self.kept.shape, -1)

    def dense_values(self) -> Tensor:
        """Values as `[H, s, D]`; only where nothing is evicted."""
        return self.values.view(*self.kept.shape, -1)

    def first(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, `[H, count, D]`, of the first rows of every head."""
        rows = self._first(count)
        return self.keys[rows].to(dtype), self.values[rows].to(dtype)

    def keep(self, kept: Tensor, operations: Operations) -> "Pairs":
        """Copy the pairs at `kept` (`[H, s]`, bool, a subset of what is held)."""
        rows = self._rows(kept)
        if rows.all():
            return self
        keys, values = operations.compact(self.keys, self.values, rows.to(self.keys.device))
        return Pairs(keys, values, kept.cpu())

    def extend(self, keys: Tensor, values: Tensor, kept: Tensor, operations: Operations) -> "Pairs":
        """Copy these pairs and, of the tokens behind them, those at `kept`.

        Args:
            keys: `[H, t, D]`, of the tokens behind.
            values: `[H, t, D]`.
            kept: `[H, t]`, bool, on the keys' device.
            operations: how to compact.
        """
        new_keys, new_values = operations.compact(
            keys.flatten(0, 1), values.flatten(0, 1), kept.flatten()
        )
        kept = kept.cpu()
        counts, new_counts = self.counts, kept.sum(1)
        return Pairs(
            _interleave(self.keys, counts, new_keys, new_counts),
            _interleave(self.values, counts, new_values, new_counts),
            torch.cat([self.kept, kept], dim=1),
            counts + new_counts,
        )

    def quantize(self, how: Quantization) -> "QuantizedPairs":
        """A quantised copy.

        Raises:
            KVzipError: if the head dimension does not suit.
        """
        counts: list[int] = self.counts.tolist()
        keys, values = (quantize(part, counts, how) for part in (self.keys, self.values))
        return QuantizedPairs(keys, values, self.kept, self.lengths)


@dataclass(frozen=True)
class QuantizedPairs(_Packed):
    """Quantised keys and values of one layer, in the same order.

    Attributes:
        keys: the rows.
        values: the rows.
        kept: `[H, s]`, bool, on the CPU: which of the s positions each head holds.
        lengths: `[H]`, int64, on the CPU: rows of each head, counted if None.
    """

    keys: QuantizedRows
    values: QuantizedRows
    kept: Tensor
    lengths: Tensor | None = None

    @property
    def quantization(self) -> Quantization:
        """How they are quantised."""
        return self.keys.quantization

    def footprint(self, prefix_length: int, how: Quantization | None = None) -> Footprint:
        """What the prefix and a pair take; they are quantised already."""
        parts = (self.keys, self.values)
        pair = sum(part.quantization.row_bytes(part.center.shape[1]) for part in parts)
        channels = sum(channel_bytes(*part.center.shape) for part in parts)
        return Footprint(pair * len(self.kept) * prefix_length + channels, pair)

    def check(self, how: Quantization) -> None:
        """Raise KVzipError if these pairs are quantised otherwise."""
        ours, head_dim = self.quantization, self.keys.center.shape[1]
        if (ours.dtype, ours.groups(head_dim)) != (how.dtype, how.groups(head_dim)):
            raise KVzipError(
                f"the cache is quantised as {ours}, which does not turn into {how}: prefill again, "
                "with kv_type='retain' if it is to change"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that holds keys or values, by name."""
        return {
            f"{name}.{part}": tensor
            for name, rows in (("keys", self.keys), ("values", self.values))
            for part, tensor in rows.tensors().items()
        }

    def attention(self, operations: Operations) -> Callable[..., Tensor]:
        """The operation that attends to these keys and values."""
        return operations.quantized_attention

    def dense_keys(self) -> Tensor:
        """Refuse: what the model made is no longer there."""
        raise KVzipError(
            f"the cache holds {self.keys.dtype} codes, not the keys that scores are made from: "
            "score it before it is quantised, or prefill the context anew"
        )

    dense_values = dense_keys

    def first(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the first rows of every head stand for: keys and values, `[H, count, D]`."""
        rows = self._first(count)
        return take(self.keys, rows).to(dtype), take(self.values, rows).to(dtype)

    def keep(self, kept: Tensor, operations: Operations) -> "QuantizedPairs":
        """Copy the pairs at `kept` (`[H, s]`, bool, a subset of what is held)."""
        rows = self._rows(kept)
        if rows.all():
            return self
        rows = rows.to(self.keys.device)
        codes = operations.compact(self.keys.codes, self.values.codes, rows)
        scales = operations.compact(self.keys.scales, self.values.scales, rows)
        keys, values = (
            part.with_rows(*chosen)
            for part, *chosen in zip((self.keys, self.values), codes, scales, strict=True)
        )
        return QuantizedPairs(keys, values, kept.cpu())

    def extend(
        self, keys: Tensor, values: Tensor, kept: Tensor, operations: Operations
    ) -> "QuantizedPairs":
        """Copy these pairs and, of the tokens behind them, those at `kept`, quantised alike.

        The channels of new rows are evened out as those of the first ones were. Arguments as in
        `Pairs.extend`.
        """
        new_rows = operations.compact(keys.flatten(0, 1), values.flatten(0, 1), kept.flatten())
        kept = kept.cpu()
        counts, new_counts = self.counts, kept.sum(1)
        longer = []
        for rows, new in zip((self.keys, self.values), new_rows, strict=True):
            behind = encode(new, new_counts.tolist(), rows.quantization, rows.center, rows.gain)
            longer.append(
                rows.with_rows(
                    _interleave(rows.codes, counts, behind.codes, new_counts),
                    _interleave(rows.scales, counts, behind.scales, new_counts),
                )
            )
        kept = torch.cat([self.kept, kept], dim=1)
        return QuantizedPairs(longer[0], longer[1], kept, counts + new_counts)

    def quantize(self, how: Quantization) -> "QuantizedPairs":
        """These pairs, if they are quantised so.

        Raises:
            KVzipError: if they are quantised otherwise.
        """
        self.check(how)
        return self


def _interleave(rows: Tensor, counts: Tensor, new_rows: Tensor, new_counts: Tensor) -> Tensor:
    """Rows of each head, and behind them its new rows."""
    parts = zip(rows.split(counts.tolist()), new_rows.split(new_counts.tolist()), strict=True)
    return torch.cat([part for pair in parts for part in pair])
