"""Which expert to give up when a slot is needed. Knows numbers of experts only: no tensors, no bytes, no
files, so traces can be replayed through the same code.

A key is layer * num_experts + expert. Every use of an expert is told with touch(), resident or not; admit() and drop()
say what is resident. Memory: a few numbers for each expert of the model."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from localmoe.experts.residency import Asked, Residency

PolicyName = Literal["best", "aged", "lru", "s3fifo"]
Spared = Callable[[int], bool]


class Policy(Protocol):
    """The order in which residents are given up."""

    def touch(self, key: int, count: int, now: float) -> None:
        """`count` tokens of a step chose this expert; now: tokens its layer has seen, the middle of the step."""
        ...

    def admit(self, key: int) -> None:
        """The expert is resident from now on."""
        ...

    def drop(self, key: int) -> None:
        """The expert is no longer resident, whether it was a victim or not."""
        ...

    def victim(self, spared: Spared) -> int | None:
        """The resident to give up first among those not spared, None if there is none. It stays until drop()."""
        ...

    def keep(self, keys: Collection[int]) -> None:
        """These are the residents, whatever was told before and however far that got."""
        ...

    def learn(self, table: Residency, use: Asked) -> None:
        """A use of the table is complete, and there is time to draw conclusions from it."""
        return


class Lru(Policy):
    """Least recently used first."""

    def __init__(self, num_keys: int) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def touch(self, key: int, count: int, now: float) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def admit(self, key: int) -> None:
        self._order[key] = None

    def drop(self, key: int) -> None:
        del self._order[key]

    def victim(self, spared: Spared) -> int | None:
        return next((key for key in self._order if not spared(key)), None)

    def keep(self, keys: Collection[int]) -> None:
        self._order = OrderedDict.fromkeys([*(key for key in self._order if key in keys), *keys])


class Aged(Policy):
    """Least expected use first. An expert's uses are counted three times, forgetting half of them every 8, 64 and 512
    tokens; the mean of the three rates is what is expected. No one half-life suits every text: on recorded traces the
    best was 8 in one and 512 in another, and the mean of all three was never far from it (localmoe simulate).

    Uses of experts that are not resident count too: there are so few experts that all of their past is kept.
    After the combined recency and frequency of LRFU (Lee et al., IEEE Transactions on Computers 50(12), 2001)."""

    HALF_LIVES = (8.0, 64.0, 512.0)
    # Beyond 2 ** this, counts are brought back to a new beginning of time before they overflow.
    _MOST_DOUBLINGS = 500.0

    def __init__(self, num_keys: int) -> None:
        self._half_lives = np.array(self.HALF_LIVES)
        # A count is kept times 2 ** (now / half life): then time passing changes none of them.
        self._counts = np.zeros((len(self.HALF_LIVES), num_keys))
        self._absent = np.full(num_keys, np.inf)
        self._begin = self._now = 0.0

    def touch(self, key: int, count: int, now: float) -> None:
        # A layer that missed an interrupted step is behind the others.
        self._now = max(self._now, now)
        doublings = (now - self._begin) / self._half_lives
        if doublings[0] > self._MOST_DOUBLINGS:
            self._counts *= 2.0 ** -doublings[:, None]
            self._begin, doublings = now, np.zeros_like(doublings)
        self._counts[:, key] += count * 2.0**doublings

    def admit(self, key: int) -> None:
        self._absent[key] = 0.0

    def drop(self, key: int) -> None:
        self._absent[key] = np.inf

    def victim(self, spared: Spared) -> int | None:
        doublings = (self._now - self._begin) / self._half_lives
        expected = (2.0**-doublings / self._half_lives) @ self._counts + self._absent
        while True:
            key = int(expected.argmin())
            if expected[key] == np.inf:
                return None
            if not spared(key):
                return key
            expected[key] = np.inf

    def keep(self, keys: Collection[int]) -> None:
        self._absent[:] = np.inf
        self._absent[list(keys)] = 0.0


class S3Fifo(Policy):
    """Three queues: newcomers pass through a small one; those used again there move to the main one, the others leave
    and are remembered for a while. Source: Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023."""

    _MOST_USES = 3

    # Of the residents, at least this share waits in the small queue before the main one gives anything up.
    _SMALL_SHARE = 0.1

    def __init__(self, num_keys: int) -> None:
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._uses: dict[int, int] = {}
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def touch(self, key: int, count: int, now: float) -> None:
        if key in self._uses:
            self._uses[key] = min(self._uses[key] + 1, self._MOST_USES)

    def admit(self, key: int) -> None:
        self._uses[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            self._main.append(key)
        else:
            self._small.append(key)

    def drop(self, key: int) -> None:
        del self._uses[key]
        # Where it is a victim, it is the first of its queue.
        if self._small and self._small[0] == key:
            self._small.popleft()
            self._ghosts[key] = None
            while len(self._ghosts) > len(self._uses):
                self._ghosts.popitem(last=False)
        else:
            (self._main if key in self._main else self._small).remove(key)

    def victim(self, spared: Spared) -> int | None:
        small_first = len(self._small) >= self._SMALL_SHARE * len(self._uses)
        # Passing over the small queue can fill the main one, so that is always looked at after it.
        for queue in (self._small, self._main) if small_first else (self._main, self._small, self._main):
            found = self._first(queue, spared)
            if found is not None:
                return found
        return None

    def keep(self, keys: Collection[int]) -> None:
        self._uses = {key: self._uses.get(key, 0) for key in keys}
        main = dict.fromkeys(key for key in self._main if key in keys)
        self._small = deque(dict.fromkeys(key for key in (*self._small, *keys) if key in keys and key not in main))
        self._main = deque(main)

    def _first(self, queue: deque[int], spared: Spared) -> int | None:
        """Pass over a queue until a victim leads it; those used meanwhile get another round, in the main queue."""
        for _ in range((self._MOST_USES + 1) * len(queue)):
            if not queue:
                return None
            key = queue[0]
            if spared(key):
                queue.rotate(-1)
            elif self._uses[key]:
                self._uses[key] = 0 if queue is self._small else self._uses[key] - 1
                self._main.append(queue.popleft())
            else:
                return key
        return None
