"""From numbers to integers: scales that are searched for instead of taken from the largest number of a group.

Knows tensors only. Memory: a few times the matrix in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from localmoe.formats import FORMATS, Fp4, Int, QuantizedTensor
from localmoe.kernels import native, reference
from localmoe.kernels.codecs import decode_e8m0

# Of the scale that just reaches a group's largest number, the shares that are tried. A smaller one cuts off the largest
# and rounds the others better. With 8 bits nothing below 1 was ever the best.
_SHARES = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65), 8: (1.0,)}


def quantize(weight: Tensor | QuantizedTensor, values: Tensor, name: str) -> QuantizedTensor:
    """Round a matrix to an integer format of FORMATS. values: the same as float32.

    FP4 to int8 in groups of 32 is exact: a scale of half the group's own makes all of its sixteen values integers."""
    fmt = FORMATS[name]
    assert isinstance(fmt, Int), "an integer format"
    if isinstance(weight, QuantizedTensor) and isinstance(weight.format, Fp4) and (fmt.bits, fmt.group) == (8, 32):
        return _exactly(weight, values, fmt)
    return searched(values, fmt)


def searched(weight: Tensor, fmt: Int) -> QuantizedTensor:
    """weight [rows, cols] float32, finite. For each group the scale, in bfloat16, with the least squared error.

    The same bytes with and without the compiled kernels."""
    rows, cols = weight.shape
    fmt.data_shape(rows, cols)
    library = native.load()
    round_groups = reference.round_groups if isinstance(library, str) else library.round_groups
    codes, scale = round_groups(weight.contiguous(), fmt.bits, fmt.group, _SHARES[fmt.bits])
    return QuantizedTensor(fmt, (rows, cols), codes, scale)


def _exactly(weight: QuantizedTensor, values: Tensor, fmt: Int) -> QuantizedTensor:
    scale = decode_e8m0(weight.scale) / 2
    codes = values.unflatten(-1, (-1, fmt.group)) / scale[..., None] + 128
    return _packed(codes.flatten(-2), scale.bfloat16(), fmt, weight.shape)


def _packed(codes: Tensor, scale: Tensor, fmt: Int, shape: tuple[int, int]) -> QuantizedTensor:
    data = codes.to(torch.uint8)
    if fmt.bits == 4:
        data = data[..., 0::2] | (data[..., 1::2] << 4)
    return QuantizedTensor(fmt, shape, data.contiguous(), scale.contiguous())
