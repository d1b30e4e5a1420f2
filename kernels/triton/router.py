"""The score router of a layer: scores, the choice and its weights in one launch.

Twins: reference.router_scores, route and routing_weights. Of scores that are NaN, the twin chooses first, this kernel
last; and all weights of a token that has one are NaN here."""

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
    ranked = score + tl.load(bias + e, mask=e < experts, other=0)
    # NaN equals nothing, so that it would never be found.
    ranked = tl.where(ranked == ranked, ranked, float("-inf"))
    # Not a rank: an expert may have the lowest of its own.
    left = e < experts
    total = 0.0
    for k in range(K):
        # Of equals, the smaller id.
        best = tl.max(tl.where(left, ranked, float("-inf")), axis=0)
        chosen = tl.min(tl.where(left & (ranked == best), e, BLOCK), axis=0)
        value = tl.sum(tl.where(e == chosen, score, 0.0), axis=0)
        total += value
        tl.store(ids + token * K + k, chosen.to(tl.int64))
        tl.store(weights + token * K + k, value)
        left = left & (e != chosen)
    if NORMALIZE:
        factor = factor / (total + 1e-20)
    # Whatever was chosen: nobody would notice otherwise.
    factor = tl.where(tl.max((score != score).to(tl.int32), axis=0) > 0, float("nan"), factor)
    for k in range(K):
        tl.store(weights + token * K + k, tl.load(weights + token * K + k) * factor)


def route(logits: Tensor, bias: Tensor, top_k: int, scale: float, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> expert ids [T, K] int64 and weights [T, K] float32, as the three twins in turn.

    Raises ValueError if there are fewer than top_k experts."""
    tokens, experts = logits.shape
    if top_k > experts:
        raise ValueError(f"the best {top_k} of {experts} experts, expected at least as many")
    ids = torch.empty((tokens, top_k), dtype=torch.long, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            logits.contiguous(), bias, ids, weights, experts, scale,
            NORMALIZE=normalize, K=top_k, BLOCK=triton.next_power_of_2(experts),
        )  # fmt: skip
    return ids, weights
