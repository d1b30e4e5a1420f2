"""Experts in slots, as kernels compute them: compiled, or in torch.

Knows what a slot's bytes mean; does not know where they come from or which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from localmoe.backend import Backend
from localmoe.experts.layout import Kind, Matrix, Place
from localmoe.experts.resident import Expert
from localmoe.formats import QuantizedTensor
from localmoe.kernels import native
from localmoe.kernels.native import Mode, SlotTable
from localmoe.memory import SlotMemory
from localmoe.weights import Observer, Weight, bind_native, observed


def tensors_in(memory: SlotMemory, slot: int, kind: Kind, place: Place) -> list[Tensor | QuantizedTensor]:
    """w1, w2 and w3 of the expert in a slot. Raises FormatError for scales that no quantizer writes."""
    found: list[Tensor | QuantizedTensor] = []
    begins = iter(place.begins)
    for matrix in kind:
        parts = [memory.tensor(slot, next(begins), *part) for part in matrix.parts()]
        found.append(matrix.bind(parts))
    return found


class SlotExperts(Protocol):
    """Computes experts where they lie."""

    def put(self, layer: int, expert: int, slot: int, place: Place) -> None:
        """An expert's bytes are in a slot from now on."""
        ...

    def clear(self, layer: int, expert: int) -> None:
        """They are not any more."""
        ...

    def add(self, layer: int, experts: Sequence[int], hidden: Tensor, ids: Tensor, weights: Tensor, y: Tensor) -> None:
        """Add the weighted terms of these experts, ascending, to y.

        hidden [T, D]; ids [T, K], -1 for those that are not meant; weights [T, K]; y [T, D] float32."""
        ...


class TorchSlots:
    """By torch, one expert after the other."""

    def __init__(self, memory: SlotMemory, kinds: Sequence[Kind], limit: float, dtype: torch.dtype) -> None:
        """dtype: what plain matrices are computed in."""
        self._memory, self._kinds, self._limit, self._dtype = memory, kinds, limit, dtype
        self._experts: dict[tuple[int, int], list[Tensor | QuantizedTensor]] = {}

    def put(self, layer: int, expert: int, slot: int, place: Place) -> None:
        self._experts[layer, expert] = tensors_in(self._memory, slot, self._kinds[layer], place)

    def clear(self, layer: int, expert: int) -> None:
        self._experts.pop((layer, expert), None)

    def add(self, layer: int, experts: Sequence[int], hidden: Tensor, ids: Tensor, weights: Tensor, y: Tensor) -> None:
        for number in experts:
            tokens, nth = (ids == number).nonzero(as_tuple=True)
            w1, w2, w3 = self._weights(layer, number)
            terms = Expert(w1, w2, w3, self._limit)(hidden[tokens]).float() * weights[tokens, nth][:, None]
            y.index_add_(0, tokens, terms)

    def _weights(self, layer: int, number: int) -> list[Weight]:
        """w1, w2 and w3 as they are multiplied."""
        # Copied, because the last bit of torch's products depends on where in a cache line a matrix begins.
        stored = self._experts[layer, number]
        return [w.to(self._dtype, copy=True) if isinstance(w, Tensor) else w for w in stored]


class ObservedSlots(TorchSlots):
    """By torch or the C++ kernels, one product after the other, each shown its inputs before."""

    def __init__(
        self, memory: SlotMemory, kinds: Sequence[Kind], limit: float, dtype: torch.dtype, *, backend: Backend | None,
        observer: Observer, names: Callable[[int, int], tuple[str, str, str]],
    ) -> None:  # fmt: skip
        """names: of an expert's matrices, by layer and expert."""
        super().__init__(memory, kinds, limit, dtype)
        self._backend, self._observer, self._names = backend, observer, names

    def _weights(self, layer: int, number: int) -> list[Weight]:
        b = self._backend
        weights: Sequence[Weight] = (
            super()._weights(layer, number)
            if b is None
            else [bind_native(w, b.library, b.mode) for w in self._experts[layer, number]]
        )
        names = self._names(layer, number)
        return [observed(w, name, self._observer) for w, name in zip(weights, names, strict=True)]


class NativeSlots:
    """By the C++ kernels, in one call."""

    def __init__(
        self, memory: SlotMemory, kinds: Sequence[Kind], num_experts: int, limit: float, backend: Backend
    ) -> None:
        self._memory, self._library = memory, backend.library
        width = kinds[0][0].shape[1]
        self._tables = [SlotTable(num_experts, width, limit) for _ in kinds]
        self._fields = [[_fields(matrix) for matrix in kind] for kind in kinds]
        # As bind_native has it: what is stored in float32 is computed in it.
        plain = any(matrix.dtype == torch.float32 for kind in kinds for matrix in kind)
        self._mode: Mode = "strict" if plain else backend.mode

    def put(self, layer: int, expert: int, slot: int, place: Place) -> None:
        base = self._memory.address + slot * self._memory.slot_bytes
        begins = iter(place.begins)
        w1, w2, w3 = (
            native.Matrix(base + next(begins), base + next(begins) if fields.scale_type else None, None, *fields)
            for fields in self._fields[layer]
        )
        self._tables[layer].put(expert, (w1, w2, w3))

    def clear(self, layer: int, expert: int) -> None:
        self._tables[layer].clear(expert)

    def add(self, layer: int, experts: Sequence[int], hidden: Tensor, ids: Tensor, weights: Tensor, y: Tensor) -> None:
        self._library.experts(self._tables[layer], hidden.float(), ids, weights, mode=self._mode, out=y)


def _fields(matrix: Matrix) -> native.Fields:
    if matrix.format is None:
        return native.plain_fields(matrix.shape, matrix.dtype)
    assert matrix.scale_dtype is not None, "a packed matrix has scales"
    return native.packed_fields(matrix.format.packing, matrix.shape, matrix.scale_dtype, matrix.format.group)
