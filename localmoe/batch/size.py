"""How many replies run at once: twice as many as long as that gives more tokens per second, by what steps took.

Knows sizes and seconds only."""

from __future__ import annotations

import statistics
from collections import deque

from localmoe.models.sizes import ModelSizes
from localmoe.scheduler import MAX_SEQUENCES

# Begun with; as many steps are measured of a size before it is judged.
FIRST, MEASURED = 4, 8
# A larger size must bring so much; it costs memory, and each reply is slower.
WORTH = 1.05
# Steps after which a larger size is tried, again or for want of steps that could be measured.
PATIENCE = 256
# Replies at once: more bring little, for by then every expert is read for somebody in each step.
_MOST = 64


class BatchSize:
    """Ask for `limit` before each step and tell observe() of it."""

    def __init__(self, most: int, *, first: int = FIRST) -> None:
        """most: what memory has room for. first: what to begin with, and what it never goes below."""
        first = min(first, most)
        self._sizes = [first]
        while self._sizes[-1] < most:
            self._sizes.append(min(2 * self._sizes[-1], most))
        self._seconds: list[deque[float]] = [deque(maxlen=32) for _ in self._sizes]
        self._at = 0
        self._steps = 0

    @property
    def limit(self) -> int:
        return self._sizes[self._at]

    def observe(self, sequences: int, prompt_tokens: int, seconds: float) -> None:
        """A step that took so many seconds. Those with parts of prompts say nothing of decoding."""
        self._steps += 1
        if sequences == self.limit and not prompt_tokens:
            self._seconds[self._at].append(seconds)
        if self._steps < MEASURED:
            return
        here, below, above = (self._rate(self._at + i) for i in (0, -1, 1))
        if self._at + 1 < len(self._sizes) and self._steps >= PATIENCE:
            self._seconds[self._at + 1].clear()
            self._go(1)
        elif below and here and here < WORTH * below:
            self._go(-1)
        elif self._at + 1 < len(self._sizes) and here and (not above or above >= WORTH * here):
            self._go(1)

    def curve(self) -> dict[int, float]:
        """Tokens per second of decoding by how many replies ran, of the limits that were measured, ascending."""
        rates = {size: self._rate(at) for at, size in enumerate(self._sizes)}
        return {size: rate for size, rate in rates.items() if rate}

    def _rate(self, at: int) -> float:
        """0 for what was not measured."""
        if not 0 <= at < len(self._sizes) or len(self._seconds[at]) < MEASURED:
            return 0.0
        return self._sizes[at] / statistics.median(self._seconds[at])

    def _go(self, to: int) -> None:
        self._at, self._steps = self._at + to, 0


def most_at_once(sizes: ModelSizes, context: int, free: int | None) -> int:
    """So many replies whose decode states, as long as the context allows, fit in half of the memory that is free.

    free: bytes; None is not known."""
    if free is None:
        return MAX_SEQUENCES
    return min(max(free // 2 // sizes.kv_bytes(context), 1), _MOST)
