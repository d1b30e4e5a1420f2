"""The score router of a layer: scores, the choice and its weights in one launch.

Twins: reference.router_scores, route and routing_weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route(logits, bias, ids, weights, experts, factor, NORMALIZE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """One token: the largest of score + bias, K times."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    z = tl.load(logits + token * experts + e, mask=e < experts, other=0).to(tl.float32)
    score = tl.sqrt(tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z))))
    ranked = tl.where(e < experts, score + tl.load(bias + e, mask=e < experts, other=0), float("-inf"))
    total = 0.0
    for k in range(K):
        # Of equals, the smaller id.
        best = tl.max(ranked, axis=0)
        chosen = tl.min(tl.where(ranked == best, e, BLOCK), axis=0)
        value = tl.sum(tl.where(e == chosen, score, 0.0), axis=0)
        total += value
        tl.store(ids + token * K + k, chosen.to(tl.int64))
        tl.store(weights + token * K + k, value)
        ranked = tl.where(e == chosen, float("-inf"), ranked)
    if NORMALIZE:
        factor = factor / (total + 1e-20)
    for k in range(K):
        tl.store(weights + token * K + k, tl.load(weights + token * K + k) * factor)


def route(logits: Tensor, bias: Tensor, top_k: int, scale: float, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> expert ids [T, K] int64 and weights [T, K] float32, as the three twins in turn."""
    tokens, experts = logits.shape
    ids = torch.empty((tokens, top_k), dtype=torch.long, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            logits.contiguous(), bias, ids, weights, experts, scale,
            NORMALIZE=normalize, K=top_k, BLOCK=triton.next_power_of_2(experts),
        )  # fmt: skip
    return ids, weights
