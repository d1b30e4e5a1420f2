"""The routed experts of a layer: tokens grouped by expert, two products and a sum.

Experts lie in slots of one slab, where the pager has put them. Nothing here waits for the device: the number of tiles
is bounded by shapes, so that a decode step can be captured in a graph."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.dot import dot, stages
from localmoe.kernels.triton.groups import group
from localmoe.kernels.triton.load import load_weights
from localmoe.kernels.triton.matrix import BLOCK_K
from localmoe.kernels.triton.slab import Experts

_BLOCK_N = 64


@triton.jit
def _tile(tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a program has to do: expert, -1 for none; pairs, and which of them are there; rows of the weight."""
    tile = tiles + 3 * tl.program_id(0)
    pair = (tl.load(tile + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    return tl.load(tile), pair, pair < tl.load(tile + 2), row


@triton.jit
def _gate_up(
    x, token, tiles, w1, s1, z1, w3, s3, z3, data1, scale1, data3, scale3, hidden, cols, width, limit,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden [P, width] = silu(min(gate, limit)) * clamp(up), of the pairs of one tile."""
    expert, pair, valid, row = _tile(tiles, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    source = tl.load(token + pair, mask=valid, other=0).to(tl.int64)
    w1 += tl.load(data1 + expert)
    w3 += tl.load(data3 + expert)
    s1 += tl.load(scale1 + expert)
    s3 += tl.load(scale3 + expert)
    if HAS_ZERO:
        z1 += tl.load(scale1 + expert)
        z3 += tl.load(scale3 + expert)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, cols, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (column < cols)[None, :]
        xs = tl.load(x + source[:, None] * cols + column[None, :], mask=inside, other=0)
        a = load_weights(w1, s1, z1, row, first, width, cols, FORMAT, GROUP, HAS_ZERO, BLOCK_K)
        b = load_weights(w3, s3, z3, row, first, width, cols, FORMAT, GROUP, HAS_ZERO, BLOCK_K)
        gate = dot(xs, tl.trans(a), gate, EXACT)
        up = dot(xs, tl.trans(b), up, EXACT)
    # As torch's clamp; by default, the smaller of NaN and the limit is the limit.
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    inside = valid[:, None] & (row < width)[None, :]
    tl.store(hidden + pair[:, None] * width + row[None, :], gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _down(
    hidden, weight, tiles, w2, s2, z2, data2, scale2, terms, width, cols,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """terms [P, cols] = routing weight * (hidden times w2), of the pairs of one tile."""
    expert, pair, valid, row = _tile(tiles, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    w2 += tl.load(data2 + expert)
    s2 += tl.load(scale2 + expert)
    if HAS_ZERO:
        z2 += tl.load(scale2 + expert)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, width, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (column < width)[None, :]
        h = tl.load(hidden + pair[:, None] * width + column[None, :], mask=inside, other=0)
        w = load_weights(w2, s2, z2, row, first, cols, width, FORMAT, GROUP, HAS_ZERO, BLOCK_K)
        sums = dot(h, tl.trans(w), sums, EXACT)
    sums *= tl.load(weight + pair, mask=valid, other=0)[:, None]
    inside = valid[:, None] & (row < cols)[None, :]
    tl.store(terms + pair[:, None] * cols + row[None, :], sums, mask=inside)


@triton.jit
def _sum(terms, place, ids, out, cols, count, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, cols]: a token's terms, in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(TOP_K):
        expert = tl.load(ids + token * TOP_K + k)
        at = tl.load(place + token * TOP_K + k).to(tl.int64)
        # Of a choice that is not meant, nothing was written.
        chosen = (expert >= 0) & (expert < count)
        total += tl.where(chosen, tl.load(terms + at * cols + column, mask=column < cols, other=0), 0.0)
    tl.store(out + token * cols + column, total, mask=column < cols)


def experts(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, *, exact: bool = False) -> Tensor:
    """Sum over k of weights[t, k] * expert ids[t, k] (x[t]).

    x: [T, D]; ids: [T, K], -1 (or any other that is no expert's) for none; weights: [T, K] float32.
    Returns [T, D] float32. exact: as in linear()."""
    tokens, cols = x.shape
    top_k, count = ids.shape[1], len(experts.data_at[0])
    out = x.new_empty((tokens, cols), dtype=torch.float32)
    if not tokens:
        return out
    block = 16 if ids.numel() <= 1024 else 64
    w1, w2, w3, x = experts.w1, experts.w2, experts.w3, x.contiguous()
    groups = group(ids, weights, count, block)
    hidden = x.new_empty((ids.numel(), w1.rows), dtype=torch.float32)
    terms = x.new_empty((ids.numel(), cols), dtype=torch.float32)
    how = {"EXACT": exact, "BLOCK_M": block, "BLOCK_N": _BLOCK_N, "BLOCK_K": BLOCK_K}
    number = len(groups.tiles)
    _gate_up[number, triton.cdiv(w1.rows, _BLOCK_N)](
        x, groups.token, groups.tiles, w1.data, w1.scale, w1.zero, w3.data, w3.scale, w3.zero,
        experts.data_at[0], experts.scale_at[0], experts.data_at[2], experts.scale_at[2], hidden,
        cols, w1.rows, experts.limit, FORMAT=w1.format, GROUP=w1.group, HAS_ZERO=w1.has_zero, **how,
        num_stages=stages(w1.data, w3.data, exact=exact),
    )  # fmt: skip
    _down[number, triton.cdiv(cols, _BLOCK_N)](
        hidden, groups.weight, groups.tiles, w2.data, w2.scale, w2.zero, experts.data_at[1], experts.scale_at[1],
        terms, w1.rows, cols, FORMAT=w2.format, GROUP=w2.group, HAS_ZERO=w2.has_zero, **how,
        num_stages=stages(w2.data, exact=exact),
    )  # fmt: skip
    _sum[tokens, triton.cdiv(cols, 512)](
        terms, groups.place, ids.contiguous(), out, cols, count, TOP_K=top_k, BLOCK=512
    )  # fmt: skip
    return out
