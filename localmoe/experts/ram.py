"""The RAM tier: experts in slots of memory, read into them from files.

Ties together what decides (residency), what reads (reader) and where the bytes come to lie. Does not compute; does not
know hidden states. One thread uses it, the reader's threads aside. Memory: the slots."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence

from localmoe.errors import CheckpointError, FormatError
from localmoe.experts.file import File
from localmoe.experts.guesses import Guesses
from localmoe.experts.layout import Layout, Place
from localmoe.experts.reader import Job, Reader
from localmoe.experts.residency import Acquired, Pass, Residency
from localmoe.experts.slots import SlotExperts, tensors_in
from localmoe.files import shown
from localmoe.memory import SlotMemory


class RamTier:
    """Slots, and what is read into them."""

    def __init__(
        self,
        layout: Layout,
        memory: SlotMemory,
        residency: Residency,
        experts: SlotExperts,
        open_file: Callable[[int], File],
    ) -> None:
        """memory: a place for each slot of the residency, and any more for guesses. experts: told what lies where."""
        self.layout, self.residency = layout, residency
        self.reader = Reader(open_file)
        self.wait_seconds = 0.0
        self._memory, self._experts = memory, experts
        slots = residency.capacity
        # Where in memory each slot of the residency lies.
        self._at = list(range(slots))
        self.guesses = Guesses(range(slots, memory.slots), self.reader, self._forget)
        self._jobs: dict[int, Job] = {}
        self._key_in: dict[int, int] = {}
        # By place, the expert whose bytes are all there: true at any moment, wherever a step is interrupted.
        self._whole: dict[int, int] = {}
        # Jobs of fill(), in their order.
        self._filling: list[Job] = []
        # Experts whose scales have been looked at: their bytes on disk do not change.
        self._checked: set[int] = set()
        # Slots that the governor has taken.
        self._taken: list[int] = []

    def order(self, acquired: Iterable[Acquired]) -> None:
        """Have what was not resident read."""
        for one in acquired:
            if one.hit:
                if one.key in self._jobs:
                    self.reader.hurry(self._jobs[one.key])
                continue
            self._empty(one.slot)
            self._key_in[one.slot] = one.key
            guessed = self.guesses.claim(one.key, self._at[one.slot])
            if guessed is not None:
                self._at[one.slot], self._jobs[one.key] = guessed
            else:
                self._jobs[one.key] = self._read(one.key, self._at[one.slot])

    def wants_guess(self) -> bool:
        """Whether there is time for guesses, and they are worth it."""
        while self._filling and self._filling[-1].done:
            self._filling.pop()
        return not self._filling and self.guesses.worthwhile()

    def guess(self, keys: Iterable[int]) -> None:
        """Read some of these, the likeliest first, when there is nothing else to read."""
        absent = [key for key in keys if self.residency.slot_of(key) is None]
        self.guesses.begin(absent, functools.partial(self._read, urgent=False))

    def fill(self, keys: Sequence[int]) -> None:
        """These have been made resident and are to be read, when there is nothing else to read."""
        for key in keys:
            slot = self.residency.slot_of(key)
            assert slot is not None, "made resident"
            self._key_in[slot] = key
            self._jobs[key] = self._read(key, self._at[slot], urgent=False)
            self._filling.append(self._jobs[key])

    def ready(self, now: Pass) -> list[int]:
        """The first experts that wait to be computed, at least one: waits until it is there."""
        run: list[int] = []
        for key in now.waiting:
            job = self._jobs.get(key)
            if job is not None:
                if not job.done and run:
                    break
                self._wait(key, job)
            run.append(key)
        return run

    def places(self, keys: Iterable[int]) -> dict[int, int]:
        """Those of the keys whose bytes are there, and where."""
        slots = ((key, self.residency.slot_of(key)) for key in keys if key not in self._jobs)
        return {key: self._at[slot] for key, slot in slots if slot is not None}

    def exchange(self, key: int, other: int | None) -> None:
        """`other` lies where the key was, or nothing does: the key has gone elsewhere."""
        slot = self.residency.slot_of(key)
        assert slot is not None and key not in self._jobs, "a resident that has been read"
        self._whole.pop(self._at[slot], None)
        self.residency.exchange(key, other)
        self._forget(key)
        del self._key_in[slot]
        if other is not None:
            self._key_in[slot] = other
            self._finisher(other, self._at[slot], self.layout.place(*self._numbers(other)))()

    def mend(self, elsewhere: Callable[[int], bool]) -> None:
        """After an error or an interruption, wherever it came: what has been read stays, unless it is elsewhere too;
        all else is not there, and is read again when it is asked for."""
        self.reader.quiet()
        self._jobs.clear()
        self._filling.clear()
        places = {key: place for place, key in self._whole.items()}
        residents = self.residency.keys()
        kept = {key for key in residents if key in places and not elsewhere(key)}
        for key in residents:
            if key not in kept:
                self._forget(key)
        self.residency.mend(kept, [slot for slot in range(len(self._at)) if slot not in self._taken])
        self._key_in = {slot: key for key in kept if (slot := self.residency.slot_of(key)) is not None}
        used = {places[key] for key in kept}
        free = [place for place in range(self._memory.slots) if place not in used]
        for slot in range(len(self._at)):
            key_in = self._key_in.get(slot)
            self._at[slot] = free.pop() if key_in is None else places[key_in]
        self.guesses.begin_again(free)
        for slot in self._taken:
            self._give_back(self._at[slot])

    def resize(self, wish: int) -> None:
        """Give slots back to the system, or take them again; those in use stay."""
        while self.residency.capacity > wish:
            slot = self.residency.shrink()
            if slot is None:
                break
            self._empty(slot)
            self._give_back(self._at[slot])
            self._taken.append(slot)
        while self.residency.capacity < wish and self._taken:
            self.residency.grow(self._taken.pop())

    def check(self) -> None:
        """Raises AssertionError if the table of slots contradicts itself."""
        keys = self.residency.keys()
        slots = {key: self.residency.slot_of(key) or 0 for key in keys}
        assert all(self._key_in.get(slot) == key for key, slot in slots.items()), "a slot of another"
        assert len(set(self._at)) == len(self._at), "two slots in one place"
        there = (key for key in keys if key not in self._jobs)
        assert all(self._whole.get(self._at[slots[key]]) == key for key in there), "bytes of another"

    def _read(self, key: int, at: int, *, urgent: bool = True) -> Job:
        """Begin to read an expert to a place in memory."""
        self._whole.pop(at, None)
        place = self.layout.place(*self._numbers(key))
        return self.reader.submit(place.ranges, self._memory.view(at), self._finisher(key, at, place), urgent=urgent)

    def _finisher(self, key: int, at: int, place: Place) -> Callable[[], None]:
        def finish() -> None:
            layer, expert = self._numbers(key)
            if key not in self._checked:
                try:
                    tensors_in(self._memory, at, self.layout.kinds[layer], place)
                except FormatError as problem:
                    file = shown(self.layout.files[place.ranges[0].file])
                    raise CheckpointError(
                        f"{file}: expert {expert} of layer {layer}: {problem}; download it again"
                    ) from None
                self._checked.add(key)
            self._experts.put(layer, expert, at, place)
            self._whole[at] = key

        return finish

    def _give_back(self, at: int) -> None:
        self._whole.pop(at, None)
        self._memory.give_back(at)

    def _wait(self, key: int, job: Job) -> None:
        started = time.perf_counter()
        self.reader.hurry(job)
        try:
            self.reader.wait(job)
        finally:
            self.wait_seconds += time.perf_counter() - started
        del self._jobs[key]

    def _empty(self, slot: int) -> None:
        """Nothing reads into the slot or computes from it any more."""
        key = self._key_in.pop(slot, None)
        if key is None:
            return
        job = self._jobs.pop(key, None)
        if job is not None:
            # Of a step that was interrupted, or of a start that was warm; else it would have been waited for.
            self.reader.cancel(job)
            self.reader.settle(job)
        self._forget(key)

    def _forget(self, key: int) -> None:
        """The expert's bytes are not where they were."""
        self._experts.clear(*self._numbers(key))

    def _numbers(self, key: int) -> tuple[int, int]:
        return divmod(key, self.layout.num_experts)
