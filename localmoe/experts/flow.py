"""A layer of a step of many tokens: experts flow from RAM through the accelerator while the CPU computes some of them.

Nearly every expert is used, and for so many tokens that bringing it there costs less than computing it here. Each
crosses once. Which go which way is decided by what they cost, and spread evenly, so that both work all the time and
what comes from disk is shared too. Knows keys and places; does not know what an accelerator is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from localmoe.experts.passage import Passage
from localmoe.experts.ram import RamTier
from localmoe.experts.residency import Pass
from localmoe.experts.split import load_of
from localmoe.experts.vram import SPARE, VramTier

# More than sequences that decode together: a step with so many tokens reads a prompt.
STREAMED_TOKENS = 64

# Computes experts by the CPU, by their keys.
Add = Callable[[Sequence[int]], None]
# hidden, ids and weights.
Inputs = tuple[Tensor, Tensor, Tensor]


def stream(
    layer: int, held: Sequence[int], now: Pass, inputs: Inputs, tiers: tuple[RamTier, VramTier], add: Add
) -> Tensor | None:
    """Have a layer's experts computed, those that `add` is not told by the accelerator.

    held: keys of those that are there; now: of the others. Returns the accelerator's terms, None if it had none. After
    an error, tiers are to be mended."""
    flow = _Flow(layer, held, len(now.keys), inputs, tiers, add)
    while not now.done:
        flow.go_on(now)
    return flow.end()


class _Flow:
    """passing: of so many others, those that go to the accelerator."""

    def __init__(
        self, layer: int, held: Sequence[int], others: int, inputs: Inputs, tiers: tuple[RamTier, VramTier], add: Add
    ) -> None:
        (self._ram, self._vram), self._add = tiers, add
        self._held, self._others, self._seen, self._put = len(held), others, 0, 0
        hidden, ids, weights = inputs
        self._load = load_of(ids.numel(), len(held) + others)
        self._passing = self._vram.costs.through(self._load, len(held), others)
        self._ring = self._vram.lend(min(SPARE, self._passing))
        self._passage: Passage | None = None
        if held or self._passing:
            self._passage = self._vram.accelerator.stream(layer, self._ring, hidden, ids, weights)
        if held and self._passage is not None:
            self._passage.held(self._vram.slots(held))

    def go_on(self, now: Pass) -> None:
        """The next experts that are there."""
        run = self._ram.ready(now)
        through = [key for key in run if self._passes()]
        mine = [key for key in run if key not in through]
        # The CPU computes while the first are on their way; more than there are buffers for it would have to wait for.
        self._send(through[:SPARE])
        if mine:
            started = self._vram.clock()
            self._add(mine)
            self._vram.costs.note("cpu", self._load, len(mine), self._vram.clock() - started)
        self._send(through[SPARE:])
        for _ in run:
            self._ram.order(now.release())

    def end(self) -> Tensor | None:
        """The accelerator's terms."""
        if self._passage is None:
            return None
        terms, costs = self._passage.wait(), self._vram.costs
        costs.note("accelerator", self._load, self._held + self._put, self._passage.seconds)
        costs.note("pass", self._load, self._put, self._passage.copying)
        costs.note("stage", self._load, self._put, self._passage.staging)
        self._vram.take_back(self._ring)
        self._vram.hits += self._held
        self._vram.copies += self._put
        return terms

    def _passes(self) -> bool:
        """Whether the next one is among those that pass, which are as far from each other as can be."""
        before = self._seen * self._passing // self._others
        self._seen += 1
        return self._seen * self._passing // self._others > before

    def _send(self, keys: Sequence[int]) -> None:
        for key, place in self._ram.places(keys).items():
            assert self._passage is not None, "begun where something is to pass"
            self._passage.put(key % self._ram.layout.num_experts, place)
            self._put += 1


def move_up(keys: Sequence[int], ram: RamTier, vram: VramTier) -> None:
    """Between layers: what had better be in VRAM gets there, if it is still in RAM; more than one while there is room.

    keys: the best first."""
    there = ram.places(keys)
    for _ in range(SPARE):
        key = vram.candidate(list(there))
        if key is None:
            return
        place = there.pop(key)
        now_there = vram.settle(key, vram.load(place), place)
        if now_there != key:
            ram.exchange(key, now_there)
        if now_there is not None:
            return
