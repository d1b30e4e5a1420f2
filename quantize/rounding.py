"""From numbers to a format: scales that are searched for instead of taken from the largest number of a group.

Knows tensors only. Memory: a few times the matrix in float32; some tens of times without the compiled kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from localmoe.errors import FormatError
from localmoe.formats import FORMATS, Book, Fp4, Int, Nf4, QuantizedTensor, WeightFormat
from localmoe.kernels import native, rounding
from localmoe.kernels.codecs import (
    FP4_MAX,
    decode_e8m0,
    encode_e8m0,
    fp4_values,
    power_of_two_scale,
)

# Of the scale that just reaches a group's largest number, what is tried. A smaller one cuts off the largest
# and rounds the others better. With 8 bits it is about the next scales that bfloat16 has.
SHARES = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65), 8: (1.0, 1.004, 0.996, 0.992, 0.988, 0.98)}
_NF4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
_ROUNDED_AT_ONCE = 1 << 20
# Twice the FP4 numbers around 128.
_DOUBLED = (fp4_values(torch.arange(16)) * 2 + 128).to(torch.uint8)
# And the way back, of all bytes; -0 is never made, its sign is kept elsewhere.
_NOT_FP4 = 255
_INT8_AS_FP4 = np.full(256, _NOT_FP4, dtype=np.uint8)
_INT8_AS_FP4[_DOUBLED.numpy()[::-1]] = np.arange(16, dtype=np.uint8)[::-1]


def is_exact(before: WeightFormat | None, name: str) -> bool:
    """FP4 to int8 in groups of 32: a scale of half the group's own makes all of its sixteen values integers."""
    return isinstance(before, Fp4) and name == "int8_g32"


def searched(
    values: Tensor, fmt: WeightFormat, importance: Tensor | None = None, stored: Tensor | QuantizedTensor | None = None
) -> QuantizedTensor:
    """For each group the scale with the least sum of importance * error squared.

    values [rows, cols] float32, finite. importance: of each input [cols] float32, above 0; without it all are alike.
    stored: the matrix as it was, which if it is FP4 saves most of the search for a codebook or nf4. The same bytes with
    and without the compiled kernels. Raises FormatError for a matrix that the format has no room for."""
    rows, cols = values.shape
    fmt.data_shape(rows, cols)
    # Around 1, so that sums of squares stay in float32.
    weights = torch.ones(cols) if importance is None else (importance / importance.mean()).contiguous()
    kernels = _kernels()
    # The twins need much memory for each number.
    size = max(_ROUNDED_AT_ONCE // cols, 1) if kernels is rounding else rows
    if isinstance(fmt, (Book, Nf4)) and isinstance(stored, QuantizedTensor) and isinstance(stored.format, Fp4):
        halves = zip(stored.data.split(size), stored.scale.split(size), strict=True)
        parts = [
            kernels.round_books_fp4(data, scale, weights, fmt.bits)
            if isinstance(fmt, Book)
            else kernels.round_nf4_fp4(data, scale, weights, _NF4_SHARES)
            for data, scale in halves
        ]
    else:
        parts = [_searched(part.contiguous(), fmt, weights, kernels) for part in values.split(size)]
    data, scale = (found[0] if len(found) == 1 else torch.cat(found) for found in zip(*parts, strict=True))
    return QuantizedTensor(fmt, (rows, cols), data, scale)


def _kernels() -> Any:
    """The compiled ones, or their twins."""
    library = native.load()
    return rounding if isinstance(library, str) else library


def _searched(weight: Tensor, fmt: WeightFormat, weights: Tensor, kernels: Any) -> tuple[Tensor, Tensor]:
    """Data and scales. kernels: the compiled ones, or their twins in rounding."""
    found: tuple[Tensor, Tensor]
    if isinstance(fmt, Int):
        found = kernels.round_groups(weight, weights, fmt.bits, fmt.group, SHARES[fmt.bits])
    elif isinstance(fmt, Book):
        found = kernels.round_books(weight, weights, fmt.bits)
    elif isinstance(fmt, Nf4):
        found = kernels.round_nf4(weight, weights, _NF4_SHARES)
    else:
        assert isinstance(fmt, Fp4), "a format that is written"
        found = _fp4(weight, weights, kernels)
    return found


def _fp4(weight: Tensor, weights: Tensor, kernels: Any) -> tuple[Tensor, Tensor]:
    """The power of two that reaches a group's largest number, or the half of it."""
    reach = power_of_two_scale(weight.unflatten(-1, (-1, 32)).abs().amax(-1), FP4_MAX)
    candidates = torch.stack((reach, (reach / 2).clamp(min=2.0**-126)))
    chosen, codes = kernels.round_levels(weight, weights, fp4_values(torch.arange(16)), candidates)
    return codes[..., 0::2] | codes[..., 1::2] << 4, encode_e8m0(candidates.gather(0, chosen.long()[None])[0])


def exactly(weight: QuantizedTensor) -> QuantizedTensor:
    """FP4 as int8_g32."""
    data = _kernels().look_up(weight.data, _DOUBLED)
    scale = (decode_e8m0(weight.scale) / 2).bfloat16()
    return QuantizedTensor(FORMATS["int8_g32"], weight.shape, data, scale)


def is_undone(before: WeightFormat | None, name: str) -> bool:
    """int8 in groups of 32 to FP4, which it may have been."""
    return before is FORMATS["int8_g32"] and name == "fp4"


def restored(weight: QuantizedTensor, negative_zeros: Tensor | None) -> QuantizedTensor:
    """The FP4 matrix that an int8_g32 one was made of.

    negative_zeros: of each zero, in order, one bit, the highest of a byte first; without it all zeros are positive.
    Raises FormatError if it was made of something else."""
    scale = weight.scale.float() * 2
    codes = np.take(_INT8_AS_FP4, weight.data.numpy())
    if not (torch.frexp(scale).mantissa == 0.5).all() or (codes == _NOT_FP4).any():
        raise FormatError("was not made of FP4, which alone can be had back; quantize the original instead")
    if negative_zeros is not None:
        zeros = np.flatnonzero(codes == 0)
        if negative_zeros.numel() != -(-len(zeros) // 8):
            raise FormatError("is not what the signs of its zeros are kept for; copy both again")
        codes.reshape(-1)[zeros] = np.unpackbits(negative_zeros.numpy(), count=len(zeros)) << 3
    packed = torch.from_numpy(codes[..., 0::2] | codes[..., 1::2] << 4)
    fmt = FORMATS["fp4"]
    return QuantizedTensor(fmt, weight.shape, packed, encode_e8m0(scale))
