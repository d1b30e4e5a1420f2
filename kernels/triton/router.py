"""The router of a layer: scores, the choice and its weights in one launch.

Twins: reference.router_scores, choose_groups, route and routing_weights. Of scores that are NaN, the twin chooses
first, this kernel last; and all weights of a token that has one are NaN here."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Scoring = Literal["sqrtsoftplus", "sigmoid", "softmax"]
_SCORINGS = {"sqrtsoftplus": 0, "sigmoid": 1, "softmax": 2}


@triton.jit
def _highest(x):
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def _scores(z, there, SCORING: tl.constexpr):
    if SCORING == 0:
        return tl.sqrt(tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z))))
    if SCORING == 1:
        return tl.sigmoid(z)
    p = tl.exp(z - _highest(tl.where(there, z, float("-inf"))))
    p = tl.where(there, p, 0.0)
    return p / tl.sum(tl.sum(p, axis=1), axis=0)


@triton.jit
def _kept(ranked, group, groups, keep, BEST: tl.constexpr, G: tl.constexpr, S: tl.constexpr):
    """Whether a group [G, 1] is among those with the largest sums of their BEST largest."""
    i = tl.arange(0, S)[None, :]
    value = tl.zeros((G,), dtype=tl.float32)
    for _ in range(BEST):
        best = tl.max(ranked, axis=1)
        value += best
        first = tl.min(tl.where(ranked == best[:, None], i, S), axis=1)
        ranked = tl.where(i == first[:, None], float("-inf"), ranked)
    g = tl.arange(0, G)
    left = g < groups
    kept = g < 0
    for _ in range(keep):
        best = tl.max(tl.where(left, value, float("-inf")), axis=0)
        # Of equals, the first group.
        chosen = tl.min(tl.where(left & (value == best), g, G), axis=0)
        kept = kept | (g == chosen)
        left = left & (g != chosen)
    return kept[:, None]


@triton.jit
def _route(
    logits, bias, given, ids, weights, groups, size, keep, factor,
    SCORING: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, GIVEN: tl.constexpr,
    BEST: tl.constexpr, K: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One token: the largest of score + bias, K times. Experts lie as [G, S]: groups, each of `size`."""
    token = tl.program_id(0).to(tl.int64)
    group, i = tl.arange(0, G)[:, None], tl.arange(0, S)[None, :]
    e = group * size + i
    there = (group < groups) & (i < size)
    z = tl.load(logits + token * groups * size + e, mask=there, other=0).to(tl.float32)
    score = _scores(z, there, SCORING)
    ranked = score
    if HAS_BIAS:
        ranked = ranked + tl.load(bias + e, mask=there, other=0)
    # NaN equals nothing, so that it would never be found.
    ranked = tl.where(there & (ranked == ranked), ranked, float("-inf"))
    # Not a rank: an expert may have the lowest of its own.
    left = there
    if G > 1:
        left = left & _kept(ranked, group, groups, keep, BEST, G, S)
    total = 0.0
    for k in range(K):
        if GIVEN:
            chosen = tl.load(given + token * K + k).to(tl.int32)
        else:
            # Of equals, the smaller id.
            best = _highest(tl.where(left, ranked, float("-inf")))
            chosen = tl.min(tl.min(tl.where(left & (ranked == best), e, G * S * size), axis=1), axis=0)
        value = tl.sum(tl.sum(tl.where(there & (e == chosen), score, 0.0), axis=1), axis=0)
        total += value
        tl.store(ids + token * K + k, chosen.to(tl.int64))
        tl.store(weights + token * K + k, value)
        left = left & (e != chosen)
    if NORMALIZE:
        factor = factor / (total + 1e-20)
    # Whatever was chosen: nobody would notice otherwise.
    factor = tl.where(_highest((there & (score != score)).to(tl.int32)) > 0, float("nan"), factor)
    for k in range(K):
        tl.store(weights + token * K + k, tl.load(weights + token * K + k) * factor)


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scale: float,
    *,
    normalize: bool,
    scoring: Scoring = "sqrtsoftplus",
    groups: tuple[int, int, int] = (1, 1, 1),
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> expert ids [T, K] int64 and weights [T, K] float32, as the twins in turn.

    groups: how many, how many of them are kept, and of how many experts' scores the sum is taken to choose them.
    given [T, K]: the choice, if it is made already.
    Raises ValueError if there are fewer than top_k experts in the groups that are kept."""
    tokens, experts = logits.shape
    count, keep, best = groups
    size = experts // count
    if top_k > size * keep:
        raise ValueError(f"the best {top_k} of {size * keep} experts, expected at least as many")
    ids = torch.empty((tokens, top_k), dtype=torch.long, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            logits.contiguous(), logits if bias is None else bias, logits if given is None else given.contiguous(),
            ids, weights, count, size, keep, scale, SCORING=_SCORINGS[scoring], NORMALIZE=normalize,
            HAS_BIAS=bias is not None, GIVEN=given is not None, BEST=best, K=top_k,
            G=triton.next_power_of_2(count), S=triton.next_power_of_2(size),
        )  # fmt: skip
    return ids, weights
