"""An accelerator that is not there: bytes are copied and experts computed by torch, in virtual time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.experts.layout import Layout
from localmoe.experts.slots import TorchSlots
from localmoe.experts.vram import Accelerator, Copy, Running
from localmoe.memory import SlotMemory


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
    """seconds: of computing one expert here; copy_seconds: of bringing one here."""

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
        self.computed: list[tuple[int, int]] = []

    def load(self, place: int, slot: int) -> Copy:
        self._memory.view(slot)[:] = self._host.view(place)
        return Copied(self.copy_seconds)

    def finish(self) -> None:
        """Copies are made at once."""

    def store(self, slot: int, place: int) -> None:
        self._host.view(place)[:] = self._memory.view(slot)

    def begin(self, layer: int, slots: dict[int, int], hidden: Tensor, ids: Tensor, weights: Tensor) -> Running:
        y = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert, slot in slots.items():
            self._compute.put(layer, expert, slot, self._layout.place(layer, expert))
        self._compute.add(layer, sorted(slots), hidden, ids, weights, y)
        for expert in slots:
            # Found again only through the slot it is said to be in.
            self._compute.clear(layer, expert)
        self.computed += [(layer, expert) for expert in slots]
        return Finished(y, self.seconds * len(slots))
