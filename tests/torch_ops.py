"""A device's kernels by torch, for tests whose subject is not the kernels: plain weights in float32, and like Triton's
it neither waits for the device nor asks it for a position. The interpreter takes a hundred times as long."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from localmoe.kernels import reference
from localmoe.kernels.triton.depth import Depth
from localmoe.kernels.triton.matrix import Matrix
from localmoe.kernels.triton.slab import Experts


class TorchOps:
    """See localmoe.ops.DeviceOps."""

    exact = True

    rms_norm = staticmethod(reference.rms_norm)
    hyper_leave = staticmethod(reference.hyper_expand)
    pool_windows = staticmethod(reference.pool_windows)
    pool_overlapping = staticmethod(reference.pool_overlapping)
    swiglu = staticmethod(reference.swiglu)

    def norm_rope(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        return reference.rope(x if eps is None else reference.rms_norm(x, weight, eps), cos, sin)

    def sparse_attention(
        self, q: Tensor, window: Tensor, window_mask: Tensor | None, entries: Tensor, entry_bias: Tensor | None,
        sink: Tensor, *, depth: Depth | None = None,
    ) -> Tensor:  # fmt: skip
        if depth is not None:
            window_mask = _there(window, depth.position + 1)[None]
            window = torch.where(window_mask[0, :, None], window, 0)
            if depth.ratio:
                seen = _there(entries, (depth.position + 1) // depth.ratio)
                entries, entry_bias = torch.where(seen[:, None], entries, 0), _hide(seen)[None]
        return reference.sparse_attention(q, window, window_mask, entries, entry_bias, sink)

    def latent_attention(
        self, q: Tensor, cache: Tensor, seen: Tensor | None, *, width: int, scale: float, depth: Depth | None = None
    ) -> Tensor:
        if depth is not None:
            seen = _there(cache, depth.position + 1)[None]
            cache = torch.where(seen[0, :, None], cache, 0)
        return reference.latent_attention(q, cache, seen, width=width, scale=scale)

    def index_scores(self, q: Tensor, keys: Tensor, weights: Tensor, *, depth: Depth | None = None) -> Tensor:
        scores = reference.index_scores(q, keys, weights)
        if depth is None:
            return scores
        return torch.where(_there(keys, (depth.position + 1) // depth.ratio), scores, -math.inf)

    def append_entry(
        self, kv: Tensor, score: Tensor, opened: tuple[Tensor, Tensor], depth: Depth, norm: Tensor, eps: float,
        turn: tuple[Tensor, Tensor], pool: Tensor,
    ) -> None:  # fmt: skip
        m, overlap = depth.ratio, kv.shape[-1] == 2 * pool.shape[1]
        window, nth = depth.position // m, depth.position % m
        later = window > 0 if overlap else window < 0
        first = later.long() * m
        for rows, row in zip(opened, (kv, score), strict=True):
            rows.index_copy_(0, first + nth, row)
        now = [rows[first + torch.arange(m, device=rows.device)][None] for rows in opened]
        before = opened[0][:m], torch.where(later, opened[1][:m], -math.inf)
        pooled = reference.pool_overlapping(*now, before) if overlap else reference.pool_windows(*now)
        entry = reference.rope(reference.rms_norm(pooled.to(pool.dtype), norm, eps), *turn)
        closes, at = nth == m - 1, window.clamp(max=len(pool) - 1)
        pool.index_copy_(0, at, torch.where(closes, entry, pool[at]))
        if overlap:
            for rows in opened:
                rows[:m] = torch.where(closes & later, rows[m:], rows[:m])

    def hyper_enter(
        self, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, streams: Tensor, *, norm_eps: float, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, comb = reference.hyper_mix(streams, fn, base, scale, norm_eps=norm_eps, **options)
        return reference.rms_norm(reference.hyper_collapse(streams, pre), norm, norm_eps), post, comb

    def linear(
        self, x: Tensor, matrix: Matrix, groups: int = 1, *, exact: bool = False, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        weight = matrix.data.view(groups, matrix.rows // groups, matrix.cols)
        return torch.einsum("tgc,grc->tgr", x.float().view(len(x), groups, -1), weight).flatten(1).to(dtype)

    def route(
        self, logits: Tensor, bias: Tensor | None, top_k: int, scale: float, *, normalize: bool, scoring: str,
        groups: tuple[int, int, int] = (1, 1, 1), given: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        how = {"sqrtsoftplus": reference.router_scores, "sigmoid": torch.sigmoid}
        scores = logits.softmax(-1) if scoring == "softmax" else how[scoring](logits)
        choosing = scores if bias is None else scores + bias
        if groups[0] > 1:
            choosing = reference.choose_groups(choosing, *groups)
        ids = reference.select_top(choosing, top_k) if given is None else given
        return ids, reference.routing_weights(scores, ids, scale, normalize=normalize)

    def experts(self, table: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every expert for every token, most of them with a weight of 0."""
        w1, w2, w3 = (m.data.view(-1, m.rows, m.cols) for m in (table.w1, table.w2, table.w3))
        y = torch.zeros_like(x, dtype=torch.float32)
        for expert in range(len(w1)):
            hidden = reference.swiglu(x @ w1[expert].t(), x @ w3[expert].t(), table.limit)
            y = y + (weights * (ids == expert)).sum(1, keepdim=True) * (hidden @ w2[expert].t())
        return y


def _there(rows: Tensor, count: Tensor) -> Tensor:
    """[len(rows)] bool: the first `count` of them."""
    return torch.arange(len(rows), device=rows.device) < count


def _hide(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)
