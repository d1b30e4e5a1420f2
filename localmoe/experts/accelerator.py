"""An accelerator for the VRAM tier: slots in a GPU's memory, computed by the Triton kernels.

On the CPU, where the kernels are interpreted, it is only there to be tested. Knows slots and bytes; does not know which
experts stay. Memory: the slots, on the device; page-locked, as many buffers as slots that experts pass through."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localmoe.errors import ResourceError
from localmoe.experts.layout import Kind, Layout, Place
from localmoe.experts.layout import Matrix as Stored
from localmoe.experts.passage import Passage
from localmoe.experts.queues import Queues, Span, on
from localmoe.experts.vram import SPARE, Accelerator, Copy, Running, only
from localmoe.kernels.triton.experts import experts
from localmoe.kernels.triton.matrix import FORMATS, Matrix
from localmoe.kernels.triton.slab import Experts
from localmoe.memory import SlotMemory

# Tokens computed at once of experts that pass through: their terms are the largest thing there is of a token.
_ROWS = 2048
# Memory is given back in so many pieces.
_PIECES = 8


class TritonAccelerator(Accelerator):
    """One device. Copies and computing are told to it one after the other; the caller goes on meanwhile."""

    def __init__(
        self, layout: Layout, host: SlotMemory, slots: int, device: torch.device, *, limit: float, exact: bool = False
    ) -> None:
        """host: where the RAM tier has its experts. limit: of the SwiGLU. exact: multiply in float32.

        Raises ResourceError for experts in a format that has no Triton kernel."""
        odd = next((_name(stored) for kind in layout.kinds for stored in kind if _name(stored) not in FORMATS), None)
        if odd is not None:
            raise ResourceError(f"experts are stored as {odd}, which is computed on the CPU only; leave --device out")
        self.slots = slots
        # Several pieces, so that one can be given back.
        self._piece = max(-(-slots // _PIECES), SPARE)
        self._layout, self._host, self._limit, self._device, self._exact = layout, host, limit, device, exact
        self._queues, self._buffers = Queues(device), list[Tensor]()
        sizes = [min(self._piece, slots - first) for first in range(0, slots, self._piece)]
        self._slabs = [torch.empty(size * layout.slot_bytes, dtype=torch.uint8, device=device) for size in sizes]

    def load(self, place: int, slot: int) -> Copy:
        """See Accelerator.load."""
        with on(self._device), Span(self._device) as span:
            self._bytes(slot).copy_(self._place(place), non_blocking=True)
        return span

    def finish(self) -> None:
        """See Accelerator.finish."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def store(self, slot: int, place: int) -> None:
        """See Accelerator.store."""
        self._place(place).copy_(self._bytes(slot))

    @property
    def part(self) -> int:
        """See Accelerator.part."""
        return self.slots - (len(self._slabs) - 1) * self._piece if len(self._slabs) > 1 else 0

    def move(self, slot: int, other: int) -> None:
        """See Accelerator.move."""
        with on(self._device):
            self._bytes(other).copy_(self._bytes(slot))

    def give_back(self) -> None:
        """See Accelerator.give_back."""
        self.finish()
        self.slots -= self.part
        self._slabs.pop()

    def begin(self, layer: int, slots: dict[int, int], hidden: Tensor, ids: Tensor, weights: Tensor) -> Running:
        """See Accelerator.begin."""
        table = self._table(layer, slots)
        with on(self._device), Span(self._device) as span:
            x, chosen, shares = map(self._queues.bring, (hidden, ids, weights))
            y = experts(table, x, chosen, shares, exact=self._exact)
        return _Running(y, span)

    def stream(self, layer: int, slots: Sequence[int], hidden: Tensor, ids: Tensor, weights: Tensor) -> Passage:
        """See Accelerator.stream."""
        while len(self._buffers) < len(slots):
            self._buffers.append(self._queues.buffer(self._layout.slot_bytes))
        x = self._queues.bring(hidden)
        with on(self._device):
            y = torch.zeros(hidden.shape, dtype=torch.float32, device=self._device)
        pairs = list(zip(slots, self._buffers, strict=False))
        compute = functools.partial(self._add, layer, x=x, ids=ids, weights=weights, y=y)
        return Passage(self._queues, pairs, (self._place, self._bytes), compute, y.cpu)

    def _add(self, layer: int, slots: dict[int, int], *, x: Tensor, ids: Tensor, weights: Tensor, y: Tensor) -> None:
        """Add the terms of the experts in these slots to y, of those tokens that chose any. x, y: on the device."""
        table = self._table(layer, slots)
        mine = only(ids, list(slots), self._layout.num_experts)
        for rows in (mine >= 0).any(1).nonzero()[:, 0].split(_ROWS):
            at, chosen, shares = map(self._queues.bring, (rows, mine[rows], weights[rows]))
            # No token twice, so the order in which they are added does not matter.
            y.index_add_(0, at, experts(table, x[at], chosen, shares, exact=self._exact))

    def _bytes(self, slot: int) -> Tensor:
        size, (piece, nth) = self._layout.slot_bytes, divmod(slot, self._piece)
        return self._slabs[piece][nth * size : (nth + 1) * size]

    def _begin_of(self, slot: int) -> int:
        """Bytes from the first slab to a slot, which kernels count from: of another allocation it may be any number."""
        piece, nth = divmod(slot, self._piece)
        return self._slabs[piece].data_ptr() - self._slabs[0].data_ptr() + nth * self._layout.slot_bytes

    def _place(self, place: int) -> Tensor:
        return self._host.tensor(place, 0, (self._layout.slot_bytes,), torch.uint8)

    def _table(self, layer: int, slots: dict[int, int]) -> Experts:
        """The experts of a layer where they lie in the slab; those without a slot are never asked for."""
        kind, count = self._layout.kinds[layer], self._layout.num_experts
        at = torch.zeros(len(_parts(kind)), count, dtype=torch.long)
        for expert, slot in slots.items():
            place: Place = self._layout.place(layer, expert)
            at[:, expert] = torch.tensor(place.begins) + self._begin_of(slot)
        at = self._queues.bring(at)
        matrices, data_at, scale_at, part = [], [], [], 0
        for stored in kind:
            data = self._slabs[0].view(_read_as(stored.dtype, packed=stored.format is not None))
            data_at.append(at[part] // data.element_size())
            part += 1
            scale = data
            if stored.scale_dtype is not None:
                scale = self._slabs[0].view(_read_as(stored.scale_dtype, packed=True))
                scale_at.append(at[part] // scale.element_size())
                part += 1
            else:
                scale_at.append(data_at[-1])
            matrices.append(Matrix.within(_name(stored), stored.shape, data, scale, group=_group(stored)))
        w1, w2, w3 = matrices
        return Experts(w1, w2, w3, tuple(data_at), tuple(scale_at), self._limit)  # type: ignore[arg-type]


def _parts(kind: Kind) -> list[Any]:
    return [part for matrix in kind for part in matrix.parts()]


def _name(stored: Stored) -> str:
    return "plain" if stored.format is None else stored.format.packing


def _group(stored: Stored) -> int:
    return 0 if stored.format is None else stored.format.group


def _read_as(dtype: torch.dtype, *, packed: bool) -> torch.dtype:
    """Bytes of one are read as bytes, whatever they mean."""
    return torch.uint8 if packed and dtype.itemsize == 1 else dtype


@dataclass
class _Running(Running):
    y: Tensor
    span: Span
    seconds: float = 0.0

    def wait(self) -> Tensor:
        """See Running.wait."""
        terms = self.y.cpu()
        self.seconds = self.span.seconds
        return terms
