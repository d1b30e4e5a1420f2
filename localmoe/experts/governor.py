"""How many slots the memory allows, before a model runs and while it does.

Knows bytes: of a budget, of the process, of the machine. Takes slots back one by one when the process outgrows its
budget or the machine runs short, whoever used the memory, and returns them when there is room again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from localmoe.device import available_memory, resident_memory, total_memory, unseen
from localmoe.errors import ResourceError

# Left free on the machine, so that others run and nothing is swapped: a share of all RAM, within bounds.
_FREE_SHARE, _FREE_LEAST, _FREE_MOST = 0.05, 256 << 20, 4 << 30
# How often memory is looked at: asking takes a tenth of a millisecond, a step of a large model hundreds of them.
_EVERY_SECONDS = 0.1


def reserve() -> int:
    """Bytes of the machine's RAM that are left to others."""
    total = total_memory()
    return _FREE_LEAST if total is None else int(min(max(_FREE_SHARE * total, _FREE_LEAST), _FREE_MOST))


@dataclass(frozen=True)
class Room:
    """What the process may take, all in all, and what a step will need of it beside weights and slots."""

    budget: int
    working: int

    @classmethod
    def of(cls, ram: int | None, working: int) -> Room | None:
        """ram: None is what the machine can give; then None where the system does not tell."""
        if ram is not None:
            return cls(ram, working)
        have = available_memory()
        return None if have is None else cls(resident_memory() + have - reserve(), working)

    def slots(self, slot_bytes: int, least: int) -> int:
        """Slots that fit beside what the process holds now. Raises ResourceError for fewer than `least`."""
        taken = resident_memory() + self.working + unseen(self.budget)
        count = (self.budget - taken) // slot_bytes
        if count < least:
            short = taken + least * slot_bytes - self.budget
            raise ResourceError(
                f"{self.budget / 2**30:.2f} GiB of RAM hold too few experts: {taken / 2**30:.2f} GiB are taken by the "
                f"rest of the model and the work, {least} experts need {least * slot_bytes / 2**30:.2f} GiB, so "
                f"{short / 2**30:.2f} GiB are missing; raise --ram or free memory"
            )
        return count


class Governor:
    """Watches the memory of a running process."""

    def __init__(self, room: Room | None, slot_bytes: int, most: int, working: Callable[[int], int]) -> None:
        """room: None watches only the machine. most: slots there were at the beginning, with room for a step of one
        token. working(tokens): bytes that a step takes."""
        self._room, self._slot_bytes, self._most, self._working = room, slot_bytes, most, working
        self._ceiling, self._need = most, 0
        self._next = 0.0
        self._reserve = reserve()

    def expect(self, tokens: int) -> None:
        """A step of so many tokens begins: what it takes is not to be given to slots until the next one."""
        if self._room is not None:
            self._need = self._working(tokens) - self._working(1)
            self._ceiling = max(self._most - -(-self._need // self._slot_bytes), 1)

    def wish(self, capacity: int) -> int:
        """Slots there should be, given how many there are. Cheap; looks at the memory only now and then."""
        now, need = time.monotonic(), self._need
        self._need = 0
        fewer = min(capacity, self._ceiling)
        if now < self._next and not need:
            return fewer
        self._next = now + _EVERY_SECONDS
        left = self._left()
        if left is None:
            return fewer
        # Others may have taken what the step was to get, so that slots below the ceiling have to go too.
        left += (capacity - fewer) * self._slot_bytes - need
        if left < 0:
            fewer = max(fewer + left // self._slot_bytes, 1)
        if need:
            # Nor do slots come back while the step takes it.
            self._ceiling = fewer
        if fewer < capacity or left < 0:
            return fewer
        # One of difference, so that a slot does not come and go; and room for the work of the steps to come.
        more = (left - self._working(1)) // self._slot_bytes - 1
        return min(max(capacity + more, capacity), self._ceiling)

    def _left(self) -> int | None:
        """Bytes that may still be taken, negative where too many are; None if nothing is known."""
        known = []
        have = available_memory()
        if have is not None:
            known.append(have - self._reserve // 2)
        if self._room is not None:
            known.append(self._room.budget - unseen(self._room.budget) - resident_memory())
        return min(known) if known else None
