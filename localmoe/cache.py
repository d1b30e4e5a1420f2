"""Decode state of a sequence in one layer: latent window, compressed entries and open compressor rows.

Knows shapes and positions, not weights. Grows by a sixteenth, so that memory stays what was planned; nothing is
padded. Memory of one sequence: window * c per layer, plus (c + d_index) / m per token in a CSA layer and c / m in an
HCA layer. Rings and open rows are overwritten as the sequence grows, so going back needs a mark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A full buffer becomes larger by this part of it, and by so many rows at least.
GROWN_BY, _GROWN_LEAST = 16, 64
# To a multiple of this: a size that Triton knows to be one needs no kernel of its own.
_ALIGNED = 16


class Window:
    """Ring of the last `size` latent rows; position t lives in slot t % size."""

    def __init__(self, size: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.ring = torch.zeros(size, width, dtype=dtype, device=device)

    def put(self, row: Tensor, slot: Tensor) -> Tensor:
        """Add one row [1, width] in a slot [1] that only the device knows; returns the ring."""
        return self.ring.index_copy_(0, slot, row)

    def extend(self, rows: Tensor, position: int) -> tuple[Tensor, int]:
        """Add rows [n, width] at position; returns (all rows any of them may attend to, position of the first)."""
        size = len(self.ring)
        first = max(position - size + 1, 0)
        if len(rows) == 1 and not torch.is_grad_enabled():
            # A token that is decoded: nothing it replaces is needed any more.
            slot = position % size
            self.ring[slot] = rows[0]
            if position < size:
                return self.ring[: position + 1], 0
            return torch.cat((self.ring[slot + 1 :], self.ring[: slot + 1])), first
        device = self.ring.device
        before = self.ring[torch.arange(first, position, device=device) % size]
        kept = rows[-size:].detach()
        end = position + len(rows)
        self.ring[torch.arange(end - len(kept), end, device=device) % size] = kept
        return (torch.cat((before, rows)) if len(before) else rows), first


class EntryPool:
    """Append-only rows in a buffer that grows by a sixteenth: no more is in reserve, and a row is copied 16 times."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.buffer = torch.empty(0, width, dtype=dtype, device=device)
        self.count = 0

    def extend(self, rows: Tensor | None) -> Tensor:
        """Append rows [n, width] if any; returns all entries [count, width]."""
        if rows is None:
            return self.buffer[: self.count]
        if self.count == 0:
            # The first rows are returned as given: no copy, and gradients can flow through them in training.
            self._store(rows.detach())
            return rows
        self._store(rows)
        return self.buffer[: self.count]

    def put(self, row: Tensor, at: Tensor) -> Tensor:
        """Write one row [1, width] at a place [1] that only the device knows; returns the buffer.

        It is an entry when the step is complete: see SequenceState.advance."""
        self.reserve(1)
        return self.buffer.index_copy_(0, at, row)

    def grow(self, rows: int) -> None:
        """Append so many rows of the buffer, which the caller writes."""
        need = self.count + rows
        self._make_room(need)
        self.count = need

    def reserve(self, rows: int) -> None:
        """Have room for so many more entries."""
        self._make_room(self.count + rows)

    def _make_room(self, need: int) -> None:
        size = len(self.buffer)
        if need > size:
            more = max(need, size + max(size // GROWN_BY, _GROWN_LEAST))
            grown = self.buffer.new_empty(more + -more % _ALIGNED, self.buffer.shape[1])
            grown[: self.count] = self.buffer[: self.count]
            self.buffer = grown

    def _store(self, rows: Tensor) -> None:
        self.grow(len(rows))
        self.buffer[self.count - len(rows) : self.count] = rows


@dataclass(frozen=True)
class ClosedWindows:
    """Raw rows of the windows a chunk closed: kv, score [W, m, width]; previous [m, width] each when they overlap."""

    first: int
    kv: Tensor
    score: Tensor
    previous: tuple[Tensor, Tensor] | None


class OpenRows:
    """Compressor rows not pooled yet, and with overlap those of the last closed window as well (its first half is
    still needed by the next one)."""

    def __init__(self, ratio: int, width: int, *, overlap: bool, device: torch.device | None = None) -> None:
        self.ratio, self.overlap = ratio, overlap
        self.kv = torch.zeros(ratio * (2 if overlap else 1), width, device=device)
        self.score = torch.zeros_like(self.kv)

    def _start(self, position: int) -> int:
        """Position of the first row kept when `position` tokens were seen."""
        window = position // self.ratio
        return (window - (self.overlap and window > 0)) * self.ratio

    def extend(self, kv: Tensor, score: Tensor, position: int) -> ClosedWindows | None:
        """Add rows [n, width] float32 at position; returns the windows they close, or None."""
        m, end, start = self.ratio, position + len(kv), self._start(position)
        first, last = position // m, end // m
        kept = position - start
        if first == last:
            self.kv[kept : kept + len(kv)] = kv.detach()
            self.score[kept : kept + len(kv)] = score.detach()
            return None
        if kept:
            kv, score = torch.cat((self.kv[:kept], kv)), torch.cat((self.score[:kept], score))
        again = self._start(end)
        self.kv[: end - again] = kv[again - start :].detach()
        self.score[: end - again] = score[again - start :].detach()
        body = slice(first * m - start, last * m - start)
        previous = (kv[:m], score[:m]) if body.start == m else None
        return ClosedWindows(first, kv[body].unflatten(0, (-1, m)), score[body].unflatten(0, (-1, m)), previous)


@dataclass(frozen=True)
class Compressed:
    """Entries of one compressor and its open rows."""

    pool: EntryPool
    open: OpenRows


@dataclass(frozen=True)
class LayerState:
    """window in every layer; entries in CSA and HCA layers; index (keys of the lightning indexer) in CSA layers."""

    window: Window
    entries: Compressed | None = None
    index: Compressed | None = None

    def pools(self) -> list[tuple[EntryPool, int]]:
        """The parts that grow, and after how many tokens each does."""
        return [(c.pool, c.open.ratio) for c in self._compressed()]

    def fixed_tensors(self) -> list[Tensor]:
        """The parts overwritten in place: what a mark must copy."""
        return [self.window.ring, *(t for c in self._compressed() for t in (c.open.kv, c.open.score))]

    def nbytes_by_kind(self) -> dict[str, int]:
        entries, keys = (0 if part is None else part.pool.buffer.nbytes for part in (self.entries, self.index))
        ring, *rows = self.fixed_tensors()
        return {
            "windows": ring.nbytes,
            "open rows": sum(t.nbytes for t in rows),
            "entries": entries,
            "index keys": keys,
        }

    def _compressed(self) -> Iterator[Compressed]:
        return (c for c in (self.entries, self.index) if c is not None)


@dataclass(frozen=True)
class LatentState:
    """Multi-head latent attention: a row for each token, the latent and the rotated key; keys of the index in V3.2."""

    latents: EntryPool
    index: EntryPool | None = None

    def pools(self) -> list[tuple[EntryPool, int]]:
        return [(pool, 1) for pool in (self.latents, self.index) if pool is not None]

    def fixed_tensors(self) -> list[Tensor]:
        return []

    def nbytes_by_kind(self) -> dict[str, int]:
        return {
            "latents": self.latents.buffer.nbytes,
            "index keys": 0 if self.index is None else self.index.buffer.nbytes,
        }
