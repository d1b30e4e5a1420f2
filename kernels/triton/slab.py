"""A layer's experts as the Triton kernels read them: one slab for each of w1, w2 and w3, and where in it an expert is.

Knows tensors; does not know Triton. Memory: brought together, each expert is copied once, into what was allocated for
all of them at the beginning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.kernels.triton.matrix import PLAIN, Matrix


@dataclass(frozen=True)
class Experts:
    """Experts of one kind. w1, w2, w3: their matrices with data and scale as they lie in the first slot of the slab.

    data, scale offsets: [E] int64 each, in elements of the matrix's own tensors, for w1, w2 and w3. limit: of the
    SwiGLU."""

    w1: Matrix
    w2: Matrix
    w3: Matrix
    data_at: tuple[Tensor, Tensor, Tensor]
    scale_at: tuple[Tensor, Tensor, Tensor]
    limit: float

    @classmethod
    def of(
        cls,
        experts: Iterable[tuple[Matrix, Matrix, Matrix]],
        count: int,
        limit: float,
        device: torch.device | None = None,
    ) -> Experts:
        """So many experts that lie apart, copied one after the other to a device, by default where the first is.

        Raises ValueError if there are fewer, or they are not alike, or gate and up-projection are not."""
        slabs: list[_Slab] = []
        number = -1
        for number, expert in enumerate(experts):
            slabs = slabs or [_Slab(matrix, count, device or matrix.data.device) for matrix in expert]
            for slab, matrix in zip(slabs, expert, strict=True):
                slab.put(number, matrix)
        if not slabs or number + 1 != count:
            raise ValueError(f"{number + 1} experts found, expected {max(count, 1)}")
        if _packing(slabs[0].first) != _packing(slabs[2].first):
            raise ValueError("gate and up-projection are stored otherwise, expected both alike")
        w1, w2, w3 = (slab.matrix for slab in slabs)
        data_at, scale_at = zip(*(slab.offsets for slab in slabs), strict=True)
        return cls(w1, w2, w3, data_at, scale_at, limit)


def _packing(matrix: Matrix) -> tuple[int, int, bool]:
    """What a kernel is compiled for."""
    return matrix.format, matrix.group, matrix.has_zero


class _Slab:
    """One matrix of every expert."""

    def __init__(self, first: Matrix, count: int, device: torch.device) -> None:
        def room(tensor: Tensor) -> Tensor:
            return torch.empty((count, tensor.numel()), dtype=tensor.dtype, device=device)

        self.first, self._data = first, room(first.data)
        self._scale = self._data if first.format == PLAIN else room(first.scale)
        self._zero = room(first.zero) if first.has_zero else self._scale

    def put(self, number: int, matrix: Matrix) -> None:
        kinds = [(_packing(m), m.rows, m.cols, m.data.dtype, m.scale.dtype) for m in (self.first, matrix)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"expert {number} is stored otherwise than the first, expected all of a layer alike")
        self._data[number].copy_(matrix.data.reshape(-1))
        if matrix.format != PLAIN:
            self._scale[number].copy_(matrix.scale.reshape(-1))
        if matrix.has_zero:
            self._zero[number].copy_(matrix.zero.reshape(-1))

    @property
    def matrix(self) -> Matrix:
        m = self.first
        return Matrix(m.format, m.rows, m.cols, self._data, self._scale, self._zero, m.group, m.has_zero)

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """Where the data and the scales of each expert begin."""
        number = torch.arange(len(self._data), device=self._data.device)
        return number * self._data.shape[1], number * self._scale.shape[1]
