"""The lightning indexer's scores, and the compressors' pooling. Twins: index_scores, pool_windows in reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.depth import Depth
from localmoe.kernels.triton.dot import dot

_BLOCK_E, _BLOCK_H = 64, 16


@triton.jit
def _index(
    q, keys, weights, position, out, heads, width, entries, HAS_DEPTH: tl.constexpr, RATIO: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [n, E]: keys are read once for all heads of a query. HAS_DEPTH: -inf for those beyond what Depth says."""
    query = tl.program_id(0).to(tl.int64)
    e = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (e < entries)[:, None] & (d < width)[None, :]
    k = tl.load(keys + e[:, None] * width + d[None, :], mask=inside, other=0).to(tl.float32)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        there = (head < heads)[:, None] & (d < width)[None, :]
        of_head = q + (query * heads + head)[:, None] * width
        queries = tl.load(of_head + d[None, :], mask=there, other=0).to(tl.float32)
        z = dot(k, tl.trans(queries), tl.zeros((BLOCK_E, BLOCK_H), dtype=tl.float32), EXACT)
        w = tl.load(weights + query * heads + head, mask=head < heads, other=0).to(tl.float32)
        # As torch's relu; by default, the larger of NaN and 0 is 0.
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total += tl.sum(z * w[None, :], axis=1)
    if HAS_DEPTH:
        total = tl.where(e < (tl.load(position) + 1) // RATIO, total, float("-inf"))
    tl.store(out + query * entries + e, total, mask=e < entries)


def index_scores(
    q: Tensor, keys: Tensor, weights: Tensor, *, exact: bool = False, depth: Depth | None = None
) -> Tensor:
    """See reference.index_scores: q [n, H, d], keys [E, d], weights [n, H] -> [n, E] float32.

    depth: of one query, how many of the keys there are; the others, of a buffer, score -inf."""
    if depth is not None and len(q) != 1:
        raise ValueError(f"{len(q)} queries with a depth, expected one")
    count, heads, width = q.shape
    out = q.new_empty((count, len(keys)), dtype=torch.float32)
    if not out.numel():
        return out
    _index[count, triton.cdiv(len(keys), _BLOCK_E)](
        q.contiguous(), keys.contiguous(), weights.contiguous(), q if depth is None else depth.position,
        out, heads, width, len(keys), HAS_DEPTH=depth is not None, RATIO=1 if depth is None else depth.ratio,
        EXACT=exact, BLOCK_E=_BLOCK_E, BLOCK_H=_BLOCK_H, BLOCK_D=triton.next_power_of_2(max(width, 16)),
    )  # fmt: skip
    return out


@triton.jit
def _pool(kv, score, out, rows, width, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr):
    """One window and some of its channels: a softmax over rows for each channel of its own."""
    window = tl.program_id(0).to(tl.int64)
    row, d = tl.arange(0, BLOCK_W), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < width)[None, :]
    at = (window * rows + row)[:, None] * width + d[None, :]
    s = tl.load(score + at, mask=inside, other=float("-inf"))
    highest = tl.max(s, axis=0)
    p = tl.exp(s - tl.where(d < width, highest, 0.0)[None, :])
    v = tl.load(kv + at, mask=inside, other=0)
    tl.store(out + window * width + d, tl.sum(p * v, axis=0) / tl.sum(p, axis=0), mask=d < width)


def pool_windows(kv: Tensor, score: Tensor) -> Tensor:
    """See reference.pool_windows: kv, score [W, rows, d] float32 -> [W, d]."""
    count, rows, width = kv.shape
    out = kv.new_empty((count, width))
    if out.numel():
        block = min(triton.next_power_of_2(width), 64)
        _pool[count, triton.cdiv(width, block)](
            kv.contiguous(), score.contiguous(), out, rows, width,
            BLOCK_W=triton.next_power_of_2(rows), BLOCK_D=block,
        )  # fmt: skip
    return out
