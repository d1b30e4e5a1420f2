"""Number formats of quantized weights: e8m0 scales, FP8 in 128 x 128 blocks, FP4 in groups of 32, int8, int4 and nf4.

Knows tensors; does not know files or names. The inverse functions of FP8 and FP4 round to nearest even with
power-of-two scales, those of the integers with the scale that just reaches a group's largest magnitude.
Works on any device; makes no temporary larger than the float32 matrix itself."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
GROUP = 32
FP8_MAX = 448.0
FP4_MAX = 6.0
# e2m1 values of the codes 0..7; codes 8..15 are their negatives.
_FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4_CODES = torch.cat((_FP4_VALUES, -_FP4_VALUES))
# Both values of a packed byte side by side, read as one integer so that one lookup yields two weights.
_PAIRS = torch.stack((_FP4_CODES.repeat(16), _FP4_CODES.repeat_interleave(16)), dim=1)  # [256, 2]
_DIGITS = torch.arange(16.0)
_NIBBLES = torch.stack((_DIGITS.repeat(16), _DIGITS.repeat_interleave(16)), dim=1).view(torch.int64)[:, 0]
NF4_BLOCK = 64
NF4_LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
_NF4_PAIRS = torch.stack((NF4_LEVELS.repeat_interleave(16), NF4_LEVELS.repeat(16)), dim=1).view(torch.int64)[:, 0]
_FP4_TABLES = {torch.float32: _PAIRS.view(torch.int64)[:, 0], torch.bfloat16: _PAIRS.bfloat16().view(torch.int32)[:, 0]}
_FP8_TABLE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
# Borders between neighbouring codes. A tie goes to the even code: the borders above odd codes belong to the code above.
_MIDDLES = (_FP4_VALUES[:-1] + _FP4_VALUES[1:]) / 2
_FP4_BORDERS = torch.where(torch.arange(7) % 2 == 1, torch.nextafter(_MIDDLES, torch.tensor(0.0)), _MIDDLES)


def decode_e8m0(scales: Tensor) -> Tensor:
    """Scale bytes to float32: 2 ** (byte - 127); 255 is NaN.

    scales: any shape, uint8 or float8_e8m0fnu. Source: OCP Microscaling Formats v1.0, section 5.4.1."""
    return scales.view(torch.float8_e8m0fnu).float()


def encode_e8m0(scales: Tensor) -> Tensor:
    """Powers of two from 2 ** -126 up, float32, to uint8: their float32 exponent bits."""
    return (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def dequantize_fp8_block(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Expand e4m3 weights scaled per 128 x 128 block.

    weight: [rows, cols] float8_e4m3fn; scale: [ceil(rows / 128), ceil(cols / 128)] float32.
    Returns [rows, cols] dtype, rounded once from float32 (exact in float32 when scales are powers of two)."""
    # A lookup is 2 to 4 times faster than torch's own conversion on a CPU (torch 2.13).
    values = _FP8_TABLE.to(weight.device).index_select(0, weight.view(torch.uint8).reshape(-1).int())
    return _scale_blocks_(values.view(weight.shape), scale).to(dtype)


def quantize_fp8_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to e4m3 with a power-of-two scale per 128 x 128 block, the smallest that does not saturate.

    weight: [rows, cols] float, finite. Returns float8_e4m3fn [rows, cols] and float32 scales [ceil / 128, ceil / 128].
    Source: DeepSeek-V4 official inference code, weight conversion with scale_fmt ue8m0."""
    rows, cols = weight.shape
    weight = weight.float()
    padded = torch.nn.functional.pad(weight.abs(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    amax = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
    scale = power_of_two_scale(amax, FP8_MAX)
    return _scale_blocks_(weight.clone(), 1 / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def dequantize_fp4(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Expand packed e2m1 weights with one scale per 32 inputs of a row.

    codes: [rows, cols / 2] uint8, low nibble first; scales: [rows, cols / 32] uint8, e8m0.
    Returns [rows, cols] dtype, exact in float32 and bfloat16.
    Source: OCP Microscaling Formats v1.0 (e2m1: section 5.3.3; e8m0: section 5.4.1)."""
    table = _FP4_TABLES.get(dtype)
    if table is None:
        return dequantize_fp4(codes, scales).to(dtype)
    pairs = table.to(codes.device).index_select(0, codes.reshape(-1).int())
    values = pairs.view(dtype).view(*scales.shape, GROUP)
    return values.mul_(decode_e8m0(scales).to(dtype)[..., None]).flatten(-2)


def quantize_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to e2m1 with a power-of-two scale per 32 inputs of a row, the smallest that does not saturate.

    weight: [rows, cols] float, finite, cols a multiple of 32. Returns uint8 codes [rows, cols / 2], low nibble first,
    and uint8 e8m0 scales [rows, cols / 32]. Source: DeepSeek-V4 official inference code."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scale = power_of_two_scale(groups.abs().amax(-1), FP4_MAX)
    codes = fp4_codes(groups / scale[..., None]).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), encode_e8m0(scale)


def fp4_codes(x: Tensor) -> Tensor:
    """The e2m1 code of the nearest value for each number, the even one of two: uint8 0..15."""
    codes = torch.bucketize(x.abs(), _FP4_BORDERS.to(x.device), out_int32=True)
    return (codes | (torch.signbit(x).int() << 3)).to(torch.uint8)


def fp4_values(codes: Tensor) -> Tensor:
    """What e2m1 codes 0..15 stand for: float32."""
    return _FP4_CODES.to(codes.device)[codes.long()]


def dequantize_int(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Expand unsigned integers with a scale, and perhaps a zero point, per group of a row: (code - zero) * scale.

    codes: uint8 [rows, cols] for 8 bits, [rows, cols / 2] for 4, low nibble first; scales: [rows, cols / group] float;
    zeros: uint8 like scales, or None for the middle of the range (128 or 8), which makes the code symmetric.
    Returns [rows, cols] dtype, rounded once from float32."""
    if bits == 4:
        # One lookup yields both weights of a byte.
        pairs = _NIBBLES.to(codes.device).index_select(0, codes.reshape(-1).int())
        groups = pairs.view(torch.float32).view(*scales.shape, -1)
    else:
        groups = codes.unflatten(-1, (scales.shape[-1], -1)).float()
    middle = zeros[..., None].float() if zeros is not None else float(1 << (bits - 1))
    values: Tensor = groups.sub_(middle).mul_(scales.float()[..., None])
    return values.flatten(-2).to(dtype)


def quantize_int(
    weight: Tensor, bits: int, group: int, *, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a matrix to 8- or 4-bit integers with a bf16 scale per `group` inputs of a row, as dequantize_int reads it.

    weight: [rows, cols] float, finite, cols a multiple of group. symmetric: no zero points (None is returned for them)
    and codes of equal reach on both sides; else the range of the group, extended to 0, is used in full."""
    groups = weight.float().unflatten(-1, (-1, group))
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scale = _bf16_scale(groups.abs().amax(-1) / (middle - 1))
        codes = (groups / scale.float()[..., None]).round().clamp(1 - middle, middle - 1) + middle
        zeros = None
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = _bf16_scale((high - low) / top)
        zeros = (-low / scale.float()).round().clamp(0, top)
        codes = ((groups / scale.float()[..., None]).round() + zeros[..., None]).clamp(0, top)
    packed = codes.flatten(-2).to(torch.uint8)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    return packed, scale, None if zeros is None else zeros.to(torch.uint8)


def _bf16_scale(scale: Tensor) -> Tensor:
    """In bf16, and never zero: a group of zeros has any scale."""
    return torch.where(scale > 0, scale, 1.0).bfloat16()


def dequantize_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Expand packed nf4 weights: NF4[code] * scale.

    codes: uint8 [rows, cols / 2], high nibble first; scales: float32 [rows, blocks]. Returns [rows, cols] dtype,
    rounded once from float32. Source: QLoRA, appendix E; the layout of bitsandbytes without double quantization."""
    pairs = _NF4_PAIRS.to(codes.device).index_select(0, codes.reshape(-1).int())
    values: Tensor = pairs.view(torch.float32).view(*scales.shape, -1).mul_(scales[..., None])
    return values.flatten(-2).to(dtype)


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to nf4 with the largest magnitude of each 64 inputs as their scale, as bitsandbytes does.

    weight: [rows, cols] float, finite, cols a multiple of 64. Returns uint8 codes [rows, cols / 2], high nibble first,
    and float32 scales [rows, cols / 64]."""
    groups = weight.float().unflatten(-1, (-1, NF4_BLOCK))
    scale = groups.abs().amax(-1)
    codes = nf4_codes(groups / torch.where(scale > 0, scale, 1.0)[..., None]).flatten(-2)
    return codes[..., 0::2] << 4 | codes[..., 1::2], scale


def nf4_codes(x: Tensor) -> Tensor:
    """The code of the nearest level for each number: uint8."""
    borders = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2
    return torch.bucketize(x, borders.to(x.device), out_int32=True).to(torch.uint8)


def fake_quantize_fp8_block(weight: Tensor) -> Tensor:
    """What dequantize_fp8_block gives back after quantize_fp8_block. [rows, cols] -> [rows, cols] float32."""
    return dequantize_fp8_block(*quantize_fp8_block(weight))


def fake_quantize_fp4(weight: Tensor) -> Tensor:
    """What dequantize_fp4 gives back after quantize_fp4. [rows, cols] -> [rows, cols] float32."""
    return dequantize_fp4(*quantize_fp4(weight))


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """2 ** ceil(log2(amax / largest)) float32, read off the float's bits so that powers of two are not bumped up.

    At least 2 ** -126, also for an all-zero block."""
    mantissa, exponent = torch.frexp((amax / largest).clamp(min=2.0**-126))
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())


def _scale_blocks_(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply each 128 x 128 block of a float32 matrix by its scale, in place; border blocks may be partial."""
    rows, cols = weight.shape
    columns = scale.repeat_interleave(BLOCK, 1)[:, :cols]
    if rows % BLOCK:
        return weight.mul_(columns.repeat_interleave(BLOCK, 0)[:rows])
    weight.unflatten(0, (-1, BLOCK)).mul_(columns[:, None])
    return weight
