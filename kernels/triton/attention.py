"""Shared-latent attention: a sliding window and compressed entries, keys that are the values, a sink for each head.

Keys are cut into parts that are attended to at the same time and put together afterwards, so that one query with a long
context keeps a whole GPU busy. Scores never leave the chip. MLA's absorbed form is the same kernel with a rotary part
in the keys that the values lack. Twins: reference.sparse_attention and latent_attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.depth import Depth
from localmoe.kernels.triton.dot import dot

# Heads of a program share the keys it reads. 16 is the least that the matrix units take.
_BLOCK_H, _BLOCK_E = 16, 32
# Keys of a part: fewer parts read less twice, more parts keep more of the GPU busy.
_PART = 512
_PROGRAMS = 512


@triton.jit
def _take(q, qr, keys, rest, bias, valid, m, total, acc, scale, HAS_REST: tl.constexpr, EXACT: tl.constexpr):
    """One block of keys [E, C] into the running softmax of [H, C] queries. bias: [E], -inf where hidden."""
    z = dot(q, tl.trans(keys), tl.zeros((q.shape[0], keys.shape[0]), dtype=tl.float32), EXACT)
    if HAS_REST:
        z = dot(qr, tl.trans(rest), z, EXACT)
    z = tl.where(valid[None, :], z * scale + bias[None, :], float("-inf"))
    highest = tl.maximum(m, tl.max(z, axis=1))
    # Nothing visible so far: any finite number will do.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp(z - base[:, None])
    shrink = tl.exp(m - base)
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None]
    acc = dot(p, keys, acc, EXACT)
    return highest, total, acc


@triton.jit
def _attend(
    q, window, mask, entries, bias, position, parts, stats, heads, width, rest, num_window, num_entries, per_query,
    scale, part_size, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REST: tl.constexpr, HAS_DEPTH: tl.constexpr,
    RATIO: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts [n, S, H, width] and stats [n, S, H, 2]: unnormalised sums, highest score and sum of weights of each part.

    Keys [num_window + num_entries, width + rest] are the window's, then the entries; per_query: rows between the
    entries of one query and the next, 0 if all share them. HAS_DEPTH: of both, only as many as Depth says."""
    if HAS_DEPTH:
        before = (tl.load(position) + 1).to(tl.int32)
        num_window = tl.minimum(before, num_window)
        if RATIO > 0:
            num_entries = before // RATIO
    query, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    row = width + rest
    of_head = q + (query * heads + head)[:, None] * row
    inside = (head < heads)[:, None] & (c < width)[None, :]
    queries = tl.load(of_head + c[None, :], mask=inside, other=0).to(tl.float32)
    queries_rest = queries
    if HAS_REST:
        inside_rest = (head < heads)[:, None] & (r < rest)[None, :]
        queries_rest = tl.load(of_head + width + r[None, :], mask=inside_rest, other=0).to(tl.float32)
    m = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_C), dtype=tl.float32)
    begin = split * part_size
    end = tl.minimum(begin + part_size, num_window + num_entries)
    for first in range(begin, end, BLOCK_E):
        at = (first + tl.arange(0, BLOCK_E)).to(tl.int64)
        valid = at < end
        near = valid & (at < num_window)
        far = valid & (at >= num_window)
        e = at - num_window
        # One load for both, or twice as much would be on its way in shared memory.
        key = tl.where(near, window + at * row, entries + (query * per_query + e) * row)[:, None]
        keys = tl.load(key + c[None, :], mask=valid[:, None] & (c < width)[None, :], other=0)
        keys_rest = keys
        if HAS_REST:
            keys_rest = tl.load(key + width + r[None, :], mask=valid[:, None] & (r < rest)[None, :], other=0)
        if HAS_MASK:
            valid = valid & (tl.load(mask + query * num_window + at, mask=near, other=1) != 0)
        extra = tl.zeros((BLOCK_E,), dtype=tl.float32)
        if HAS_BIAS:
            extra = tl.load(bias + query * num_entries + e, mask=far, other=0)
        m, total, acc = _take(
            queries, queries_rest, keys, keys_rest, extra, valid, m, total, acc, scale, HAS_REST, EXACT
        )
    to = (query * tl.num_programs(2) + split) * heads + head
    tl.store(parts + to[:, None] * width + c[None, :], acc, mask=inside)
    tl.store(stats + 2 * to, m, mask=head < heads)
    tl.store(stats + 2 * to + 1, total, mask=head < heads)


@triton.jit
def _merge(parts, stats, sink, out, heads, width, splits, HAS_SINK: tl.constexpr, BLOCK_C: tl.constexpr):
    """The parts of one query and head, and the sink, which has a weight and no value."""
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    m = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    if HAS_SINK:
        m = tl.load(sink + head).to(tl.float32)
        total += 1.0
    acc = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for split in range(splits):
        at = (query * splits + split) * heads + head
        here = tl.load(stats + 2 * at)
        highest = tl.maximum(m, here)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink, grow = tl.exp(m - base), tl.exp(here - base)
        total = total * shrink + tl.load(stats + 2 * at + 1) * grow
        acc = acc * shrink + tl.load(parts + at * width + c, mask=c < width, other=0) * grow
        m = highest
    tl.store(out + (query * heads + head) * width + c, acc / total, mask=c < width)


def _launch(
    q: Tensor, window: Tensor, mask: Tensor | None, entries: Tensor, bias: Tensor | None, sink: Tensor | None,
    width: int, scale: float, exact: bool, depth: Depth | None,
) -> Tensor:  # fmt: skip
    count, heads, row = q.shape
    if depth is not None and (count > 1 or mask is not None or bias is not None):
        raise ValueError(f"{count} queries with a depth, expected one, which sees everything up to it")
    if entries.dtype != window.dtype:
        raise ValueError(f"entries are {entries.dtype}, the window {window.dtype}, expected the same")
    shared = entries.dim() == 2
    num_window, num_entries = len(window), entries.shape[-2]
    keys = num_window + num_entries
    out = q.new_empty((count, heads, width), dtype=torch.float32)
    if not count:
        return out.to(q.dtype)
    head_blocks = triton.cdiv(heads, _BLOCK_H)
    wanted = max(_PROGRAMS // (count * head_blocks), 1)
    # In float32, a block of keys takes twice as much shared memory.
    block = _BLOCK_E // 2 if exact else _BLOCK_E
    part = triton.cdiv(max(triton.cdiv(keys, wanted), min(_PART, keys), 1), block) * block
    splits = max(triton.cdiv(keys, part), 1)
    parts = q.new_empty((count, splits, heads, width), dtype=torch.float32)
    stats = q.new_empty((count, splits, heads, 2), dtype=torch.float32)
    rest = row - width
    _attend[count, head_blocks, splits](
        q.contiguous(), window.contiguous(), q if mask is None else mask.contiguous().view(torch.uint8),
        entries.contiguous(), q if bias is None else bias.contiguous(), q if depth is None else depth.position,
        parts, stats, heads, width, rest, num_window, num_entries, 0 if shared else num_entries, scale, part,
        HAS_MASK=mask is not None, HAS_BIAS=bias is not None, HAS_REST=rest > 0, HAS_DEPTH=depth is not None,
        RATIO=0 if depth is None else depth.ratio, EXACT=exact, BLOCK_H=_BLOCK_H, BLOCK_E=block,
        BLOCK_C=triton.next_power_of_2(max(width, 16)), BLOCK_R=triton.next_power_of_2(max(rest, 16)), num_stages=2,
    )  # fmt: skip
    _merge[count, heads](
        parts, stats, q if sink is None else sink, out, heads, width, splits,
        HAS_SINK=sink is not None, BLOCK_C=triton.next_power_of_2(width),
    )  # fmt: skip
    return out.to(q.dtype)


def sparse_attention(
    q: Tensor,
    window: Tensor,
    window_mask: Tensor | None,
    entries: Tensor,
    entry_bias: Tensor | None,
    sink: Tensor,
    *,
    exact: bool = False,
    depth: Depth | None = None,
) -> Tensor:
    """See reference.sparse_attention. exact: products in float32, else in bfloat16 with float32 sums. depth: of one
    query, what it sees of window and entries, which are buffers then."""
    width = q.shape[-1]
    return _launch(q, window, window_mask, entries, entry_bias, sink, width, width**-0.5, exact, depth)


def latent_attention(
    q: Tensor, cache: Tensor, seen: Tensor | None, *, width: int, scale: float, exact: bool = False,
    depth: Depth | None = None,
) -> Tensor:  # fmt: skip
    """See reference.latent_attention. exact and depth: as in sparse_attention; a cache of one query's own rows is seen
    whole."""
    if cache.dim() == 2:
        # A window may be masked, entries may belong to a query.
        depth = None if depth is None else Depth(depth.position, 0)
        return _launch(q, cache, seen, cache[:0], None, None, width, scale, exact, depth)
    bias = None if seen is None else torch.zeros_like(seen, dtype=torch.float32).masked_fill_(~seen, float("-inf"))
    return _launch(q, cache.new_empty(0, cache.shape[-1]), None, cache, bias, None, width, scale, exact, None)
