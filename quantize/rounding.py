"""From numbers to a format: scales that are searched for instead of taken from the largest number of a group.

Knows tensors only. Memory: a few times the matrix in float32; some tens of times without the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from localmoe.formats import FORMATS, Book, Fp4, Int, Nf4, QuantizedTensor, WeightFormat
from localmoe.kernels import native, rounding
from localmoe.kernels.codecs import decode_e8m0

# Of the scale that just reaches a group's largest number, the shares that are tried. A smaller one cuts off the largest
# and rounds the others better. With 8 bits nothing below 1 was ever the best.
_SHARES = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65), 8: (1.0,)}


def is_exact(before: WeightFormat | None, name: str) -> bool:
    """FP4 to int8 in groups of 32: a scale of half the group's own makes all of its sixteen values integers."""
    return isinstance(before, Fp4) and name == "int8_g32"


def quantize(
    weight: Tensor | QuantizedTensor, values: Tensor, name: str, importance: Tensor | None = None
) -> QuantizedTensor:
    """Round a matrix to a format of FORMATS. values: the same as float32, finite. importance: of each input [cols]
    float32, above 0; without it all are alike.

    Raises FormatError for a matrix that the format has no room for."""
    if isinstance(weight, QuantizedTensor) and is_exact(weight.format, name):
        return _exactly(weight, values)
    return searched(values, FORMATS[name], importance)


def searched(weight: Tensor, fmt: WeightFormat, importance: Tensor | None = None) -> QuantizedTensor:
    """weight [rows, cols] float32, finite. For each group the scale with the least sum of importance * error squared.

    The same bytes with and without the compiled kernels."""
    rows, cols = weight.shape
    fmt.data_shape(rows, cols)
    weight = weight.contiguous()
    # Around 1, so that sums of squares stay in float32.
    weights = torch.ones(cols) if importance is None else (importance / importance.mean()).contiguous()
    library = native.load()
    kernels = rounding if isinstance(library, str) else library
    if isinstance(fmt, Int):
        codes, scale = kernels.round_groups(weight, weights, fmt.bits, fmt.group, _SHARES[fmt.bits])
    elif isinstance(fmt, Book):
        codes, scale = kernels.round_books(weight, weights, fmt.bits)
    elif isinstance(fmt, Nf4):
        codes, scale = rounding.round_nf4(weight, weights, _SHARES[4])
    else:
        assert isinstance(fmt, Fp4), "a format that is written"
        codes, scale = rounding.round_fp4(weight, weights)
    return QuantizedTensor(fmt, (rows, cols), codes, scale)


def _exactly(weight: QuantizedTensor, values: Tensor) -> QuantizedTensor:
    """FP4 as int8_g32."""
    scale = decode_e8m0(weight.scale) / 2
    codes = values.unflatten(-1, (-1, 32)) / scale[..., None] + 128
    fmt = FORMATS["int8_g32"]
    return QuantizedTensor(fmt, weight.shape, codes.flatten(-2).to(torch.uint8), scale.bfloat16())


def restored(weight: QuantizedTensor, negative_zeros: Tensor | None) -> QuantizedTensor:
    """The FP4 matrix that int8_g32 was made of; negative_zeros: of each zero, in order, whether its sign was set.

    Raises FormatError if it was made of something else."""
