"""Hyper-connections around a sublayer: what goes in, mixed and normed, in one launch; what comes out, in another.

Twins: reference.hyper_mix, hyper_collapse, rms_norm and hyper_expand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _enter(
    streams, fn, base, scale, norm, x, post, comb, width, rms_eps, eps, iterations,
    S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token. The streams are read twice: for the mixing weights, and for the sum of streams that they give."""
    token = tl.program_id(0).to(tl.int64)
    total: tl.constexpr = (2 + S) * S
    rows: tl.constexpr = triton.next_power_of_2(total)
    j = tl.arange(0, rows)
    mixed = tl.zeros((rows,), dtype=tl.float32)
    squares = 0.0
    length = S * width
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        v = tl.load(streams + token * length + at, mask=at < length, other=0).to(tl.float32)
        squares += tl.sum(v * v, axis=0)
        f = tl.load(fn + j[:, None] * length + at[None, :], mask=(j < total)[:, None] & (at < length)[None, :], other=0)
        mixed += tl.sum(f * v[None, :], axis=1)
    mixed = mixed * tl.rsqrt(squares / length + rms_eps)
    of = tl.where(j < S, tl.load(scale), tl.where(j < 2 * S, tl.load(scale + 1), tl.load(scale + 2)))
    mixed = mixed * of + tl.load(base + j, mask=j < total, other=0)
    gates = tl.sigmoid(mixed)
    s = tl.arange(0, S)
    # Sums that pick: registers cannot be indexed.
    pre = tl.sum(tl.where(j[None, :] == s[:, None], gates[None, :], 0.0), axis=1) + eps
    leave = 2 * tl.sum(tl.where(j[None, :] == s[:, None] + S, gates[None, :], 0.0), axis=1)
    tl.store(post + token * S + s, leave)
    # Sinkhorn on [S, S]: softmax over the row, one column step, then row and column in turn.
    cell = s[:, None] * S + s[None, :] + 2 * S
    c = tl.sum(tl.where(j[None, None, :] == cell[:, :, None], mixed[None, None, :], 0.0), axis=2)
    c = tl.exp(c - tl.max(c, axis=1)[:, None])
    c = c / tl.sum(c, axis=1)[:, None] + eps
    c = c / (tl.sum(c, axis=0)[None, :] + eps)
    for _ in range(iterations - 1):
        c = c / (tl.sum(c, axis=1)[:, None] + eps)
        c = c / (tl.sum(c, axis=0)[None, :] + eps)
    tl.store(comb + token * S * S + s[:, None] * S + s[None, :], c)
    squares = 0.0
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = (at < width)[None, :]
        v = tl.load(streams + token * length + s[:, None] * width + at[None, :], mask=inside, other=0).to(tl.float32)
        h = tl.sum(v * pre[:, None], axis=0).to(x.dtype.element_ty).to(tl.float32)
        squares += tl.sum(h * h, axis=0)
        tl.store(x + token * width + at, h, mask=at < width)
    # What other threads have written is read.
    tl.debug_barrier()
    factor = tl.rsqrt(squares / width + rms_eps)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        h = tl.load(x + token * width + at, mask=at < width, other=0).to(tl.float32)
        n = tl.load(norm + at, mask=at < width, other=0).to(tl.float32)
        tl.store(x + token * width + at, h * factor * n, mask=at < width)


def hyper_enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, *,
    iterations: int, norm_eps: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """streams [T, S, D] -> the sublayer's normed input [T, D], post [T, S] and comb [T, S, S] float32.

    S: a power of two. Weights as of reference.hyper_mix."""
    tokens, s, width = streams.shape
    if s & (s - 1):
        raise ValueError(f"{s} streams, expected a power of two")
    x = streams.new_empty((tokens, width))
    post = streams.new_empty((tokens, s), dtype=torch.float32)
    comb = streams.new_empty((tokens, s, s), dtype=torch.float32)
    if tokens:
        _enter[(tokens,)](
            streams.contiguous(), fn, base, scale, norm, x, post, comb, width, norm_eps, eps, iterations,
            S=s, BLOCK=min(triton.next_power_of_2(width), 256),
        )  # fmt: skip
    return x, post, comb


@triton.jit
def _leave(streams, y, post, comb, out, width, S: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    k = tl.arange(0, S)
    sublayer = tl.load(y + token * width + at, mask=inside, other=0).to(tl.float32)
    total = tl.load(post + token * S + k)[:, None] * sublayer[None, :]
    for j in range(S):
        v = tl.load(streams + (token * S + j) * width + at, mask=inside, other=0).to(tl.float32)
        total += tl.load(comb + (token * S + j) * S + k)[:, None] * v[None, :]
    tl.store(out + (token * S + k)[:, None] * width + at[None, :], total, mask=inside[None, :])


def hyper_expand(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See reference.hyper_expand: [T, S, D], [T, D], [T, S], [T, S, S] -> [T, S, D]."""
    tokens, s, width = streams.shape
    out = torch.empty_like(streams, memory_format=torch.contiguous_format)
    if tokens:
        block = min(triton.next_power_of_2(width), 512)
        _leave[tokens, triton.cdiv(width, block)](
            streams.contiguous(), y.contiguous(), post.contiguous(), comb.contiguous(), out, width, S=s, BLOCK=block
        )
    return out
