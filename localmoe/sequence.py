"""The decode state of a sequence over all layers: how it goes on, back to a mark, and into files.

Knows that parts grow or are overwritten; does not know what is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmoe.cache import EntryPool


class AnyLayerState(Protocol):
    """What is kept of a sequence in one layer."""

    def pools(self) -> list[tuple[EntryPool, int]]:
        """The parts that grow, and after how many tokens each does."""

    def fixed_tensors(self) -> list[Tensor]:
        """The parts overwritten in place: what a mark must copy."""

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes held, reserve included, by what they are."""


@dataclass(frozen=True)
class Mark:
    """A point a sequence can return to: its length and copies of every in-place buffer."""

    length: int
    fixed: tuple[Tensor, ...]


class SequenceState:
    """The whole decode state of one sequence; `length` tokens have been seen."""

    def __init__(self, layers: Sequence[AnyLayerState]) -> None:
        self.layers = layers
        self.length = 0
        # Looked through in every step.
        self._pools = [pool for layer in layers for pool in layer.pools()]

    def _fixed(self) -> list[Tensor]:
        return [t for layer in self.layers for t in layer.fixed_tensors()]

    def advance(self, tokens: int) -> None:
        """A step that appended so many tokens is complete. Rows that a device wrote are entries from now on."""
        self.length += tokens
        for pool, ratio in self._pools:
            pool.count = self.length // ratio

    def reserve(self, tokens: int) -> None:
        """Have room for so many more tokens in the parts that grow."""
        for pool, ratio in self._pools:
            pool.reserve(tokens // ratio + 1)

    def buffers(self) -> list[tuple[Tensor, int]]:
        """The parts that grow, as they are now, and how many tokens there are to an entry in each."""
        return [(pool.buffer, ratio) for pool, ratio in self._pools]

    def mark(self) -> Mark:
        """Remember this point. Costs a copy of the windows and open rows, not of the entries."""
        return Mark(self.length, tuple(t.clone() for t in self._fixed()))

    def rewind(self, mark: Mark) -> None:
        """Return to a mark made earlier on this sequence; entries after it are dropped."""
        for tensor, saved in zip(self._fixed(), mark.fixed, strict=True):
            tensor.copy_(saved)
        for pool, ratio in self._pools:
            pool.count = mark.length // ratio
        self.length = mark.length

    @property
    def nbytes(self) -> int:
        """Bytes held now, reserve included."""
        return sum(self.nbytes_by_kind().values())

    @property
    def fixed_nbytes(self) -> int:
        """Of what is there whatever the length; a mark is a copy of it."""
        return sum(t.nbytes for t in self._fixed())

    @property
    def nbytes_per_token(self) -> float:
        """By which it grows, on average and without reserve."""
        return sum(pool.buffer.shape[1] * pool.buffer.itemsize / ratio for pool, ratio in self._pools)

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes held now of each kind of state, reserve included."""
        kinds = Counter[str]()
        for layer in self.layers:
            kinds.update(layer.nbytes_by_kind())
        return dict(kinds)

    def tensors(self, mark: Mark | None = None) -> dict[str, Tensor]:
        """Every tensor needed to go on from here, or from a mark, by a stable name; pools cut to their rows."""
        fixed, length = (self._fixed(), self.length) if mark is None else (mark.fixed, mark.length)
        named = {f"fixed.{i}": t for i, t in enumerate(fixed)}
        return named | {f"entries.{i}": pool.buffer[: length // m] for i, (pool, m) in enumerate(self._pools)}

    def specs(self, length: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of what `tensors()` gives after `length` tokens of this model."""
        fixed = {f"fixed.{i}": (t.dtype, tuple(t.shape)) for i, t in enumerate(self._fixed())}
        return fixed | {
            f"entries.{i}": (pool.buffer.dtype, (length // ratio, pool.buffer.shape[1]))
            for i, (pool, ratio) in enumerate(self._pools)
        }

    def load_tensors(self, tensors: dict[str, Tensor], length: int) -> None:
        """Take over what `tensors()` gave. The entries are not copied: nobody else may write to them from now on.

        Raises ValueError when names, shapes or dtypes do not fit this model."""
        expected = self.specs(length)
        found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        if found != expected:
            wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise ValueError(f"saved state differs in {len(wrong)} tensors, first {wrong[0]}")
        for i, tensor in enumerate(self._fixed()):
            tensor.copy_(tensors[f"fixed.{i}"])
        for i, (pool, ratio) in enumerate(self._pools):
            pool.buffer, pool.count = tensors[f"entries.{i}"].to(pool.buffer.device), length // ratio
        self.length = length
