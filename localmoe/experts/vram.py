"""The VRAM tier: experts that an accelerator holds and computes while the CPU computes those in RAM.

Knows keys, slots and places in RAM; does not know what an accelerator is. An expert is in VRAM or in RAM, not in both:
one that moves up changes places with one that moves down. Memory: accelerator.slots, of which SPARE take what is on
its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmoe.experts.passage import Passage
from localmoe.experts.queues import locked_bytes
from localmoe.experts.residency import Asked, Residency
from localmoe.experts.split import Costs, load_of

# Slots for what is on its way: two halves of those that experts pass through.
SPARE = 8
# Of so many slots a longer step takes none.
CACHED_LEAST = SPARE + 4
# Experts of a layer that are copied at most, if they do not pass through.
MOST_COPIES = 4


def staging_bytes(slot_bytes: int) -> int:
    """Page-locked RAM that an accelerator takes at most: a buffer for each slot that experts pass through, and more."""
    return locked_bytes(SPARE, slot_bytes)


class Copy(Protocol):
    """An expert on its way. Its time is known after the wait() of what was begun after it."""

    @property
    def seconds(self) -> float: ...


class Running(Protocol):
    """Experts that are being computed. The time is known after wait()."""

    seconds: float

    def wait(self) -> Tensor:
        """Their weighted terms [T, D] float32."""
        ...


class Accelerator(Protocol):
    """A device with memory of its own. What it is told happens in that order, while the caller goes on."""

    slots: int

    def load(self, place: int, slot: int) -> Copy:
        """Copy a place in RAM, whole, to a slot."""
        ...

    def finish(self) -> None:
        """Returns when all that it was told is done: what was to be loaded is there, its places in RAM are free."""
        ...

    def store(self, slot: int, place: int) -> None:
        """Copy a slot back; returns when it is there."""
        ...

    @property
    def part(self) -> int:
        """How many slots, the last of them, give_back() would give up; 0 if it cannot."""
        return 0

    def move(self, slot: int, other: int) -> None:
        """Copy a slot to another."""
        ...

    def give_back(self) -> None:
        """Give up the memory of the last `part` slots, which are not used any more."""
        ...

    def begin(self, layer: int, slots: dict[int, int], hidden: Tensor, ids: Tensor, weights: Tensor) -> Running:
        """Compute the experts that lie in slots = {expert: slot}.

        hidden [T, D]; ids [T, K], -1 for those that are not meant; weights [T, K]."""
        ...

    def stream(self, layer: int, slots: Sequence[int], hidden: Tensor, ids: Tensor, weights: Tensor) -> Passage:
        """Let experts pass through these slots, and compute each for those of the ids that name it; see begin()."""
        ...


@dataclass
class Part:
    """The accelerator's part of a layer. experts: those it computes; copied: those of them that were in RAM.

    copies: of those, and of no others that move up meanwhile."""

    load: int
    experts: list[int]
    copied: dict[int, int]
    copies: list[Copy]
    running: Running | None


class VramTier:
    """The table of the accelerator's slots, and what they are used for."""

    def __init__(
        self, accelerator: Accelerator, table: Residency, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """table: of accelerator.slots - SPARE slots."""
        assert table.capacity == accelerator.slots - SPARE, "some slots are for what is on its way"
        self.accelerator, self._table, self.clock = accelerator, table, clock
        self.costs = Costs()
        self._slot: dict[int, int] = {}
        self._spare = list(range(accelerator.slots))
        self.hits = self.copies = 0

    def holds(self, key: int) -> bool:
        return key in self._slot

    def pin(self, layer: int, experts: Sequence[int], counts: Sequence[int], tokens: int) -> list[int]:
        """Keys of a layer's experts that are here; they stay until unpin(). Every use counts, here or not."""
        self._table.begin(layer, experts, counts, tokens)
        self._table.finished(Asked(layer, experts, counts, tokens))
        keys = [layer * self._table.num_experts + expert for expert in experts]
        held = [key for key in keys if key in self._slot]
        for key in held:
            self._table.acquire(key, ())
        return held

    def unpin(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._table.release(key)

    def slots(self, held: Sequence[int]) -> dict[int, int]:
        """{expert: slot} of a layer's experts that are here."""
        return {key % self._table.num_experts: self._slot[key] for key in held}

    def lend(self, count: int) -> list[int]:
        """So many slots, at most SPARE, for what passes through."""
        return [self._spare.pop() for _ in range(count)]

    def take_back(self, slots: Sequence[int]) -> None:
        """They are not used any more."""
        self._spare.extend(slots)

    def begin(
        self, layer: int, held: Sequence[int], ready: dict[int, int], hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Part:
        """Start with the experts that are here, and with some of `ready` = {key: place in RAM}."""
        count = self._table.num_experts
        load = load_of(ids.numel(), max(len(torch.unique(ids)), 1))
        wanted = min(self.costs.copies(load, len(held), len(ready)), len(self._spare), MOST_COPIES)
        copied = {key: self._spare.pop() for key in list(ready)[:wanted]}
        slots = self.slots(held) | {key % count: slot for key, slot in copied.items()}
        copies = [self.accelerator.load(ready[key], slot) for key, slot in copied.items()]
        some = only(ids, list(slots), count)
        running = self.accelerator.begin(layer, slots, hidden, some, weights) if slots else None
        self.hits += len(held)
        self.copies += len(copied)
        return Part(load, list(slots), copied, copies, running)

    def end(self, part: Part, y: Tensor) -> None:
        """Wait for what begin() started and add its terms to y [T, D], once."""
        running, part.running = part.running, None
        if running is None:
            return
        y += running.wait()
        self.costs.note("accelerator", part.load, len(part.experts), running.seconds)
        self.costs.note("copy", part.load, len(part.copies), sum(copy.seconds for copy in part.copies))

    def candidate(self, keys: Sequence[int]) -> int | None:
        """Of experts that the CPU computed, one that had better be here next time."""
        return next((key for key in keys if self._table.prefers(key)), None)

    def load(self, place: int) -> int:
        """Copy an expert to a spare slot, for settle(). Returns the slot: there is one, see MOST_COPIES."""
        slot = self._spare.pop()
        self.accelerator.load(place, slot)
        return slot

    def settle(self, key: int, slot: int, place: int) -> int | None:
        """An expert that was copied stays, if something can be given up for it: that is copied to the place it leaves.

        Returns what is in the place now: the key itself if it does not stay, another, or None for nothing."""
        self.accelerator.finish()
        acquired = self._table.acquire(key, ())
        if acquired is None:
            self._spare.append(slot)
            return key
        self._table.release(key)
        self._slot[key] = slot
        down = acquired.evicted
        if down is not None:
            left = self._slot.pop(down)
            self.accelerator.store(left, place)
            self._spare.append(left)
        return down

    def mend(self) -> None:
        """After an error or an interruption, wherever it came: what was started is waited for and forgotten, what is
        known to lie here stays."""
        self.accelerator.finish()
        self._slot = {key: slot for key, slot in self._slot.items() if self._table.slot_of(key) is not None}
        # The table's slots are numbers only; after give_back(), any of them may be gone.
        count, taken = self.accelerator.slots - SPARE, {self._table.slot_of(key) for key in self._slot}
        free = [slot for slot in range(count + len(taken)) if slot not in taken][: count - len(taken)]
        self._table.mend(self._slot, [*(slot for slot in taken if slot is not None), *free])
        used = set(self._slot.values())
        self._spare = [slot for slot in range(self.accelerator.slots) if slot not in used]

    def give_back(self) -> bool:
        """Give a part of the accelerator's memory back, and up the experts that are worth least; False if none can be.

        Between steps only. What is given up is nowhere any more, and read again when it is needed."""
        count = self.accelerator.part
        if not count or self._table.capacity <= count:
            return False
        self.accelerator.finish()
        for _ in range(count):
            self._table.shrink()
        kept = set(self._table.keys())
        self._spare += [self._slot.pop(key) for key in list(self._slot) if key not in kept]
        slots = self.accelerator.slots - count
        self._spare = [slot for slot in self._spare if slot < slots]
        for key, slot in self._slot.items():
            if slot >= slots:
                self.accelerator.move(slot, self._spare[-1])
                self._slot[key] = self._spare.pop()
        self.accelerator.give_back()
        return True

    def learn(self) -> None:
        """See Residency.learn."""
        self._table.learn()


def only(ids: Tensor, experts: Sequence[int], num_experts: int) -> Tensor:
    """ids [T, K] with -1 for all that are not among these experts."""
    mine = torch.zeros(num_experts + 1, dtype=torch.bool)
    mine[list(experts)] = True
    return ids.where(mine[ids], -1)
