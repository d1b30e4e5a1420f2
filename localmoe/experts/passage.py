"""Experts that pass through a device: each is copied there, computed for all of a step's tokens, and written over.

Slots in two halves: while the experts of one are computed, the other is filled. A slot is not written to before what
read it is done, nor read before it is full; the device is told so, and nobody here waits for it but where a buffer is
still on its way. Knows slots, places and their order; does not know what computes. Memory: a buffer for each slot."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from localmoe.experts.queues import Queues, Span

# Computes the experts that lie in slots = {expert: slot}, and adds their terms.
Compute = Callable[[dict[int, int]], object]


@dataclass
class _Half:
    """slots: with the buffer that each is filled from. free: what has to be done before they are written to.

    waiting: experts that lie in the first of them, or are on their way there; sent: of each buffer, its last copy."""

    slots: Sequence[tuple[int, Tensor]]
    free: Span
    waiting: dict[int, int] = field(default_factory=dict)
    sent: dict[int, Span] = field(default_factory=dict)

    @property
    def copies(self) -> list[Span]:
        return [self.sent[i] for i in range(len(self.waiting))]


class Passage:
    """One layer of one step. seconds, copying, staging: of computing, of copies, of the CPU; known after wait()."""

    def __init__(
        self,
        queues: Queues,
        slots: Sequence[tuple[int, Tensor]],
        bytes_of: tuple[Callable[[int], Tensor], Callable[[int], Tensor]],
        compute: Compute,
        terms: Callable[[], Tensor],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """slots: that nothing else uses meanwhile, each with its buffer. bytes_of: of a place in RAM, of a slot."""
        self._queues, self._compute, self._terms = queues, compute, terms
        (self._source, self._target), self._clock = bytes_of, clock
        # Whatever the device was to do with these slots before.
        start = queues.compute(lambda: None, ())
        parts = (slots[::2], slots[1::2]) if len(slots) > 1 else (slots,)
        self._halves = [_Half(part, start) for part in parts]
        self._turn = 0
        self._computed: list[Span] = []
        self._copied: list[Span] = []
        self.seconds = self.copying = self.staging = 0.0

    def held(self, slots: dict[int, int]) -> None:
        """Compute what lies in other slots."""
        self._computed.append(self._queues.compute(functools.partial(self._compute, slots), ()))

    def put(self, expert: int, place: int) -> None:
        """An expert passes through. Its place in RAM can be used again when this returns."""
        half = self._halves[self._turn]
        i = len(half.waiting)
        slot, buffer = half.slots[i]
        if i in half.sent:
            half.sent[i].wait()
        started = self._clock()
        buffer.copy_(self._source(place))
        self.staging += self._clock() - started
        half.sent[i] = self._queues.copy(self._target(slot), buffer, [half.free])
        self._copied.append(half.sent[i])
        half.waiting[expert] = slot
        if len(half.waiting) == len(half.slots):
            self._launch()

    def wait(self) -> Tensor:
        """The weighted terms of all, [T, D] float32, on the CPU."""
        self._launch()
        for span in self._computed[-1:]:
            span.wait()
        terms = self._terms()
        self.seconds = sum(span.seconds for span in self._computed)
        self.copying = sum(span.seconds for span in self._copied)
        return terms

    def _launch(self) -> None:
        half = self._halves[self._turn]
        if not half.waiting:
            return
        experts, half.waiting, copies = half.waiting, {}, half.copies
        half.free = self._queues.compute(functools.partial(self._compute, experts), copies)
        self._computed.append(half.free)
        self._turn = (self._turn + 1) % len(self._halves)
