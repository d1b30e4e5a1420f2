"""Codebook formats of 3 and 2 bits: block-clustered quantization, and how a matrix is rounded to it.

Each group of 32 inputs of a row has one mark: in the lower five bits which of 32 tables its codes index, in the upper
three its scale, 2 ** (-upper / 2) of the largest magnitude of the row. That is 3.25 and 2.25 bits per weight.
Source of the method: LO-BCQ (Elangovan et al., 2025): tables are fixed, and were found by turns of choosing the best
table and scale for each group and moving the levels to the means of what they stand for, here on normal and Student's t
noise (6 degrees of freedom), half of it rounded to FP4 first as DeepSeek publishes its experts; no model's weights were
used. A table look-up is one instruction, so these formats are decoded as fast as FP4.

Knows tensors only. The compiled kernels have the same tables (kernels/cpu/codebooks.h) and the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
ROW_BYTES = 4  # of a row's scale, before its marks
# Levels in units of an eightieth of the group's scale.
# fmt: off
_LEVELS = {
    3: (
        (-123, -67, -40, -20, 0, 19, 39, 66), (-110, -45, -27, -13, 2, 20, 40, 58), (-96, -62, -37, -16, 4, 26, 50, 83),
        (-94, -53, -29, -11, 5, 20, 39, 67), (-85, -57, -42, -18, 6, 25, 42, 56), (-84, -56, -41, -24, -6, 13, 33, 56),
        (-84, -51, -26, -6, 11, 25, 46, 84), (-84, -47, -25, -10, 6, 25, 42, 56), (-84, -46, -27, -12, 6, 26, 49, 86),
        (-83, -56, -33, -14, 0, 18, 48, 84), (-83, -56, -33, -14, 1, 20, 48, 112), (-82, -57, -33, -14, 0, 14, 34, 82),
        (-82, -45, -19, -1, 13, 27, 45, 82), (-81, -44, -24, -10, 0, 10, 23, 41), (-80, -60, -37, -20, -4, 14, 34, 73),
        (-80, -59, -36, -15, 0, 14, 34, 61), (-80, -59, -36, -14, 6, 24, 40, 68), (-80, -55, -31, -14, 0, 15, 31, 55),
        (-80, -44, -25, -6, 14, 35, 58, 81), (-80, -40, -24, -10, 1, 15, 34, 58), (-78, -56, -32, -14, 5, 22, 39, 59),
        (-76, -53, -32, -13, 5, 25, 49, 76), (-74, -39, -20, -5, 9, 23, 41, 69), (-73, -44, -22, -3, 16, 38, 64, 98),
        (-62, -34, -14, 4, 20, 35, 59, 80), (-60, -35, -14, 0, 10, 22, 40, 60), (-59, -41, -26, -13, 2, 21, 42, 104),
        (-59, -40, -22, -5, 13, 33, 56, 80), (-57, -32, -14, -1, 13, 28, 49, 87), (-56, -42, -21, 0, 21, 42, 56, 84),
        (-48, -28, -14, 0, 14, 33, 57, 107), (-46, -26, -11, 2, 14, 26, 47, 84),
    ),
    2: (
        (-119, -31, 0, 29), (-114, -27, 12, 53), (-100, -40, -1, 40), (-94, -39, 5, 59), (-91, -21, 9, 57),
        (-86, -27, 10, 48), (-85, -29, 25, 84), (-84, -25, 20, 70), (-82, -20, 15, 52), (-81, -30, 4, 39),
        (-79, -29, 13, 57), (-79, -15, 27, 76), (-77, -29, 14, 78), (-73, -23, 15, 56), (-73, -16, 29, 96),
        (-72, -19, 28, 70), (-71, -26, 22, 81), (-71, -22, 15, 69), (-71, -21, 10, 51), (-70, -11, 18, 57),
        (-69, -29, 12, 51), (-69, -28, 19, 70), (-69, -26, 9, 61), (-69, -22, 13, 81), (-65, -4, 43, 101),
        (-61, -10, 26, 75), (-54, -9, 36, 97), (-53, -14, 25, 77), (-51, -17, 12, 72), (-50, -10, 26, 122),
        (-42, -8, 26, 89), (-28, 1, 29, 73),
    ),
}
# fmt: on
LEVELS = {bits: torch.tensor(levels, dtype=torch.float32) for bits, levels in _LEVELS.items()}
STEPS = torch.tensor([2.0 ** (-i / 2) / 80 for i in range(8)], dtype=torch.float32)


def dequantize_book(codes: Tensor, marks: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Expand codes with their tables and scales.

    codes: uint8 [rows, cols * bits / 8], from the lowest bit on; marks: uint8 [rows, 4 + cols / 32], the scale of a row
    as little-endian float32, then the groups' marks. Returns [rows, cols] dtype, rounded once from float32."""
    row, upper, number = split_marks(marks)
    scale = row * STEPS.to(codes.device)[upper]
    levels = LEVELS[bits].to(codes.device)[number]  # [rows, groups, levels]
    chosen = levels.gather(-1, unpacked(codes, bits).unflatten(-1, (-1, GROUP)))
    return chosen.mul_(scale[..., None]).flatten(-2).to(dtype)


def split_marks(marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row scales [rows, 1] float32; of each group the step of its scale and the number of its table, int64."""
    groups = marks[:, ROW_BYTES:].long()
    # Copied, because a view as float32 needs whole words even where there is one row only.
    return (
        marks[:, :ROW_BYTES].clone(memory_format=torch.contiguous_format).view(torch.float32),
        groups >> 5,
        groups & 31,
    )


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """Eight codes of `bits` bits from as many bytes: uint8 [rows, cols * bits / 8] -> int64 [rows, cols]."""
    words = codes.unflatten(-1, (-1, bits)).long()
    word = (words << (8 * torch.arange(bits, device=codes.device))).sum(-1)
    found: Tensor = (word[..., None] >> (bits * torch.arange(8, device=codes.device))) & ((1 << bits) - 1)
    return found.flatten(-2)


def packed(levels: Tensor, bits: int) -> Tensor:
    """The inverse of unpacked()."""
    word = (levels.long().unflatten(-1, (-1, 8)) << (bits * torch.arange(8))).sum(-1)
    found: Tensor = (word[..., None] >> (8 * torch.arange(bits))) & 255
    return found.to(torch.uint8).flatten(-2)
