"""Routed experts that do not all fit in memory: read from disk when they are needed, kept while they are worth it.

Ties together what decides (residency), what reads (reader) and what computes (slots). Less memory costs time and never
changes a result: terms are added in order of expert id, whatever was resident. One thread uses it, the reader's threads
aside. Memory: the slots."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, FormatError
from localmoe.experts.governor import Governor
from localmoe.experts.guesses import Guesses
from localmoe.experts.layout import Layout, Place
from localmoe.experts.policy import PolicyName
from localmoe.experts.reader import File, Job, Reader
from localmoe.experts.residency import Acquired, Pass, Residency
from localmoe.experts.resident import ExpertSource
from localmoe.experts.slots import SlotExperts, tensors_in
from localmoe.experts.trace import Counted, Recorder, Use, use_of
from localmoe.files import shown
from localmoe.memory import SlotMemory


@dataclass(frozen=True)
class Paging:
    """How experts that do not fit are held. ram: bytes the process may take, None for what the machine can give.

    slots: experts held in RAM, instead of what `ram` allows. prefetch: read the experts of hash layers as soon as the
    tokens are known. guess: while a layer's attention runs, read what it will probably choose. trace: a file to record
    the routing in. policy: what stays; see localmoe simulate.
    pack: a folder that localmoe pack has made of the model, to read from instead of its shards."""

    ram: int | None = None
    slots: int | None = None
    policy: PolicyName = "best"
    prefetch: bool = True
    guess: bool = True
    trace: Path | None = None
    pack: Path | None = None


@dataclass(frozen=True)
class PagerStats:
    """Counts since the beginning; subtract two of them for what happened between.

    hits, misses, first: uses of experts, as in residency.Counts. bytes_read: from disk. bytes_computed: of experts.
    wait_seconds: the model waited for the disk. busy_seconds: the disk had something to read. guesses: experts read
    before it was sure that they were needed; true_guesses: and they were (such a use is still a miss)."""

    hits: int = 0
    misses: int = 0
    first: int = 0
    bytes_read: int = 0
    bytes_computed: int = 0
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0
    guesses: int = 0
    true_guesses: int = 0

    def __sub__(self, before: PagerStats) -> PagerStats:
        return PagerStats(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))

    @property
    def hit_rate(self) -> float:
        """Share of uses that found the expert in memory, 0 if there was none."""
        return self.hits / max(self.hits + self.misses, 1)


class PagedExperts(ExpertSource):
    """An ExpertSource whose experts lie in files."""

    def __init__(
        self,
        layout: Layout,
        memory: SlotMemory,
        residency: Residency,
        experts: SlotExperts,
        open_file: Callable[[int], File],
        *,
        governor: Governor | None = None,
        recorder: Recorder | None = None,
        prefetch: bool = True,
    ) -> None:
        """memory: a slot for each of the residency's, and any more for guesses."""
        self._layout, self._memory, self._residency, self._experts = layout, memory, residency, experts
        self._governor, self._recorder, self._prefetch = governor, recorder, prefetch
        self._reader = Reader(open_file)
        slots = residency.capacity
        # Where in memory each slot of the residency lies.
        self._at = list(range(slots))
        self._guesses = Guesses(
            range(slots, memory.slots), self._reader, lambda key: experts.clear(*self._numbers(key))
        )
        self._jobs: dict[int, Job] = {}
        self._key_in: dict[int, int] = {}
        self._begun: dict[int, tuple[Use, Pass]] = {}
        # Experts whose scales have been looked at: their bytes on disk do not change.
        self._checked: set[int] = set()
        # Slots that the governor has taken.
        self._taken: list[int] = []
        self._bytes_computed, self._wait_seconds = 0, 0.0
        self._expert_bytes = layout.expert_bytes

    @property
    def stats(self) -> PagerStats:
        counts = self._residency.counts
        return PagerStats(
            counts.hits,
            counts.misses,
            counts.first,
            self._reader.bytes_read,
            self._bytes_computed,
            self._wait_seconds,
            self._reader.busy_seconds,
            self._guesses.counts.made,
            self._guesses.counts.true,
        )

    @property
    def capacity(self) -> int:
        """Slots there are now."""
        return self._residency.capacity

    def prepare(self, tokens: int) -> None:
        """Give up what a step before this one left behind, and slots for memory that this one needs."""
        self._abandon()
        if self._governor is not None:
            self._governor.expect(tokens)
            self._govern()

    def announce(self, layer: int, ids: Tensor, *, early: bool = False) -> None:
        """Begin to read what apply() will need; see ExpertSource.announce."""
        if early and not self._prefetch:
            return
        use = use_of(ids)
        begun = self._begun.get(layer)
        if begun is not None and begun[0] == use:
            return
        if begun is not None:
            begun[1].abandon()
        self._begin(layer, use, ids.shape[0])

    def wants_guess(self) -> bool:
        """See ExpertSource.wants_guess."""
        return self._guesses.worthwhile()

    def guess(self, layer: int, ids: Tensor) -> None:
        """Read what apply() will probably need when nothing else is to be read; see ExpertSource.guess."""
        # What most tokens choose, and of those the better choices, first.
        likeliest = Counter(ids.t().flatten().tolist()).most_common()
        keys = (layer * self._layout.num_experts + expert for expert, _count in likeliest)
        absent = [key for key in keys if self._residency.slot_of(key) is None]
        self._guesses.begin(absent, functools.partial(self._read, urgent=False))

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertSource.apply. Raises CheckpointError or ReadError if an expert cannot be read."""
        self.announce(layer, ids)
        use, now = self._begun.pop(layer)
        if self._recorder is not None:
            self._recorder.layer(layer, ids.shape[0], use)
        try:
            self._order(now.advance())
            self._residency.learn()
            y = torch.zeros(hidden.shape, dtype=torch.float32)
            while not now.done:
                run = self._ready(now)
                experts = [key % self._layout.num_experts for key in run]
                some = ids
                if len(run) < len(use.experts):
                    some = ids.where((ids >= experts[0]) & (ids <= experts[-1]), -1)
                self._experts.add(layer, experts, hidden, some, weights, y)
                self._bytes_computed += len(run) * self._expert_bytes
                for _ in run:
                    self._order(now.release())
        except BaseException:
            now.abandon()
            self._drop_failed()
            raise
        # While a trace is recorded, the number of slots changes between steps only, so that it can be replayed.
        if self._recorder is None or layer == self._layout.num_layers - 1:
            self._govern()
        return y

    def check(self) -> None:
        """Raises AssertionError if the table of slots contradicts itself."""
        keys = self._residency.keys()
        assert all(self._key_in.get(self._residency.slot_of(key) or 0) == key for key in keys), "a slot of another"

    def close(self) -> None:
        """Stop reading. Completes the trace."""
        self._reader.close()
        if self._recorder is not None:
            counts = self._residency.counts
            self._recorder.close(Counted(counts.hits, counts.misses))

    def _abandon(self) -> None:
        while self._begun:
            self._begun.popitem()[1][1].abandon()

    def _begin(self, layer: int, use: Use, tokens: int) -> None:
        begun = self._residency.begin(layer, use.experts, use.counts, tokens)
        self._begun[layer] = (use, begun)
        self._order(begun.advance())
        self._guesses.judge(begun.keys)

    def _order(self, acquired: Sequence[Acquired]) -> None:
        """Have what was not resident read."""
        for one in acquired:
            if one.hit:
                continue
            self._empty(one.slot)
            self._key_in[one.slot] = one.key
            guessed = self._guesses.claim(one.key, self._at[one.slot])
            if guessed is not None:
                self._at[one.slot], self._jobs[one.key] = guessed
            else:
                self._jobs[one.key] = self._read(one.key, self._at[one.slot])

    def _read(self, key: int, at: int, *, urgent: bool = True) -> Job:
        """Begin to read an expert to a place in memory."""
        place = self._layout.place(*self._numbers(key))
        return self._reader.submit(place.ranges, self._memory.view(at), self._finisher(key, at, place), urgent=urgent)

    def _empty(self, slot: int) -> None:
        """Nothing reads into the slot or computes from it any more."""
        key = self._key_in.pop(slot, None)
        if key is None:
            return
        job = self._jobs.pop(key, None)
        if job is not None:
            # Of a step that was interrupted, or it would have been waited for.
            self._reader.settle(job)
        self._forget(key)

    def _forget(self, key: int) -> None:
        """The expert's bytes are not where they were."""
        self._experts.clear(*self._numbers(key))

    def _finisher(self, key: int, slot: int, place: Place) -> Callable[[], None]:
        def finish() -> None:
            layer, expert = self._numbers(key)
            if key not in self._checked:
                try:
                    tensors_in(self._memory, slot, self._layout.kinds[layer], place)
                except FormatError as problem:
                    file = shown(self._layout.files[place.ranges[0].file])
                    raise CheckpointError(
                        f"{file}: expert {expert} of layer {layer}: {problem}; download it again"
                    ) from None
                self._checked.add(key)
            self._experts.put(layer, expert, slot, place)

        return finish

    def _numbers(self, key: int) -> tuple[int, int]:
        return divmod(key, self._layout.num_experts)

    def _ready(self, now: Pass) -> list[int]:
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

    def _wait(self, key: int, job: Job) -> None:
        started = time.perf_counter()
        try:
            self._reader.wait(job)
        finally:
            self._wait_seconds += time.perf_counter() - started
        del self._jobs[key]

    def _drop_failed(self) -> None:
        """After an error: experts that could not be read are not there, and are read again when they are asked for."""
        self._abandon()
        for key in [key for key, job in self._jobs.items() if job.done and job.error is not None]:
            slot = self._residency.slot_of(key)
            assert slot is not None, "a job belongs to a resident"
            self._empty(slot)
            self._residency.forget(key)

    def _govern(self) -> None:
        """Give memory back, or take it again, as the governor wishes; nothing is pinned by this layer any more."""
        if self._governor is None:
            return
        capacity = self._residency.capacity
        wish = self._governor.wish(capacity)
        while self._residency.capacity > wish:
            slot = self._residency.shrink()
            if slot is None:
                break
            self._empty(slot)
            self._memory.give_back(self._at[slot])
            self._taken.append(slot)
        while self._residency.capacity < wish and self._taken:
            self._residency.grow(self._taken.pop())
        if self._recorder is not None and self._residency.capacity != capacity:
            self._recorder.resized(self._residency.capacity)
