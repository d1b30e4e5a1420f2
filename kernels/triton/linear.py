"""x times the transpose of a packed weight: few rows at the speed of memory, many on the matrix units.

Its twin is torch's linear on the dequantized weight, for a block-diagonal one a product for each group. Products are
added up in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.dot import dot, stages
from localmoe.kernels.triton.load import load_weights
from localmoe.kernels.triton.matrix import BLOCK_K, Matrix

# Up to this many rows, weights are read once and multiplied in registers.
FEW_ROWS = 4
# Rows of the weight in a program. 16 when few programs would have work otherwise.
_ROWS_FEW, _ROWS_MANY = 16, 64
# Programs that keep a large GPU busy; the columns are split until there are as many.
_PROGRAMS = 512


@triton.jit
def _rows(block, rows, groups, BLOCK_N: tl.constexpr):
    """Of the weight: the group that a block of rows is of, the rows, and where those of the group end."""
    of_group = rows // groups
    blocks = tl.cdiv(of_group, BLOCK_N)
    group = block // blocks
    first = group * of_group + block % blocks * BLOCK_N
    return group, (first + tl.arange(0, BLOCK_N)).to(tl.int64), (group + 1) * of_group


@triton.jit
def _few(
    x, data, scale, zero, out, tokens, rows, cols, groups, per_split,
    T: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [splits, tokens, rows]: a part of the columns for each split. T: tokens, rounded up to a power of two."""
    group, row, end = _rows(tl.program_id(0), rows, groups, BLOCK_N)
    begin = tl.program_id(1) * per_split
    t = tl.arange(0, T)
    sums = tl.zeros((T, BLOCK_N), dtype=tl.float32)
    for first in range(begin, tl.minimum(begin + per_split, cols), BLOCK_K):
        w = load_weights(data, scale, zero, row, first, end, cols, FORMAT, GROUP, HAS_ZERO, BLOCK_K)
        column = first + tl.arange(0, BLOCK_K)
        inside = (t < tokens)[:, None] & (column < cols)[None, :]
        xs = tl.load(x + (t * groups + group)[:, None] * cols + column[None, :], mask=inside, other=0).to(tl.float32)
        sums += tl.sum(xs[:, None, :] * w[None, :, :], axis=2)
    to = out + (tl.program_id(1) * tokens + t)[:, None] * rows + row[None, :]
    tl.store(to, sums, mask=(t < tokens)[:, None] & (row < end)[None, :])


@triton.jit
def _many(
    x, data, scale, zero, out, tokens, rows, cols, groups,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    group, row, end = _rows(tl.program_id(1), rows, groups, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, cols, BLOCK_K):
        w = load_weights(data, scale, zero, row, first, end, cols, FORMAT, GROUP, HAS_ZERO, BLOCK_K)
        column = first + tl.arange(0, BLOCK_K)
        inside = (token < tokens)[:, None] & (column < cols)[None, :]
        xs = tl.load(x + (token * groups + group)[:, None] * cols + column[None, :], mask=inside, other=0)
        sums = dot(xs, tl.trans(w), sums, EXACT)
    inside = (token < tokens)[:, None] & (row < end)[None, :]
    tl.store(out + token[:, None] * rows + row[None, :], sums, mask=inside)


@triton.jit
def _add(parts, out, size, splits, BLOCK: tl.constexpr):
    """The parts of splits, in one order, so that the same x gives the same bits; an atomic sum would not."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(splits):
        total += tl.load(parts + at, mask=at < size, other=0)
        parts += size
    tl.store(out + at, total, mask=at < size)


@triton.jit
def _swiglu(gate, up, out, size, limit, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < size, other=0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0).to(tl.float32)
    # As torch's clamp; by default, the smaller of NaN and the limit is the limit.
    g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
    u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=at < size)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """See reference.swiglu: two of the same shape."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if gate.numel():
        _swiglu[(triton.cdiv(gate.numel(), 512),)](
            gate.contiguous(), up.contiguous(), out, gate.numel(), limit, BLOCK=512
        )
    return out


def linear(
    x: Tensor, weight: Matrix, groups: int = 1, *, exact: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x [T, cols] -> [T, rows] of a dtype; or x [T, groups, cols], of which group g is multiplied with the g-th of as
    many equal parts of the rows.

    exact: multiply in float32; else many rows are multiplied in bfloat16 (a few always in float32).
    Raises ValueError for an x of another shape, or rows that cannot be divided so."""
    expected = (weight.cols,) if groups == 1 and x.dim() == 2 else (groups, weight.cols)
    if x.shape[1:] != expected or weight.rows % groups:
        raise ValueError(f"x is {list(x.shape)}, expected rows of {groups} groups x {weight.cols} columns")
    tokens = len(x)
    if not tokens:
        return x.new_empty((0, weight.rows), dtype=dtype)
    how = {"FORMAT": weight.format, "GROUP": weight.group, "HAS_ZERO": weight.has_zero, "BLOCK_K": BLOCK_K}
    if tokens <= FEW_ROWS:
        return _linear_few(x.contiguous(), weight, groups, how, dtype)
    out = x.new_empty((tokens, weight.rows), dtype=dtype)
    block_m = 16 if tokens <= 16 else 64
    _many[triton.cdiv(tokens, block_m), _blocks(weight, groups, _ROWS_MANY)](
        x.contiguous(), weight.data, weight.scale, weight.zero, out, tokens, weight.rows, weight.cols, groups,
        EXACT=exact, BLOCK_M=block_m, BLOCK_N=_ROWS_MANY, **how, num_stages=stages(weight.data, exact=exact),
    )  # fmt: skip
    return out


def _blocks(weight: Matrix, groups: int, size: int) -> int:
    """Of rows, none of which has rows of two groups."""
    return int(groups * triton.cdiv(weight.rows // groups, size))


def _linear_few(x: Tensor, weight: Matrix, groups: int, how: dict[str, int | bool], dtype: torch.dtype) -> Tensor:
    tokens, cols = len(x), weight.cols
    blocks = _blocks(weight, groups, _ROWS_FEW)
    splits = max(min(_PROGRAMS // blocks, triton.cdiv(cols, BLOCK_K)), 1)
    per_split = triton.cdiv(triton.cdiv(cols, splits), BLOCK_K) * BLOCK_K
    splits = triton.cdiv(cols, per_split)
    out = x.new_empty((tokens, weight.rows), dtype=dtype)
    parts = out if splits == 1 else x.new_empty((splits, tokens, weight.rows), dtype=torch.float32)
    _few[blocks, splits](
        x, weight.data, weight.scale, weight.zero, parts, tokens, weight.rows, cols, groups, per_split,
        T=triton.next_power_of_2(tokens), BLOCK_N=_ROWS_FEW, **how,
    )  # fmt: skip
    if splits > 1:
        _add[(triton.cdiv(out.numel(), 256),)](parts, out, out.numel(), splits, BLOCK=256)
    return out
