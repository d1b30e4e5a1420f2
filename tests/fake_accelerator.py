"""An accelerator that is not there: bytes are copied and experts computed by torch, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.experts.layout import Layout
from localmoe.experts.passage import Passage
from localmoe.experts.slots import TorchSlots
from localmoe.experts.vram import Accelerator, Copy, Running
from localmoe.memory import SlotMemory
from tests.late_queues import LateQueues


@dataclass
class Copied:
    seconds: float


@dataclass
class Finished(Running):
    terms: Tensor
    seconds: float

    def wait(self) -> Tensor:
        return self.terms


class FakeAccelerator(Accelerator):
    """seconds: of computing one expert here; copy_seconds: of bringing one here. passed: those that passed through."""

    def __init__(
        self,
        slots: int,
        layout: Layout,
        host: SlotMemory,
        limit: float,
        seconds: float = 0.1,
        copy_seconds: float = 1.0,
    ) -> None:
        self.slots, self.seconds, self.copy_seconds = slots, seconds, copy_seconds
        self._layout, self._host = layout, host
        self._memory = SlotMemory(slots, layout.slot_bytes)
        self._compute = TorchSlots(self._memory, layout.kinds, limit, torch.float32)
        # Told to be loaded, and not begun.
        self._late: list[tuple[int, int]] = []
        self.computed: list[tuple[int, int]] = []
        self.passed: list[tuple[int, int]] = []
        # Of the last layer that experts passed through for.
        self.queues = LateQueues()
        # Slots that are given back at once.
        self.piece = 2

    def load(self, place: int, slot: int) -> Copy:
        self._late.append((place, slot))
        return Copied(self.copy_seconds)

    def finish(self) -> None:
        while self.queues.step():
            pass
        self._arrive()

    def _arrive(self) -> None:
        for place, slot in self._late:
            self._memory.view(slot)[:] = self._host.view(place)
        self._late.clear()

    def store(self, slot: int, place: int) -> None:
        self._arrive()
        self._host.view(place)[:] = self._memory.view(slot)

    @property
    def part(self) -> int:
        return min(self.piece, self.slots - 1)

    def move(self, slot: int, other: int) -> None:
        self._memory.view(other)[:] = self._memory.view(slot)

    def give_back(self) -> None:
        self.slots -= self.part

    def begin(self, layer: int, slots: dict[int, int], hidden: Tensor, ids: Tensor, weights: Tensor) -> Running:
        self._arrive()
        y = torch.zeros(hidden.shape, dtype=torch.float32)
        self._add(layer, slots, hidden, ids, weights, y)
        self.computed += [(layer, expert) for expert in slots]
        return Finished(y, self.seconds * len(slots))

    def stream(self, layer: int, slots: Sequence[int], hidden: Tensor, ids: Tensor, weights: Tensor) -> Passage:
        self._arrive()
        y = torch.zeros(hidden.shape, dtype=torch.float32)
        hidden = hidden.clone()

        def compute(some: dict[int, int]) -> int:
            self._add(layer, some, hidden, ids, weights, y)
            self.passed += [(layer, expert) for expert in some]
            return len(some)

        def slot(number: int) -> Tensor:
            return self._memory.tensor(number, 0, (self._layout.slot_bytes,), torch.uint8)

        queues = self.queues = LateQueues(len(self.passed), (self.seconds, self.copy_seconds))
        buffers = [(number, queues.buffer(self._layout.slot_bytes)) for number in slots]
        return Passage(queues, buffers, (self.place, slot), compute, lambda: y, clock=lambda: 0.0)

    def place(self, number: int) -> Tensor:
        """Of RAM."""
        return self._host.tensor(number, 0, (self._layout.slot_bytes,), torch.uint8)

    def _add(
        self, layer: int, slots: dict[int, int], hidden: Tensor, ids: Tensor, weights: Tensor, y: Tensor
    ) -> None:  # fmt: skip
        for expert, slot in slots.items():
            self._compute.put(layer, expert, slot, self._layout.place(layer, expert))
        self._compute.add(layer, sorted(slots), hidden, ids, weights, y)
        for expert in slots:
            # Found again only through the slot it is said to be in.
            self._compute.clear(layer, expert)
