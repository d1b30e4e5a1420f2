"""From numbers to integers: scales that are searched for instead of taken from the largest number of a group.

Knows tensors only. Memory: a few times the matrix in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from localmoe.formats import FORMATS, Fp4, Int, QuantizedTensor
from localmoe.kernels.codecs import decode_e8m0

# Of the scale that just reaches a group's largest number, the shares that are tried. A smaller one cuts off the largest
# and rounds the others better. With 8 bits nothing below 1 was ever the best.
_SHARES = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65), 8: (1.0,)}


def quantize(weight: Tensor | QuantizedTensor, name: str) -> QuantizedTensor:
    """Round a matrix to an integer format of FORMATS.

    FP4 to int8 in groups of 32 is exact: a scale of half the group's own makes all of its sixteen values integers."""
    fmt = FORMATS[name]
    assert isinstance(fmt, Int), "an integer format"
    if isinstance(weight, QuantizedTensor) and isinstance(weight.format, Fp4) and (fmt.bits, fmt.group) == (8, 32):
        return _exactly(weight, fmt)
    values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.float()
    return searched(values, fmt)


def searched(weight: Tensor, fmt: Int) -> QuantizedTensor:
    """weight [rows, cols] float32, finite. For each group the scale, in bfloat16, with the least squared error."""
    rows, cols = weight.shape
    fmt.data_shape(rows, cols)
    groups = weight.unflatten(-1, (-1, fmt.group))
    middle = 1 << (fmt.bits - 1)
    reach = groups.abs().amax(-1) / (middle - 1)
    best_error = torch.full_like(reach, torch.inf)
    best_scale = torch.ones_like(reach, dtype=torch.bfloat16)
    for share in _SHARES[fmt.bits]:
        scale = torch.where(reach > 0, reach * share, 1.0).bfloat16()
        step = scale.float()[..., None]
        error = ((groups / step).round_().clamp_(-middle, middle - 1).mul_(step) - groups).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    codes = (groups / best_scale.float()[..., None]).round_().clamp_(-middle, middle - 1) + middle
    return _packed(codes.flatten(-2), best_scale, fmt, (rows, cols))


def _exactly(weight: QuantizedTensor, fmt: Int) -> QuantizedTensor:
    scale = decode_e8m0(weight.scale) / 2
    codes = weight.dequantize().unflatten(-1, (-1, fmt.group)) / scale[..., None] + 128
    return _packed(codes.flatten(-2), scale.bfloat16(), fmt, weight.shape)


def _packed(codes: Tensor, scale: Tensor, fmt: Int, shape: tuple[int, int]) -> QuantizedTensor:
    data = codes.to(torch.uint8)
    if fmt.bits == 4:
        data = data[..., 0::2] | (data[..., 1::2] << 4)
    return QuantizedTensor(fmt, shape, data.contiguous(), scale.contiguous())
