"""Routed experts that do not all fit in memory: read from disk when they are needed, kept while they are worth it.

Takes a layer's experts through the tiers. Less memory costs time and never changes a result: the CPU adds terms in
order of expert id, whatever was resident. One thread uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.experts.flow import STREAMED_TOKENS, move_up, stream
from localmoe.experts.governor import Governor
from localmoe.experts.paging import PagerStats
from localmoe.experts.ram import RamTier
from localmoe.experts.residency import Pass
from localmoe.experts.resident import ExpertSource
from localmoe.experts.slots import SlotExperts
from localmoe.experts.trace import Counted, Recorder, Use, use_of
from localmoe.experts.vram import Part, VramTier, only


@dataclass(frozen=True)
class _Begun:
    """A layer that has been announced. vram: where its experts may be besides RAM. held: keys of those that are there;
    now: of the others, on their way or in RAM."""

    layer: int
    use: Use
    vram: VramTier | None
    held: list[int]
    now: Pass


class PagedExperts(ExpertSource):
    """An ExpertSource whose experts lie in files."""

    def __init__(
        self,
        ram: RamTier,
        experts: SlotExperts,
        *,
        vram: Mapping[int, VramTier] | None = None,
        governor: Governor | None = None,
        recorder: Recorder | None = None,
        prefetch: bool = True,
    ) -> None:
        """experts: computes what lies in the RAM tier. vram: by layer, the tier of its accelerator, if it has one."""
        self._ram, self._experts, self._vram = ram, experts, dict(vram or {})
        self._governor, self._recorder, self._prefetch = governor, recorder, prefetch
        self._begun: dict[int, _Begun] = {}
        # From the beginning of whatever changes the tiers to its end: if it does not come to that, they are mended.
        self._torn = False
        self._bytes_computed = 0
        self._num_experts, self._expert_bytes = ram.layout.num_experts, ram.layout.expert_bytes

    @property
    def stats(self) -> PagerStats:
        counts, guesses, reader = self._ram.residency.counts, self._ram.guesses.counts, self._ram.reader
        return PagerStats(
            hits=counts.hits,
            misses=counts.misses,
            first=counts.first,
            bytes_read=reader.bytes_read,
            bytes_computed=self._bytes_computed,
            wait_seconds=self._ram.wait_seconds,
            busy_seconds=reader.busy_seconds,
            guesses=guesses.made,
            true_guesses=guesses.true,
            vram_hits=sum(tier.hits for tier in self._tiers),
            copies=sum(tier.copies for tier in self._tiers),
        )

    @property
    def _tiers(self) -> set[VramTier]:
        return set(self._vram.values())

    @property
    def capacity(self) -> int:
        """Slots in RAM there are now."""
        return self._ram.residency.capacity

    def prepare(self, tokens: int) -> None:
        """Give up what a step before this one left behind, and slots for memory that this one needs."""
        self._enter()
        self._abandon()
        if self._governor is not None:
            self._governor.expect(tokens)
            self._govern()
        self._torn = False

    def give_back(self) -> bool:
        """See ExpertSource.give_back: every accelerator does."""
        self._enter()
        self._abandon()
        given = [tier.give_back() for tier in self._tiers]
        self._torn = False
        return any(given)

    def announce(self, layer: int, ids: Tensor, *, early: bool = False) -> None:
        """Begin to read what apply() will need; see ExpertSource.announce."""
        if early and not self._prefetch:
            return
        self._enter()
        self._announce(layer, ids)
        self._torn = False

    def wants_guess(self, layer: int) -> bool:
        """See ExpertSource.wants_guess."""
        return self._ram.wants_guess()

    def guess(self, layer: int, ids: Tensor) -> None:
        """Read what apply() will probably need when nothing else is to be read; see ExpertSource.guess."""
        self._enter()
        # What most tokens choose, and of those the better choices, first.
        likeliest = Counter(ids.t().flatten().tolist()).most_common()
        keys = (layer * self._num_experts + expert for expert, _count in likeliest)
        vram = self._vram.get(layer)
        self._ram.guess(key for key in keys if vram is None or not vram.holds(key))
        self._torn = False

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertSource.apply. Raises CheckpointError or ReadError if an expert cannot be read."""
        self._enter()
        self._announce(layer, ids)
        begun = self._begun.pop(layer)
        if self._recorder is not None:
            self._recorder.layer(layer, ids.shape[0], begun.use)
        self._ram.order(begun.now.advance())
        streamed = begun.vram is not None and ids.shape[0] >= STREAMED_TOKENS
        part: Part | None = None
        if begun.vram is not None and not streamed:
            ready = self._ram.places(begun.now.waiting)
            part = begun.vram.begin(layer, begun.held, ready, hidden, ids, weights)
        self._ram.residency.learn()
        y = self._stream(begun, hidden, ids, weights) if streamed else self._compute(begun, part, hidden, ids, weights)
        self._bytes_computed += len(begun.use.experts) * self._expert_bytes
        # While a trace is recorded, the number of slots changes between steps only, so that it can be replayed.
        if self._recorder is None or layer == self._ram.layout.num_layers - 1:
            self._govern()
        self._torn = False
        return y

    def check(self) -> None:
        """Raises AssertionError if the tables contradict themselves or each other."""
        self._enter()
        self._torn = False
        self._ram.check()
        keys = self._ram.residency.keys()
        assert not any(tier.holds(key) for tier in self._tiers for key in keys), "in two tiers at once"

    def close(self) -> None:
        """Stop reading. Completes the trace."""
        self._ram.reader.close()
        if self._recorder is not None:
            counts = self._ram.residency.counts
            self._recorder.close(Counted(counts.hits, counts.misses))

    def _enter(self) -> None:
        """Something begins to change the tiers. Mends them if what did so last was interrupted or failed."""
        if self._torn:
            self._begun.clear()
            for tier in self._tiers:
                tier.mend()
            self._ram.mend(lambda key: any(tier.holds(key) for tier in self._tiers))
        self._torn = True

    def _announce(self, layer: int, ids: Tensor) -> None:
        use = use_of(ids)
        begun = self._begun.get(layer)
        if begun is not None and begun.use == use:
            return
        if begun is not None:
            self._let_go(begun)
        self._begin(layer, use, ids.shape[0])

    def _begin(self, layer: int, use: Use, tokens: int) -> None:
        vram = self._vram.get(layer)
        held = vram.pin(layer, use.experts, use.counts, tokens) if vram else []
        now = self._ram.residency.begin(layer, use.experts, use.counts, tokens, elsewhere=held)
        self._begun[layer] = _Begun(layer, use, vram, held, now)
        self._ram.order(now.advance())
        self._ram.guesses.judge(now.keys)

    def _compute(self, begun: _Begun, part: Part | None, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The sum of all terms, [T, D] float32."""
        y, now = torch.zeros(hidden.shape, dtype=torch.float32), begun.now
        while not now.done:
            run = self._ram.ready(now)
            mine = [key for key in run if part is None or key not in part.copied]
            started = begun.vram.clock() if begun.vram is not None else 0.0
            self._add(begun, mine, hidden, ids, weights, y)
            if begun.vram is not None and part is not None:
                begun.vram.costs.note("cpu", part.load, len(mine), begun.vram.clock() - started)
            self._release(run, begun, part, y)
        if part is not None and begun.vram is not None:
            begun.vram.end(part, y)
            begun.vram.unpin(begun.held)
            begun.vram.learn()
        return y

    def _stream(self, begun: _Begun, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The same for a step of many tokens, where experts pass through the accelerator."""
        vram, use = begun.vram, begun.use
        assert vram is not None, "there is one"
        y = torch.zeros(hidden.shape, dtype=torch.float32)

        def add(keys: Sequence[int]) -> None:
            self._add(begun, keys, hidden, ids, weights, y)

        terms = stream(begun.layer, begun.held, begun.now, (hidden, ids, weights), (self._ram, vram), add)
        if terms is not None:
            y += terms
        often = sorted(zip(use.counts, use.experts, strict=True), reverse=True)
        first = begun.layer * self._num_experts
        move_up([first + expert for _, expert in often if not vram.holds(first + expert)], self._ram, vram)
        vram.unpin(begun.held)
        vram.learn()
        return y

    def _add(
        self, begun: _Begun, keys: Sequence[int], hidden: Tensor, ids: Tensor, weights: Tensor, y: Tensor
    ) -> None:  # fmt: skip
        """The CPU's share."""
        experts = [key % self._num_experts for key in keys]
        if experts:
            some = ids if len(experts) == len(begun.use.experts) else only(ids, experts, self._num_experts)
            self._experts.add(begun.layer, experts, hidden, some, weights, y)

    def _release(self, run: Sequence[int], begun: _Begun, part: Part | None, y: Tensor) -> None:
        """What has been computed may be given up, or moves to VRAM."""
        vram = begun.vram
        if vram is not None and part is not None:
            if any(key in part.copied for key in run):
                vram.end(part, y)
            moved = {key: part.copied.pop(key) for key in run if key in part.copied}
            # Where copying is never the faster way, the hottest still have to get there.
            if not moved and (key := vram.candidate(run)) is not None:
                moved[key] = vram.load(self._ram.places([key])[key])
            for key, slot in moved.items():
                now_there = vram.settle(key, slot, self._ram.places([key])[key])
                if now_there != key:
                    self._ram.exchange(key, now_there)
        for _ in run:
            self._ram.order(begun.now.release())

    def _let_go(self, begun: _Begun) -> None:
        begun.now.abandon()
        if begun.vram is not None:
            begun.vram.unpin(begun.held)

    def _abandon(self) -> None:
        while self._begun:
            self._let_go(self._begun.popitem()[1])

    def _govern(self) -> None:
        """Give memory back, or take it again, as the governor wishes; nothing is pinned by this layer any more."""
        if self._governor is None:
            return
        capacity = self.capacity
        self._ram.resize(self._governor.wish(capacity))
        if self._recorder is not None and self.capacity != capacity:
            self._recorder.resized(self.capacity)
