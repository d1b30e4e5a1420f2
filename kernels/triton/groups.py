"""Pairs of token and expert, brought into order of expert: those of a decode step in one launch, many by torch.

Nothing here waits for the device: the number of tiles is bounded by shapes. Twin of the kernel: group_many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pairs that are counted against each other in one launch; sorting is some tens of them.
FEW_PAIRS = 256
_BLOCK = 32


@dataclass(frozen=True)
class Groups:
    """Pairs of token and expert in order of expert. token, weight: [P] of each pair. tiles [N, 3] int32: expert, first
    and last pair + 1 of each; expert -1 where there is none. place [T, K]: where each pair of a token has come to."""

    token: Tensor
    weight: Tensor
    tiles: Tensor
    place: Tensor


def group(ids: Tensor, weights: Tensor, num_experts: int, block: int) -> Groups:
    """Sort the pairs of a step. ids: [T, K], -1 for none; weights: [T, K] float32. block: pairs of a tile."""
    if 0 < ids.numel() <= FEW_PAIRS:
        return group_few(ids, weights, num_experts, block)
    return group_many(ids, weights, num_experts, block)


def group_many(ids: Tensor, weights: Tensor, num_experts: int, block: int) -> Groups:
    """See group()."""
    pairs = ids.numel()
    # To refuse an id that is too large would be to wait for it.
    flat = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids).flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
    ends, tiles = counts.cumsum(0), (counts + block - 1) // block
    tile_ends = tiles.cumsum(0)
    # As many as there can be: every expert with one more than whole tiles.
    number = torch.arange(min(pairs, triton.cdiv(pairs, block) + num_experts), device=ids.device)
    expert = torch.searchsorted(tile_ends, number, right=True)
    there = expert < num_experts
    known = expert.clamp(max=num_experts - 1)
    first = ends[known] - counts[known] + (number - tile_ends[known] + tiles[known]) * block
    last = torch.minimum(first + block, ends[known])
    table = torch.stack((torch.where(there, expert, -1), first, last), 1).int()
    place = torch.empty_like(order)
    place[order] = torch.arange(pairs, device=ids.device)
    return Groups((order // ids.shape[1]).int(), weights.flatten()[order], table, place.view(ids.shape).int())


@triton.jit
def _group(
    ids, weights, token, weight, tiles, place, pairs, top_k, experts, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of pairs: the place of each is how many come before it. size: pairs of a tile."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(ids + i, mask=i < pairs, other=-1)
    known = (own >= 0) & (own < experts)
    own = tl.where(known, own, experts)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    earlier = tl.zeros((BLOCK,), dtype=tl.int32)
    alike = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, pairs, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = tl.load(ids + j, mask=j < pairs, other=-1)
        other = tl.where((other >= 0) & (other < experts), other, experts)
        there = (j < pairs)[None, :]
        same = there & (other[None, :] == own[:, None])
        before += tl.sum((there & (other[None, :] < own[:, None])).to(tl.int32), axis=1)
        earlier += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), axis=1)
        alike += tl.sum(same.to(tl.int32), axis=1)
    at = before + earlier
    inside = i < pairs
    tl.store(place + i, at, mask=inside)
    tl.store(token + at, i // top_k, mask=inside)
    tl.store(weight + at, tl.load(weights + i, mask=inside, other=0), mask=inside)
    # A pair that begins a tile has the tile of its place; the others have none.
    begins = known & (earlier % size == 0)
    tl.store(tiles + 3 * at, tl.where(begins, own, -1).to(tl.int32), mask=inside)
    tl.store(tiles + 3 * at + 1, at, mask=inside)
    tl.store(tiles + 3 * at + 2, tl.minimum(at + size, before + alike), mask=inside)


def group_few(ids: Tensor, weights: Tensor, num_experts: int, block: int) -> Groups:
    """See group(); as many tiles as pairs. Takes the square of their number, one at least."""
    pairs = ids.numel()
    token, place = (torch.empty(pairs, dtype=torch.int32, device=ids.device) for _ in range(2))
    weight = torch.empty(pairs, dtype=torch.float32, device=ids.device)
    tiles = torch.empty((pairs, 3), dtype=torch.int32, device=ids.device)
    _group[(triton.cdiv(pairs, _BLOCK),)](
        ids.contiguous(), weights.contiguous(), token, weight, tiles, place, pairs, ids.shape[1], num_experts, block,
        BLOCK=_BLOCK,
    )  # fmt: skip
    return Groups(token, weight, tiles, place.view(ids.shape))
