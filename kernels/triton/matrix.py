"""Weights as the Triton kernels read them: the published bytes, and what tells the kernels how to.

Knows tensors; does not know files or names, nor Triton. Holds views: nothing is repacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# As load.py branches on them.
PLAIN, FP8_BLOCK, FP4, INT8, INT4, NF4 = range(6)
FORMATS = {"plain": PLAIN, "fp8_block": FP8_BLOCK, "fp4": FP4, "int8": INT8, "int4": INT4, "nf4": NF4}
_PER_BYTE = {FP4: 2, INT4: 2, NF4: 2}
# Columns that a kernel reads at once; every group of scales is a part of it.
BLOCK_K = 128


@dataclass(frozen=True)
class Matrix:
    """A [rows, cols] weight. data: float32, bfloat16 or float16 if plain, else uint8 in the layout of its format.

    scale: fp8_block [ceil(rows / 128), ceil(cols / 128)] float32, or uint8 (e8m0); fp4 [rows, cols / 32] uint8 (e8m0);
    int8 and int4 [rows, cols / group]; nf4 [rows, cols / group] float32. zero: uint8 like scale, or None for the middle
    of the range."""

    format: int
    rows: int
    cols: int
    data: Tensor
    scale: Tensor
    zero: Tensor
    group: int
    has_zero: bool

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, int],
        data: Tensor,
        scale: Tensor | None = None,
        *,
        zero: Tensor | None = None,
        group: int = 0,
    ) -> Matrix:
        """Raises ValueError for a format that is not known, or groups that do not divide the columns."""
        kind, group = _checked(name, shape[1], group)
        rows, cols = shape
        if kind != PLAIN:
            data = data.view(torch.uint8)
        if data.numel() * _PER_BYTE.get(kind, 1) != rows * cols:
            raise ValueError(f"{data.numel()} numbers or bytes for a matrix of {rows} x {cols}")
        if scale is not None and scale.dtype == torch.float8_e8m0fnu:
            scale = scale.view(torch.uint8)
        none = data if scale is None else scale
        return cls(kind, rows, cols, data, none, none if zero is None else zero, group, zero is not None)

    @classmethod
    def within(cls, name: str, shape: tuple[int, int], data: Tensor, scale: Tensor, *, group: int = 0) -> Matrix:
        """One of many that lie in a slab: data and scale are views of all of it. Raises ValueError as of()."""
        kind, group = _checked(name, shape[1], group)
        return cls(kind, *shape, data, scale, scale, group, has_zero=False)


def _checked(name: str, cols: int, group: int) -> tuple[int, int]:
    """The number of a format, and its groups."""
    if name not in FORMATS:
        raise ValueError(f"{name} is no format, expected one of {', '.join(FORMATS)}")
    kind = FORMATS[name]
    group = {PLAIN: BLOCK_K, FP8_BLOCK: BLOCK_K, FP4: 32}.get(kind, group)
    if kind not in (PLAIN, FP8_BLOCK) and (group < 1 or BLOCK_K % group or cols % group):
        raise ValueError(f"{cols} columns in groups of {group}, expected a divisor of {BLOCK_K} and of the columns")
    return kind, group
