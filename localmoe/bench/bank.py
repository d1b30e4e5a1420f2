"""Experts to time a kernel on: random codes in a format, each expert in one piece of memory, more than caches hold.

Knows packings as localmoe_cpu.h describes them; does not know models. Memory: `count` experts, allocated once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.bench.shapes import ExpertShape
from localmoe.bench.synthetic import fill, run_all, set_scale
from localmoe.kernels import native
from localmoe.kernels.codebooks import GROUP, ROW_BYTES
from localmoe.kernels.native import Experts, Matrix
from localmoe.memory import Arena

# Larger than any last-level cache that a machine for these models has.
WORKING_SET = 1_100_000_000
# Experts of the torch side: enough that caches do not hold them either.
TORCH_EXPERTS = 4
_LIMIT = 10.0


@dataclass(frozen=True)
class Packing:
    """A weight format: bits of a weight, dtype of its scales, and how many inputs and rows share one.

    unit: root mean square of random codes at a scale of one. per_row: what each row's scales begin with, in numbers."""

    bits: int
    unit: float
    scale: torch.dtype | None = None
    group: int = 1
    rows: int = 1
    per_row: int = 0

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // self.rows), self.per_row + -(-cols // self.group)


PACKINGS = {
    "fp4": Packing(4, 2.9, torch.uint8, 32),
    "int4": Packing(4, 4.6, torch.bfloat16, 128),
    "int8": Packing(8, 74.0, torch.bfloat16, 128),
    "fp8_block": Packing(8, 110.0, torch.float32, 128, 128),
    "bf16": Packing(16, 1.0),
    "nf4": Packing(4, 0.5, torch.float32, 64),
    "book3": Packing(3, 0.3, torch.uint8, GROUP, per_row=ROW_BYTES),
    "book2": Packing(2, 0.3, torch.uint8, GROUP, per_row=ROW_BYTES),
}


def matrix_bytes(format: str, rows: int, cols: int) -> tuple[int, int]:
    """Bytes of a packed matrix and of its scales."""
    packing = PACKINGS[format]
    scales = math.prod(packing.scale_shape(rows, cols)) * packing.scale.itemsize if packing.scale else 0
    return rows * cols * packing.bits // 8, scales


def expert_bytes(shape: ExpertShape, format: str) -> int:
    """Bytes of w1, w2 and w3 with their scales."""
    return sum(sum(matrix_bytes(format, *matrix)) for matrix in shape.matrices)


def pool_size(shape: ExpertShape) -> int:
    """How many experts the tokens of a prompt choose among, whatever the format: all of a layer, or as many as make a
    working set in FP4."""
    return min(shape.num_experts, _working_set(shape, "fp4"))


def bank_size(shape: ExpertShape, format: str) -> int:
    """How many experts a bank needs to be a working set and to hold the pool."""
    return max(_working_set(shape, format), pool_size(shape))


def _working_set(shape: ExpertShape, format: str) -> int:
    """A multiple of top_k, at least two of them."""
    return max(-(-WORKING_SET // (expert_bytes(shape, format) * shape.top_k)), 2) * shape.top_k


class Bank:
    """Experts of one shape and format, and the table by which the library knows them."""

    def __init__(self, shape: ExpertShape, format: str, count: int) -> None:
        self.shape, self.format = shape, format
        arena, noise, nbytes = Arena(), _noise(format), expert_bytes(shape, format)
        self.pieces = [arena.empty((nbytes,), torch.uint8) for _ in range(count)]
        run_all([(nbytes, partial(fill, piece, noise, i)) for i, piece in enumerate(self.pieces)])
        self.matrices = [self._carve(piece) for piece in self.pieces]
        self.table = Experts(self.matrices, _LIMIT)
        self._starts = itertools.cycle(range(0, count - shape.top_k + 1, shape.top_k))

    def rotate(self) -> list[int]:
        """Ids of the top_k experts that have not been used for longest."""
        start = next(self._starts)
        return list(range(start, start + self.shape.top_k))

    def _carve(self, piece: Tensor) -> tuple[Matrix, Matrix, Matrix]:
        found: list[Matrix] = []
        at = 0
        for rows, cols in self.shape.matrices:
            size, scale_size = matrix_bytes(self.format, rows, cols)
            data, scale = piece[at : at + size], piece[at + size : at + size + scale_size]
            found.append(_matrix(self.format, (rows, cols), data, scale))
            at += size + scale_size
        w1, w2, w3 = found
        return w1, w2, w3


def _noise(format: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if format == "bf16":
        # No scale follows: 1 / 64 keeps the sums over thousands of inputs near one.
        return (torch.randn(500_000, generator=generator) / 64).bfloat16()
    noise = torch.randint(256, (1_000_000,), generator=generator, dtype=torch.uint8)
    # Without this bit no e4m3 code is NaN.
    return noise & 0xF7 if format == "fp8_block" else noise


def _matrix(format: str, shape: tuple[int, int], data: Tensor, scale: Tensor) -> Matrix:
    packing = PACKINGS[format]
    if packing.scale is None:
        return native.plain_matrix(data.view(torch.bfloat16).view(shape))
    typed, exponent = scale.view(packing.scale), round(math.log2(shape[1] ** -0.5 / packing.unit))
    if packing.per_row:
        # The marks stay noise: every group has another table.
        rows = typed.view(packing.scale_shape(*shape))
        rows[:, :ROW_BYTES] = torch.tensor([2.0**exponent]).view(torch.uint8)
    else:
        set_scale(typed, exponent)
    return native.matrix(format, shape, data, typed, group=packing.group)


class TorchExperts:
    """The same products as torch computes them with bf16 weights: what a prompt costs without a kernel of our own."""

    def __init__(self, shape: ExpertShape, most_rows: int) -> None:
        arena, noise = Arena(), _noise("bf16")
        self._experts = [
            [arena.empty(matrix, torch.bfloat16) for matrix in shape.matrices] for _ in range(TORCH_EXPERTS)
        ]
        for number, weight in enumerate(itertools.chain(*self._experts)):
            fill(weight, noise, number)
        self._x = torch.ones(most_rows, shape.hidden_size, dtype=torch.bfloat16)
        self._next = itertools.cycle(self._experts)

    def run(self, rows_of: Sequence[int]) -> None:
        """One expert after the other: w1 and w3 on its rows, w2 on what w1 gave."""
        for rows in rows_of:
            w1, w2, w3 = next(self._next)
            hidden = F.linear(self._x[:rows], w1)
            F.linear(self._x[:rows], w3)
            F.linear(hidden, w2)

    def linear(self) -> None:
        """w1 of the next expert on all rows."""
        F.linear(self._x, next(self._next)[0])
