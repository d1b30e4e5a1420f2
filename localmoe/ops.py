"""The public ops: one name per op, whichever implementation runs. Shapes and sources are in each op's docstring.

Most have the torch reference only. library: the compiled kernels, or those of the device that the tensors are on; None
is the reference. Products with weights are methods of the weights (localmoe.weights)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from localmoe.device_ops import DeviceOps
from localmoe.kernels import reference
from localmoe.kernels.native import Library
from localmoe.kernels.reference import (
    choose_groups,
    fake_quant_fp8,
    half_rope,
    hyper_collapse,
    hyper_expand,
    hyper_head,
    hyper_mix,
    rope,
    rope_frequencies,
    route,
    router_scores,
    routing_weights,
    swiglu,
    yarn_frequencies,
)

__all__ = [
    "DeviceOps",
    "choose_groups",
    "expanded_attention",
    "fake_quant_fp8",
    "half_rope",
    "hyper_collapse",
    "hyper_expand",
    "hyper_head",
    "hyper_mix",
    "index_scores",
    "latent_attention",
    "norm_rope",
    "pool_overlapping",
    "pool_windows",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "route",
    "router_scores",
    "routing_weights",
    "select_top",
    "sparse_attention",
    "swiglu",
    "yarn_frequencies",
]

# Scores that are sorted whole: up to so many, finding the largest few first takes longer.
SORTED_WHOLE = 1024
# Queries attended to at once, if keys are expanded: of the last keys of so many, half are hidden from one on average.
# Measured with 16 heads and 512 queries: 64 and 128 are alike, 256 and 512 take 1.15 and 2 times as long.
EXPANDED_QUERIES = 128


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, library: Library | DeviceOps | None = None) -> Tensor:
    """See reference.rms_norm; compiled for float32."""
    if library is not None and not isinstance(library, Library):
        return library.rms_norm(x, weight, eps)
    if library is not None and x.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32):
        return library.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def norm_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float | None = None,
    library: Library | DeviceOps | None = None,
) -> Tensor:
    """rms_norm(x, weight, eps), left out where eps is None, then rope(..., cos, sin); compiled for float32."""
    if library is not None and not isinstance(library, Library):
        return library.norm_rope(x, cos, sin, weight=weight, eps=eps)
    parts = (x, cos, sin, x if weight is None else weight)
    if library is not None and cos.shape[0] == x.shape[0] and all(p.dtype == torch.float32 for p in parts):
        return library.norm_rope(x, cos, sin, weight=weight, eps=eps)
    return rope(x if eps is None else rms_norm(x, weight, eps), cos, sin)


def sparse_attention(
    q: Tensor,
    window: Tensor,
    window_mask: Tensor | None,
    entries: Tensor,
    entry_bias: Tensor | None,
    sink: Tensor,
    *,
    library: Library | DeviceOps | None = None,
) -> Tensor:
    """See reference.sparse_attention; compiled for a single query in float32."""
    if library is not None and not isinstance(library, Library):
        return library.sparse_attention(q, window, window_mask, entries, entry_bias, sink)
    parts = (q, window, entries, sink, sink if entry_bias is None else entry_bias)
    if library is None or len(q) != 1 or window_mask is not None or any(p.dtype != torch.float32 for p in parts):
        return reference.sparse_attention(q, window, window_mask, entries, entry_bias, sink)
    entries = entries[0] if entries.dim() == 3 else entries
    return library.attend(q[0], window, entries, None if entry_bias is None else entry_bias[0], sink)[None]


def latent_attention(
    q: Tensor,
    cache: Tensor,
    seen: Tensor | None,
    *,
    width: int,
    scale: float,
    library: Library | DeviceOps | None = None,
) -> Tensor:
    """See reference.latent_attention; compiled for a single query that sees all, in float32 or bfloat16."""
    if library is not None and not isinstance(library, Library):
        return library.latent_attention(q, cache, seen, width=width, scale=scale)
    known = q.dtype == cache.dtype and q.dtype in (torch.float32, torch.bfloat16)
    if library is None or q.shape[0] != 1 or cache.dim() != 2 or seen is not None or not known:
        return reference.latent_attention(q, cache, seen, width=width, scale=scale)
    return library.latent_attend(q[0].float(), cache, width=width, scale=scale)[None].to(q.dtype)


def expanded_attention(
    q: Tensor,
    cache: Tensor,
    expand: Callable[[Tensor], Tensor],
    *,
    width: int,
    first: int,
    scale: float,
    block: int = 512,
    library: Library | DeviceOps | None = None,
) -> Tensor:
    """See reference.expanded_attention; keys that are hidden from a whole block of queries are left out.

    Compiled for float32 where the CPU multiplies bf16, to which queries, keys, values and weights are then rounded; in
    float32 torch is as fast."""
    known = q.dtype == cache.dtype == torch.float32
    if isinstance(library, Library) and known and library.rounds_to_bf16:
        return _compiled_expanded_attention(q, cache, expand, width, first, scale, block, library)
    n, heads, dn = len(q), q.shape[1], q.shape[2] - (cache.shape[1] - width)
    # Powers of two: torch's exp is up to 30 times slower where it underflows, as nearly all of a long softmax does.
    queries = (q.float().transpose(0, 1) * (scale * math.log2(math.e))).split(EXPANDED_QUERIES, dim=1)
    blocks = [_Attended(each, first + i * EXPANDED_QUERIES) for i, each in enumerate(queries)]
    for at, made, rotated in _blocks_of_keys(cache, expand, width, first + n, block):
        expanded = made.float().transpose(0, 1)  # [H, m, dn + dv]
        keys = torch.cat((expanded[..., :dn], rotated.float().expand(heads, -1, -1)), dim=-1)
        for each in blocks[max(at - first, 0) // EXPANDED_QUERIES :]:
            each.add(at, keys, expanded[..., dn:])
    return torch.cat([each.out / each.total for each in blocks], dim=1).transpose(0, 1).to(q.dtype)


def _blocks_of_keys(
    cache: Tensor, expand: Callable[[Tensor], Tensor], width: int, end: int, block: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each block of cache rows before `end`: its first position, what is made of the latents, the rotated keys."""
    for at in range(0, end, block):
        rows = cache[at : min(at + block, end)]
        yield at, expand(rows[:, :width]), rows[:, width:]


def _compiled_expanded_attention(
    q: Tensor,
    cache: Tensor,
    expand: Callable[[Tensor], Tensor],
    width: int,
    first: int,
    scale: float,
    block: int,
    library: Library,
) -> Tensor:
    attended = None
    for _, expanded, rotated in _blocks_of_keys(cache, expand, width, first + len(q), block):
        if attended is None:
            value_width = expanded.shape[2] - (q.shape[2] - (cache.shape[1] - width))
            attended = library.expanded_attention(q, value_width=value_width, first=first, scale=scale)
        attended.add(expanded, rotated)
    assert attended is not None, "there is a query"
    return attended.out


def index_scores(q: Tensor, keys: Tensor, weights: Tensor, *, library: Library | DeviceOps | None = None) -> Tensor:
    """See reference.index_scores."""
    if library is None or isinstance(library, Library):
        return reference.index_scores(q, keys, weights)
    return library.index_scores(q, keys, weights)


def pool_windows(kv: Tensor, score: Tensor, *, library: Library | DeviceOps | None = None) -> Tensor:
    """See reference.pool_windows."""
    if library is None or isinstance(library, Library):
        return reference.pool_windows(kv, score)
    return library.pool_windows(kv, score)


def pool_overlapping(
    kv: Tensor,
    score: Tensor,
    previous: tuple[Tensor, Tensor] | None,
    *,
    library: Library | DeviceOps | None = None,
) -> Tensor:
    """See reference.pool_overlapping."""
    if library is None or isinstance(library, Library):
        return reference.pool_overlapping(kv, score, previous)
    return library.pool_overlapping(kv, score, previous)


class _Attended:
    """What a block of queries [H, n, d], the first of them at position `first`, has summed of the keys so far."""

    def __init__(self, queries: Tensor, first: int) -> None:
        self.queries, self.first, self.stop = queries, first, first + queries.shape[1]
        self.top = queries.new_full((*queries.shape[:2], 1), -math.inf)
        self.total, self.out = torch.zeros_like(self.top), queries.new_zeros(())

    def add(self, at: int, keys: Tensor, values: Tensor) -> None:
        """keys and values [H, m, ...] of the positions from `at` on, of which the last query sees one at least."""
        seen = min(keys.shape[1], self.stop - at)
        z = torch.bmm(self.queries, keys[:, :seen].transpose(1, 2))
        if at + seen > self.first + 1:
            positions = torch.arange(self.first, self.stop, device=z.device)
            hidden = torch.arange(at, at + seen, device=z.device) > positions[:, None]
            z = z.masked_fill_(hidden, -math.inf)
        higher = torch.maximum(self.top, z.amax(-1, keepdim=True))
        p, kept = z.sub_(higher).exp2_(), (self.top - higher).exp2()
        self.total = self.total * kept + p.sum(-1, keepdim=True)
        self.out = self.out * kept + torch.bmm(p, values[:, :seen])
        self.top = higher


def select_top(scores: Tensor, k: int) -> Tensor:
    """See reference.select_top; long rows are not sorted whole by the CPU, of which a prompt of 256K tokens would
    take hours."""
    n, width = scores.shape
    # Of twice as many groups as are wanted, the k largest maxima: none of the k largest scores is below the least.
    groups = 2 * k
    size = width // groups
    if size < 2 or scores.numel() <= SORTED_WHOLE or scores.device.type != "cpu":
        return reference.select_top(scores, k)
    maxima = scores[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    floor = maxima.topk(k, sorted=False).values.amin(1, keepdim=True)
    rows, columns = (scores >= floor).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=n)
    # Candidates side by side, in the order of their columns; NaN is none, so there may be fewer than k.
    few = scores.new_full((n, max(int(counts.max()), k)), -math.inf)
    column_of = columns.new_zeros(few.shape)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    few[rows, place], column_of[rows, place] = scores[rows, columns], columns
    chosen: Tensor = column_of.gather(1, reference.select_top(few, k))
    return chosen
