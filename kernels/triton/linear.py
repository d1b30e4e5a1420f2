"""x times the transpose of a packed weight: few rows at the speed of memory, many on the matrix units.

Its twin is torch's linear on the dequantized weight. Products are added up in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.dot import dot
from localmoe.kernels.triton.load import load_weights
from localmoe.kernels.triton.matrix import BLOCK_K, Matrix

# Up to this many rows, weights are read once and multiplied in registers.
FEW_ROWS = 4
# Rows of the weight in a program. 16 when few programs would have work otherwise.
_ROWS_FEW, _ROWS_MANY = 16, 64
# Programs that keep a large GPU busy; the columns are split until there are as many.
_PROGRAMS = 512


@triton.jit
def _few(
    x, data, scale, zero, out, rows, cols, per_split,
    T: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [splits, T, rows]: a part of the columns for each split. T: a power of two, at most FEW_ROWS."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    begin = tl.program_id(1) * per_split
    t = tl.arange(0, T)
    sums = tl.zeros((T, BLOCK_N), dtype=tl.float32)
    for first in range(begin, tl.minimum(begin + per_split, cols), BLOCK_K):
        w = load_weights(data, scale, zero, row, first, rows, cols, FORMAT, GROUP, HAS_ZERO, BLOCK_K)
        column = first + tl.arange(0, BLOCK_K)
        xs = tl.load(x + t[:, None] * cols + column[None, :], mask=(column < cols)[None, :], other=0).to(tl.float32)
        sums += tl.sum(xs[:, None, :] * w[None, :, :], axis=2)
    to = out + (tl.program_id(1) * T + t)[:, None] * rows + row[None, :]
    tl.store(to, sums, mask=(row < rows)[None, :])


@triton.jit
def _many(
    x, data, scale, zero, out, tokens, rows, cols,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, cols, BLOCK_K):
        w = load_weights(data, scale, zero, row, first, rows, cols, FORMAT, GROUP, HAS_ZERO, BLOCK_K)
        column = first + tl.arange(0, BLOCK_K)
        inside = (token < tokens)[:, None] & (column < cols)[None, :]
        xs = tl.load(x + token[:, None] * cols + column[None, :], mask=inside, other=0)
        sums = dot(xs, tl.trans(w), sums, EXACT)
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(out + token[:, None] * rows + row[None, :], sums, mask=inside)


def linear(x: Tensor, weight: Matrix, *, exact: bool = False) -> Tensor:
    """x [T, cols] -> [T, rows] float32.

    exact: multiply in float32; else many rows are multiplied in bfloat16 (a few always in float32)."""
    tokens, cols = x.shape
    if cols != weight.cols:
        raise ValueError(f"x has {cols} columns, the weight {weight.cols}")
    out = x.new_empty((tokens, weight.rows), dtype=torch.float32)
    if not tokens:
        return out
    x = x.contiguous()
    fields = (weight.data, weight.scale, weight.zero)
    how = {"FORMAT": weight.format, "GROUP": weight.group, "HAS_ZERO": weight.has_zero, "BLOCK_K": BLOCK_K}
    if tokens <= FEW_ROWS:
        return _linear_few(x, weight, how)
    block_m = 16 if tokens <= 16 else 64
    grid = (triton.cdiv(tokens, block_m), triton.cdiv(weight.rows, _ROWS_MANY))
    _many[grid](
        x, *fields, out, tokens, weight.rows, cols, EXACT=exact, BLOCK_M=block_m, BLOCK_N=_ROWS_MANY, **how
    )  # fmt: skip
    return out


def _linear_few(x: Tensor, weight: Matrix, how: dict[str, int | bool]) -> Tensor:
    tokens, cols = x.shape
    padded = triton.next_power_of_2(tokens)
    if padded != tokens:
        x = torch.cat((x, x.new_zeros(padded - tokens, cols)))
    blocks = triton.cdiv(weight.rows, _ROWS_FEW)
    splits = max(min(_PROGRAMS // blocks, triton.cdiv(cols, BLOCK_K)), 1)
    per_split = triton.cdiv(triton.cdiv(cols, splits), BLOCK_K) * BLOCK_K
    splits = triton.cdiv(cols, per_split)
    parts = x.new_empty((splits, padded, weight.rows), dtype=torch.float32)
    _few[blocks, splits](
        x, weight.data, weight.scale, weight.zero, parts, weight.rows, cols, per_split,
        T=padded, BLOCK_N=_ROWS_FEW, **how,
    )  # fmt: skip
    # In one order, so that the same x gives the same bits; an atomic sum would not.
    return parts.sum(0)[:tokens]
