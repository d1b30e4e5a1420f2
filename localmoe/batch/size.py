"""How many replies run at once: twice as many as long as that gives more tokens per second, by what steps took.

Knows sizes and seconds only."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

# Begun with; as many steps are measured of a size before it is judged.
FIRST, MEASURED = 4, 8
# A larger size must bring so much; it costs memory, and each reply is slower.
WORTH = 1.05
# Steps after which a size is given up that never ran alone, and a larger one is tried again that was none the better.
PATIENCE = 256


class BatchSize:
    """Ask for `limit` before each step and tell observe() of it. limits: all there were, ascending."""

    def __init__(self, most: int, *, first: int = FIRST) -> None:
        """most: what memory has room for. first: what to begin with."""
        self.most = most
        self.limits = [min(first, most)]
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=32))
        self._steps = 0

    @property
    def limit(self) -> int:
        return self.limits[-1]

    def observe(self, sequences: int, prompt_tokens: int, seconds: float) -> None:
        """A step that took so many seconds. Those with parts of prompts say nothing of decoding."""
        self._steps += 1
        if not prompt_tokens:
            self._seconds[sequences].append(seconds)
        if self.limit == self.most:
            return
        full = len(self._seconds[self.limit]) >= MEASURED and self._steps >= MEASURED
        if self._steps >= PATIENCE or (full and self._pays()):
            self.limits.append(min(2 * self.limit, self.most))
            self._steps = 0

    def curve(self) -> dict[int, float]:
        """Tokens per second of decoding by how many replies ran, of the limits that were measured, ascending."""
        measured = [size for size in self.limits if len(self._seconds[size]) >= MEASURED]
        return {size: size / statistics.median(self._seconds[size]) for size in measured}

    def _pays(self) -> bool:
        """Whether this size is better than the measured one below it, so that the next may be, too."""
        curve = self.curve()
        below = [rate for size, rate in curve.items() if size <= self.limit // 2]
        return not below or curve[self.limit] >= WORTH * below[-1]
