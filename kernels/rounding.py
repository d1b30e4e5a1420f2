"""Rounding with scales that are searched for: to integers, codebooks, nf4 and FP4.

round_groups and round_books are the specification of lm_round and lm_round_books, with the same bits: sums are added up
in their order. Knows tensors only. Memory: some tens of times the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from localmoe.kernels.codebooks import GROUP, LEVELS, STEPS, packed
from localmoe.kernels.codecs import (
    FP4_MAX,
    NF4_BLOCK,
    NF4_LEVELS,
    encode_e8m0,
    fp4_codes,
    fp4_values,
    nf4_codes,
    power_of_two_scale,
)

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
    reach, factor = largest / (middle - 1), exponent_away(largest)[..., None]
    least, best = torch.full_like(reach, math.inf), torch.ones_like(reach).bfloat16()
    # 2. of the shares of it, the first with the least error
    for share in shares:
        scale = (reach * share).bfloat16()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        step = scale.float()[..., None]
        off = ((groups / step).round().clamp(-middle, middle - 1) * step - groups) * factor
        error = sum_of_lanes(off * off * importance.unflatten(-1, (-1, group)))
        least, best = torch.minimum(error, least), torch.where(error < least, scale, best)
    # 3. the codes
    codes = ((groups / best.float()[..., None]).round().clamp(-middle, middle - 1) + middle).flatten(-2).to(torch.uint8)
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


def round_nf4(weight: Tensor, importance: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Round a matrix to nf4: for each 64 inputs the share of their largest magnitude with the least error as scale.

    weight, importance, shares: as round_groups has them. Returns codes and scales as codecs.dequantize_nf4 reads
    them."""
    groups, weights = _grouped(weight, importance, NF4_BLOCK)
    largest = groups.abs().amax(-1)
    reach = torch.where(largest > 0, largest, torch.ones_like(largest))
    scale = _best(groups, weights, [reach * share for share in shares], lambda x: NF4_LEVELS[nf4_codes(x).long()])
    codes = nf4_codes(groups / scale[..., None]).flatten(-2)
    return codes[..., 0::2] << 4 | codes[..., 1::2], scale


def round_fp4(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to FP4: for each 32 inputs the power of two with the least error, of the one that reaches their
    largest magnitude and the half of it.

    Returns codes and scales as codecs.dequantize_fp4 reads them."""
    groups, weights = _grouped(weight, importance, GROUP)
    reach = power_of_two_scale(groups.abs().amax(-1), FP4_MAX)
    halves = [reach, (reach / 2).clamp(min=2.0**-126)]
    scale = _best(groups, weights, halves, lambda x: fp4_values(fp4_codes(x)))
    codes = fp4_codes(groups / scale[..., None]).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), encode_e8m0(scale)


def _grouped(weight: Tensor, importance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return weight.unflatten(-1, (-1, size)), importance.unflatten(-1, (-1, size))


def _best(groups: Tensor, weights: Tensor, scales: list[Tensor], rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the scales [rows, groups], for each group the first with the least sum of weights * error squared."""
    factor = exponent_away(groups.abs().amax(-1))[..., None]
    best, least = scales[0], torch.full_like(scales[0], math.inf)
    for scale in scales:
        step = scale[..., None]
        off = (rounded(groups / step) * step - groups) * factor
        error = (off * off * weights).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
