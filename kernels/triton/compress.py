"""One token's row into a compressor's open rows and, when it closes their window, the window's entry into its pool.

One program for a token: whether a window closes is known to the device alone, so that the same launch does for every
position. Twin: reference_decode.append_entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.depth import Depth


@triton.jit
def _put(row, to, d, inside, width, OVERLAP: tl.constexpr):
    """Channels d of a row, which lie at both halves of it where windows overlap."""
    tl.store(to + d, tl.load(row + d, mask=inside, other=0), mask=inside)
    if OVERLAP:
        tl.store(to + width + d, tl.load(row + width + d, mask=inside, other=0), mask=inside)


@triton.jit
def _pooled(kv, score, d, inside, width, first, rows, OVERLAP: tl.constexpr):
    """The mean of channels d over `rows` open rows, each channel with a softmax of its own; rows from `first` on are
    this window's, which give their second half where windows overlap. 0 for channels that there are not."""
    stride = width * 2 if OVERLAP else width
    highest = tl.full(d.shape, float("-inf"), dtype=tl.float32)
    for row in range(rows):
        half = tl.where(row < first, 0, width) if OVERLAP else 0
        s = tl.load(score + row * stride + half + d, mask=inside, other=0)
        highest = tl.maximum(highest, s)
    total = tl.zeros(d.shape, dtype=tl.float32)
    mean = tl.zeros(d.shape, dtype=tl.float32)
    for row in range(rows):
        half = tl.where(row < first, 0, width) if OVERLAP else 0
        at = row * stride + half + d
        p = tl.exp(tl.load(score + at, mask=inside, other=0) - highest)
        mean += p * tl.load(kv + at, mask=inside, other=0)
        total += p
    return mean / total


@triton.jit
def _append(
    kv, score, open_kv, open_score, position, norm, cos, sin, pool, width, pairs, eps,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK: half of the width, rounded up; channels are taken as neighbours, which a rotation turns together."""
    at_token = tl.load(position)
    window = at_token // RATIO
    nth = (at_token % RATIO).to(tl.int32)
    # Before the rows of this window lie those of the one before, if it still needs them.
    first = tl.where(window > 0, RATIO, 0) if OVERLAP else 0
    half = tl.arange(0, BLOCK)
    d0, d1 = 2 * half, 2 * half + 1
    in0, in1 = d0 < width, d1 < width
    stride = width * 2 if OVERLAP else width
    to = (first + nth) * stride
    _put(kv, open_kv + to, d0, in0, width, OVERLAP)
    _put(kv, open_kv + to, d1, in1, width, OVERLAP)
    _put(score, open_score + to, d0, in0, width, OVERLAP)
    _put(score, open_score + to, d1, in1, width, OVERLAP)
    if nth == RATIO - 1:
        tl.debug_barrier()
        rows = first + RATIO
        even = _pooled(open_kv, open_score, d0, in0, width, first, rows, OVERLAP)
        odd = _pooled(open_kv, open_score, d1, in1, width, first, rows, OVERLAP)
        # Each step rounds as the twin's does.
        kind = pool.dtype.element_ty
        even, odd = even.to(kind).to(tl.float32), odd.to(kind).to(tl.float32)
        factor = tl.rsqrt((tl.sum(even * even, axis=0) + tl.sum(odd * odd, axis=0)) / width + eps)
        even = even * factor * tl.load(norm + d0, mask=in0, other=0).to(tl.float32)
        odd = odd * factor * tl.load(norm + d1, mask=in1, other=0).to(tl.float32)
        even, odd = even.to(kind).to(tl.float32), odd.to(kind).to(tl.float32)
        pair = half - (width // 2 - pairs)
        turned = (pair >= 0) & (pair < pairs)
        c = tl.load(cos + pair, mask=turned, other=1.0)
        s = tl.load(sin + pair, mask=turned, other=0.0)
        entry = pool + window * width
        tl.store(entry + d0, even * c - odd * s, mask=in0)
        tl.store(entry + d1, odd * c + even * s, mask=in1)
        if OVERLAP:
            # What is read of the window before must have been read by all.
            tl.debug_barrier()
            if window > 0:
                for row in range(RATIO):
                    _put(open_kv + (RATIO + row) * stride, open_kv + row * stride, d0, in0, width, OVERLAP)
                    _put(open_kv + (RATIO + row) * stride, open_kv + row * stride, d1, in1, width, OVERLAP)
                    _put(open_score + (RATIO + row) * stride, open_score + row * stride, d0, in0, width, OVERLAP)
                    _put(open_score + (RATIO + row) * stride, open_score + row * stride, d1, in1, width, OVERLAP)


def append_entry(
    kv: Tensor, score: Tensor, opened: tuple[Tensor, Tensor], depth: Depth, norm: Tensor, eps: float,
    turn: tuple[Tensor, Tensor], pool: Tensor,
) -> None:  # fmt: skip
    """See reference_decode.append_entry. Of a pool whose width is even."""
    width = pool.shape[1]
    overlap = kv.shape[-1] == 2 * width
    parts = kv, score, *opened
    if width % 2 or kv.shape[-1] not in (width, 2 * width):
        raise ValueError(f"rows of {kv.shape[-1]} for entries of {width}, expected an even number, once or twice")
    if any(part.dtype != torch.float32 or not part.is_contiguous() for part in parts) or not pool.is_contiguous():
        raise ValueError("rows are to be float32, and all contiguous")
    cos, sin = turn
    _append[(1,)](
        *parts, depth.position, norm, cos, sin, pool, width, cos.shape[-1], eps,
        RATIO=depth.ratio, OVERLAP=overlap, BLOCK=triton.next_power_of_2(width // 2),
    )  # fmt: skip
