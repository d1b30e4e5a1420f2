"""A step in two halves, for when a device has no room for the whole.

Knows chunks and logits; does not know models. The result is that of the whole step, as for any other chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
F = TypeVar("F")


@dataclass(frozen=True)
class Halves(Generic[T]):
    """first: of (anything, chunk) pairs the first halves of chunks, where there is one; second: the other halves.

    numbers: which pairs those of `first` are."""

    first: list[tuple[T, Sequence[int]]]
    second: list[tuple[T, Sequence[int]]]
    numbers: list[int]

    @classmethod
    def of(cls, work: Sequence[tuple[T, Sequence[int]]]) -> Halves[T]:
        """At least one chunk has two tokens."""
        numbers = [i for i, (_, chunk) in enumerate(work) if len(chunk) > 1]
        first = [(work[i][0], work[i][1][: len(work[i][1]) // 2]) for i in numbers]
        return cls(first, [(each, chunk[len(chunk) // 2 :]) for each, chunk in work], numbers)

    def logits(self, first: Tensor, second: Tensor) -> Tensor:
        """All rows of both halves' logits in the order of the whole step."""
        firsts = dict(zip(self.numbers, first.split([len(chunk) for _, chunk in self.first]), strict=True))
        seconds = second.split([len(chunk) for _, chunk in self.second])
        return torch.cat([part for i, rows in enumerate(seconds) for part in (*_found(firsts, i), rows)])

    def faults(self, first: Mapping[int, F], second: Mapping[int, F]) -> dict[int, F]:
        """By number of the pair; what was first stays."""
        return dict(second) | {self.numbers[i]: fault for i, fault in first.items()}


def _found(parts: Mapping[int, Tensor], number: int) -> tuple[Tensor, ...]:
    return (parts[number],) if number in parts else ()
