"""Rounding with scales that are searched for: to integers, codebooks, nf4 and FP4.

These are the specification of lm_round and its like in the compiled kernels, with the same bits: sums are added up in
their order. Knows tensors only. Memory: some tens of times the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from localmoe.kernels.codebooks import GROUP, LEVELS, STEPS, packed
from localmoe.kernels.codecs import NF4_BLOCK, NF4_LEVELS, decode_e8m0, dequantize_fp4, fp4_values

# Of a group's scale, how many steps below the smallest that reaches its largest number are tried: tables have levels
# up to 1.5 times the scale, and on noise no other was the best for one group in a hundred.
_TRIED_SCALES = 3


def round_groups(
    weight: Tensor, importance: Tensor, bits: int, group: int, shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Round a matrix to integers with a bf16 scale per `group` inputs of a row: the best of those that are tried.

    weight: [rows, cols] float32, finite; importance: of each input's error squared, [cols] float32, not negative.
    shares: of the scale that just reaches a group's largest number; a smaller one
    cuts off the largest and rounds the others better. Returns codes uint8 [rows, cols * bits / 8], as
    codecs.dequantize_int reads them without zero points, and scales bfloat16 [rows, cols / group]."""
    groups = weight.unflatten(-1, (-1, group))
    middle = 1 << (bits - 1)
    # 1. the scale that reaches the largest number
    largest = groups.abs().amax(-1)
    reach, factor = largest / (middle - 1), exponent_away(largest)
    groups = groups * factor[..., None]
    candidates = [(reach * share).bfloat16() for share in shares]
    candidates = [torch.where(scale > 0, scale, torch.ones_like(scale)) for scale in candidates]
    # 2. of the shares of it, the first with the least error
    least, best = torch.full_like(reach, math.inf), candidates[0]
    for scale in candidates:
        step = (scale.float() * factor)[..., None]
        off = (groups * (1 / step)).round().clamp(-middle, middle - 1) * step - groups
        error = sum_of_lanes(off * off * importance.unflatten(-1, (-1, group)))
        least, best = torch.minimum(error, least), torch.where(error < least, scale, best)
    # 3. the codes
    inverse = 1 / (best.float() * factor)[..., None]
    codes = ((groups * inverse).round().clamp(-middle, middle - 1) + middle).flatten(-2).to(torch.uint8)
    return (codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous(), best.contiguous()


def round_books(weight: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a matrix to codebooks: for each group the table and scale with the least sum of importance * error squared.

    weight: [rows, cols] float32, finite, cols a multiple of 32; importance: [cols] float32, not negative.
    Returns codes and marks as dequantize_book reads them. The specification of the compiled kernel."""
    groups = weight.unflatten(-1, (-1, GROUP))
    row = weight.abs().amax(-1, keepdim=True)
    row = torch.where(row > 0, row, torch.ones_like(row))
    largest = groups.abs().amax(-1)
    # 1. the smallest scale that reaches the largest number of the group; this one and the next are tried
    first = (row * (80 * STEPS[1:])).unsqueeze(-2).ge(largest[..., None]).sum(-1)
    least = torch.full_like(largest, torch.inf)
    best = torch.zeros_like(first)
    factor = exponent_away(largest)[..., None]
    for step in range(len(STEPS)):
        tried = (step >= first) & (step < first + _TRIED_SCALES)
        scale = (row * STEPS[step])[..., None]
        for number, levels in enumerate(LEVELS[bits]):
            # 2. the sum of what each number is away from the level nearest to it
            off = (groups[..., None] - levels * scale[..., None]).abs().amin(-1) * factor
            error = sum_of_lanes(off * off * importance.unflatten(-1, (-1, GROUP)))
            better = tried & (error < least)
            least = torch.where(better, error, least)
            best = torch.where(better, step << 5 | number, best)
    # 3. the nearest levels, the lower of two that are equally near
    scale = row * STEPS[best >> 5]
    levels = (LEVELS[bits][best & 31] * scale[..., None])[..., None, :]
    nearest = (groups[..., None] - levels).abs().argmin(-1).flatten(-2)
    return packed(nearest, bits), torch.cat((row.view(torch.uint8), best.to(torch.uint8)), -1)


def round_books_fp4(data: Tensor, exponents: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The same of an FP4 matrix, as codecs.dequantize_fp4 reads it: its groups have sixteen numbers, so the importance
    of each number is added up first. Where two choices are all but equally good, another may be taken."""
    codes = torch.stack((data & 15, data >> 4), dim=-1).view(*exponents.shape, GROUP).long()
    unit = decode_e8m0(exponents)
    magnitudes = (fp4_values(codes) * unit[..., None]).abs()
    largest = magnitudes.amax(-1)
    row = largest.amax(-1, keepdim=True)
    row = torch.where(row > 0, row, torch.ones_like(row))
    # 1. the importance of each of the sixteen numbers, input by input
    weights = torch.zeros(*exponents.shape, 16)
    given = importance.unflatten(-1, (-1, GROUP)).expand(len(data), -1, -1)
    for i in range(GROUP):
        weights.scatter_add_(-1, codes[..., i : i + 1], given[..., i : i + 1])
    # 2. the error of each table and scale, in units of the FP4 scale
    first = (row * (80 * STEPS[1:])).unsqueeze(-2).ge(largest[..., None]).sum(-1)
    least, best = torch.full_like(largest, torch.inf), torch.zeros_like(first)
    numbers = fp4_values(torch.arange(16))
    for step in range(len(STEPS)):
        tried = (step >= first) & (step < first + _TRIED_SCALES)
        scale = (row * STEPS[step] / unit).clamp(max=2.0**20)
        for number, levels in enumerate(LEVELS[bits]):
            off = (numbers[:, None] - (levels * scale[..., None])[..., None, :]).abs().amin(-1)
            squares = (weights * (off * off)).unbind(-1)
            error = squares[0]
            for square in squares[1:]:
                error = error + square
            better = tried & (error < least)
            least, best = torch.where(better, error, least), torch.where(better, step << 5 | number, best)
    # 3. the levels nearest to the sixteen numbers
    scale = (row * STEPS[best >> 5] / unit).clamp(max=2.0**20)
    levels = (LEVELS[bits][best & 31] * scale[..., None])[..., None, :]
    nearest = (numbers[:, None] - levels).abs().argmin(-1).gather(-1, codes).flatten(-2)
    return packed(nearest, bits), torch.cat((row.view(torch.uint8), best.to(torch.uint8)), -1)


def exponent_away(largest: Tensor) -> Tensor:
    """The power of two that brings a number to about 1, exactly: squares of numbers far from it leave float32."""
    exponent = largest.contiguous().view(torch.int32) >> 23
    return ((254 - exponent).clamp(min=1) << 23).view(torch.float32)


def sum_of_lanes(x: Tensor) -> Tensor:
    """The sum of the last dimension in the order of the compiled kernels, so that both have the same bits: sixteen
    lanes, then lane i + lane i + 8, + 4, + 2, + 1."""
    rows = x.unflatten(-1, (-1, 16)).unbind(-2)
    lanes: Tensor = rows[0]
    for row in rows[1:]:
        lanes = lanes + row
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    total: Tensor = lanes[..., 0]
    return total


def round_levels(weight: Tensor, importance: Tensor, levels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to levels times a scale per group: of some scales the first with the least error.

    weight, importance: as round_groups has them; levels: [L] float32; candidates: [count, rows, groups] float32.
    Returns the number of each group's scale, uint8 [rows, groups], and of each input's level, uint8 [rows, cols], the
    first of two that are equally near. The specification of the compiled kernel."""
    rows, cols = weight.shape
    groups = weight.unflatten(-1, (candidates.shape[-1], -1))
    weights = importance.unflatten(-1, (candidates.shape[-1], -1))
    factor = exponent_away(groups.abs().amax(-1))[..., None]
    best = torch.zeros(candidates.shape[1:], dtype=torch.uint8)
    least = torch.full(candidates.shape[1:], torch.inf)
    for number, scale in enumerate(candidates):
        off = (groups[..., None] - (levels * scale[..., None])[..., None, :]).abs().amin(-1) * factor
        error = sum_of_lanes(off * off * weights)
        best = torch.where(error < least, number, best)
        least = torch.minimum(error, least)
    scale = candidates.gather(0, best.long()[None])[0]
    nearest = (groups[..., None] - (levels * scale[..., None])[..., None, :]).abs().argmin(-1)
    return best, nearest.view(rows, cols).to(torch.uint8)


def round_nf4(weight: Tensor, importance: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Round a matrix to nf4: the scale of a group is the best of some shares of its largest magnitude.

    weight, importance: as round_groups has them, cols a multiple of 64. Returns codes and scales as
    codecs.dequantize_nf4 reads them."""
    largest = weight.unflatten(-1, (-1, NF4_BLOCK)).abs().amax(-1)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    candidates = torch.stack([largest * share for share in shares])
    chosen, codes = round_levels(weight, importance, NF4_LEVELS, candidates)
    return codes[..., 0::2] << 4 | codes[..., 1::2], candidates.gather(0, chosen.long()[None])[0]


def round_nf4_fp4(
    data: Tensor, exponents: Tensor, importance: Tensor, shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The same of an FP4 matrix, as codecs.dequantize_fp4 reads it."""
    return round_nf4(dequantize_fp4(data, exponents), importance, shares)


def look_up(pairs: Tensor, table: Tensor) -> Tensor:
    """What a table says of codes of four bits, two in a byte, the lower first: [rows, n] -> [rows, 2 n]. All uint8."""
    both = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1).view(torch.int16)[:, 0]
    return torch.from_numpy(np.take(both.numpy(), pairs.numpy())).view(torch.uint8)


def zero_signs(codes: Tensor) -> Tensor:
    """Of all zeros of an FP4 matrix, packed as codecs.dequantize_fp4 reads it: whether their sign is set.

    Returns bits in uint8, in the order of the matrix, the highest of a byte first."""
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten().numpy()
    return torch.from_numpy(np.packbits(both[both & 7 == 0] >> 3))
