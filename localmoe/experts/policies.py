"""The policies there are by name, and the one that follows whichever of the others does better.

Integers only, like policy.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from localmoe.experts.policy import Aged, Lru, Policy, PolicyName, S3Fifo, Spared
from localmoe.experts.residency import Asked, Residency


class Best(Policy):
    """Least recently used first, until giving up what is least expected would have missed less; and back.

    Of each there is a shadow: a table of the same size that follows it alone, and has no bytes. No one policy is best
    for every text and number of slots, and what is best changes with the text. Memory: of four policies, two tables."""

    # Misses are forgotten by this much with every use. The lead that the other must have, in misses and in square
    # roots of misses: where both do the same, as with even routing, the difference of their misses is chance.
    # Chosen on recorded traces, where nothing between half and twice of each is much worse (localmoe simulate).
    _KEEP, _LEAD, _CHANCE = 0.999, 8.0, 0.5

    def __init__(self, num_keys: int) -> None:
        self._num_keys = num_keys
        self._policies: Sequence[Policy] = (Lru(num_keys), Aged(num_keys))
        self._shadows: list[Residency] = []
        self._misses = [0.0, 0.0]
        self._leader = 0

    def touch(self, key: int, count: int, now: float) -> None:
        for policy in self._policies:
            policy.touch(key, count, now)

    def admit(self, key: int) -> None:
        for policy in self._policies:
            policy.admit(key)

    def drop(self, key: int) -> None:
        for policy in self._policies:
            policy.drop(key)

    def victim(self, spared: Spared) -> int | None:
        return self._policies[self._leader].victim(spared)

    def keep(self, keys: Collection[int]) -> None:
        for policy in self._policies:
            policy.keep(keys)
        # They may be half told as well, and begin again empty, both alike.
        self._shadows = []

    def learn(self, table: Residency, use: Asked) -> None:
        """Let the shadows take the same use, and see which of them missed less."""
        if not self._shadows:
            self._shadows = [
                Residency(table.capacity, table.num_layers, table.num_experts, policy)
                for policy in (Lru(self._num_keys), Aged(self._num_keys))
            ]
        for i, shadow in enumerate(self._shadows):
            while shadow.capacity > table.capacity:
                shadow.shrink()
            while shadow.capacity < table.capacity:
                # Slots of a shadow are numbers that nobody looks at.
                shadow.grow(-1)
            before = shadow.counts.misses
            now = shadow.begin(*use)
            now.advance()
            while not now.done:
                now.release()
            # Its policy learns nothing, but what it was told of must not pile up.
            shadow.learn()
            self._misses[i] = self._misses[i] * self._KEEP ** len(use.experts) + shadow.counts.misses - before
        leader, other = self._misses[self._leader], self._misses[1 - self._leader]
        if other + self._LEAD + self._CHANCE * math.sqrt(leader) < leader:
            self._leader = 1 - self._leader


# Made for a number of keys.
POLICIES: dict[PolicyName, Callable[[int], Policy]] = {"best": Best, "aged": Aged, "lru": Lru, "s3fifo": S3Fifo}
