"""A tile of a weight as float32, whatever it is stored as. Called from within the other kernels; one branch per format.

Formats are decoded by arithmetic on their bits, which is exact and needs no table in memory (nf4 excepted)."""

from __future__ import annotations

import triton
import triton.language as tl

from localmoe.kernels.triton.matrix import FP4, FP8_BLOCK, INT4, INT8, NF4, PLAIN

_PLAIN, _FP8_BLOCK, _FP4 = tl.constexpr(PLAIN), tl.constexpr(FP8_BLOCK), tl.constexpr(FP4)
_INT8, _INT4, _NF4 = tl.constexpr(INT8), tl.constexpr(INT4), tl.constexpr(NF4)


@triton.jit
def e8m0(byte):
    """2 ** (byte - 127). 255, NaN, is refused when weights are bound."""
    bits = byte.to(tl.int32) << 23
    # The smallest is a subnormal float32.
    return tl.where(bits == 0, 1 << 22, bits).to(tl.float32, bitcast=True)


@triton.jit
def e2m1(code):
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 and, from 8 on, their negatives."""
    size = code & 7
    normal = (((size >> 1) + 126) << 23) | ((size & 1) << 22)
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, normal.to(tl.float32, bitcast=True))
    return tl.where(code > 7, -value, value)


@triton.jit
def e4m3(byte):
    """float8_e4m3fn."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    value = tl.where((byte & 127) == 127, float("nan"), value)
    return tl.where(byte > 127, -value, value)


@triton.jit
def nf4(code):
    """The quantiles of a normal distribution that bitsandbytes uses. Source: Dettmers et al., QLoRA, appendix E."""
    # A binary tree of selections: registers only.
    low = tl.where(
        code < 4,
        tl.where(code < 2, tl.where(code < 1, -1.0, -0.6961928009986877),
                 tl.where(code < 3, -0.5250730514526367, -0.39491748809814453)),
        tl.where(code < 6, tl.where(code < 5, -0.28444138169288635, -0.18477343022823334),
                 tl.where(code < 7, -0.09105003625154495, 0.0)),
    )  # fmt: skip
    high = tl.where(
        code < 12,
        tl.where(code < 10, tl.where(code < 9, 0.07958029955625534, 0.16093020141124725),
                 tl.where(code < 11, 0.24611230194568634, 0.33791524171829224)),
        tl.where(code < 14, tl.where(code < 13, 0.44070982933044434, 0.5626170039176941),
                 tl.where(code < 15, 0.7229568362236023, 1.0)),
    )  # fmt: skip
    return tl.where(code < 8, low, high)


@triton.jit
def _nibbles(data, row, first, cols, mask, BLOCK_K: tl.constexpr, HIGH_FIRST: tl.constexpr = False):
    """Codes [R, BLOCK_K] of packed bytes, low nibble first unless HIGH_FIRST."""
    at = first // 2 + tl.arange(0, BLOCK_K // 2)
    inside = mask[:, None] & (at < cols // 2)[None, :]
    packed = tl.load(data + row[:, None] * (cols // 2) + at[None, :], mask=inside, other=0).to(tl.int32)
    if HIGH_FIRST:
        return tl.interleave(packed >> 4, packed & 15)
    return tl.interleave(packed & 15, packed >> 4)


@triton.jit
def _scaled(values, scales, GROUP: tl.constexpr):
    """values [R, C] times scales [R, C / GROUP]."""
    rows: tl.constexpr = values.shape[0]
    cols: tl.constexpr = values.shape[1]
    return tl.reshape(tl.reshape(values, (rows, cols // GROUP, GROUP)) * scales[:, :, None], (rows, cols))


@triton.jit
def load_weights(
    data, scale, zero, row, first, rows, cols,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `row` [R] int64 and columns [first, first + BLOCK_K) of a weight, float32 [R, BLOCK_K]; 0 outside of it.

    first: a multiple of BLOCK_K, which is a multiple of 128."""
    mask = row < rows
    column = first + tl.arange(0, BLOCK_K)
    inside = mask[:, None] & (column < cols)[None, :]
    if FORMAT == _PLAIN:
        return tl.load(data + row[:, None] * cols + column[None, :], mask=inside, other=0).to(tl.float32)
    if FORMAT == _FP8_BLOCK:
        values = e4m3(tl.load(data + row[:, None] * cols + column[None, :], mask=inside, other=0).to(tl.int32))
        of_block = (
            row[:, None] // 128 * tl.cdiv(cols, 128) + (first + tl.arange(0, BLOCK_K // 128) * 128)[None, :] // 128
        )
        there = mask[:, None] & ((first + tl.arange(0, BLOCK_K // 128) * 128) < cols)[None, :]
        factor = tl.load(scale + of_block, mask=there, other=0)
        if scale.dtype.element_ty == tl.uint8:
            return _scaled(values, e8m0(factor), 128)
        return _scaled(values, factor.to(tl.float32), 128)
    groups = first // GROUP + tl.arange(0, BLOCK_K // GROUP)
    at = row[:, None] * (cols // GROUP) + groups[None, :]
    there = mask[:, None] & (groups < cols // GROUP)[None, :]
    factors = tl.load(scale + at, mask=there, other=0)
    if FORMAT == _FP4:
        # A scale byte of 0 outside of the matrix would be 2 ** -127; its codes are 0 there.
        return _scaled(e2m1(_nibbles(data, row, first, cols, mask, BLOCK_K)), e8m0(factors), GROUP)
    if FORMAT == _NF4:
        # As bitsandbytes packs them.
        return _scaled(nf4(_nibbles(data, row, first, cols, mask, BLOCK_K, True)), factors.to(tl.float32), GROUP)
    middle: tl.constexpr = 128 if FORMAT == _INT8 else 8
    if FORMAT == _INT8:
        codes = tl.load(data + row[:, None] * cols + column[None, :], mask=inside, other=0).to(tl.float32)
    else:
        codes = _nibbles(data, row, first, cols, mask, BLOCK_K).to(tl.float32)
    if HAS_ZERO:
        zeros = tl.load(zero + at, mask=there, other=0).to(tl.float32)
        r: tl.constexpr = codes.shape[0]
        codes = tl.reshape(tl.reshape(codes, (r, BLOCK_K // GROUP, GROUP)) - zeros[:, :, None], (r, BLOCK_K))
    else:
        codes = codes - middle
    return _scaled(codes, factors.to(tl.float32), GROUP)
