"""Codecs: every code of every format, both ways, against values written out by hand from the format's definition."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.kernels import codecs

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def e4m3_value(byte: int) -> float:
    """From the definition: bias 7, subnormals at exponent 0, all ones is NaN, no infinity."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_e8m0_is_a_power_of_two_and_255_is_nan() -> None:
    """Fails if the byte is taken as a number (120 as 120.0 instead of 2 ** -7) or as signed."""
    values = codecs.decode_e8m0(ALL_BYTES)
    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(values[255])


def test_encode_e8m0_undoes_decode() -> None:
    """Fails if the exponent bits are shifted or biased wrongly."""
    assert torch.equal(codecs.encode_e8m0(codecs.decode_e8m0(ALL_BYTES[1:255])), ALL_BYTES[1:255])


def test_fp8_decodes_every_code() -> None:
    """Fails for the FNUZ variant (factor 2), for an infinity at 0x78, or for flushed subnormals."""
    weight = ALL_BYTES.view(torch.float8_e4m3fn).view(2, 128)
    values = codecs.dequantize_fp8_block(weight, torch.ones(1, 1)).flatten().tolist()
    expected = [e4m3_value(byte) for byte in range(256)]
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(values, expected, strict=True))


def test_fp4_decodes_every_code_low_nibble_first() -> None:
    """Fails if the nibbles are swapped or the sign bit is not the top one."""
    table = E2M1 + [-value for value in E2M1]
    values = codecs.dequantize_fp4(ALL_BYTES.view(1, 256), torch.full((1, 16), 127, dtype=torch.uint8))
    assert values.view(256, 2).tolist() == [[table[byte & 15], table[byte >> 4]] for byte in range(256)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp4_scale_belongs_to_32_inputs_of_one_row(dtype: torch.dtype) -> None:
    """Fails if scales run along the wrong dimension or group."""
    codes = torch.full((3, 32), 0x22, dtype=torch.uint8)  # code 2 is 1.0
    scales = torch.tensor([[127, 128], [126, 130], [120, 134]], dtype=torch.uint8)
    values = codecs.dequantize_fp4(codes, scales, dtype)
    assert values.dtype == dtype
    assert torch.equal(values.float(), torch.tensor([[1.0, 2], [0.5, 8], [2.0**-7, 128]]).repeat_interleave(32, 1))


@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (256, 384), (1, 1), (7, 63), (130, 100), (576, 256)])
def test_fp8_scale_belongs_to_a_128_by_128_block(rows: int, cols: int) -> None:
    """Fails if a partial block at the right or bottom takes its neighbour's scale."""
    scale = torch.rand(-(-rows // 128), -(-cols // 128)) + 0.1
    values = codecs.dequantize_fp8_block(torch.ones(rows, cols).to(torch.float8_e4m3fn), scale)
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    assert torch.equal(values, scale[i // 128, j // 128])


@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (7, 63), (300, 129)])
def test_fp8_values_survive_a_round_trip(rows: int, cols: int) -> None:
    """Fails if quantizing loses anything that the format can hold."""
    generator = torch.Generator().manual_seed(rows)
    weight = codecs.fake_quantize_fp8_block(torch.randn(rows, cols, generator=generator))
    assert torch.equal(codecs.fake_quantize_fp8_block(weight), weight)


def test_fp4_values_survive_a_round_trip() -> None:
    """Fails if quantizing loses anything that the format can hold."""
    generator = torch.Generator().manual_seed(1)
    weight = codecs.fake_quantize_fp4(torch.randn(5, 96, generator=generator))
    assert torch.equal(codecs.fake_quantize_fp4(weight), weight)


def _nearest_even(value: float, grid: list[float]) -> float:
    """The closest grid value; of two equally close ones that with the even code."""
    best = min(range(len(grid)), key=lambda code: (abs(abs(value) - grid[code]), code % 2))
    return math.copysign(grid[best], value)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-6, 6, width=32), min_size=31, max_size=31))
def test_fp4_rounds_to_nearest_even(values: list[float]) -> None:
    """Fails for ties away from zero, and for a scale other than 1 when the largest value is exactly 6."""
    row = [*values, 6.0]
    rounded = codecs.fake_quantize_fp4(torch.tensor([row]))[0].tolist()
    assert rounded == [_nearest_even(value, E2M1) for value in row]


def test_fp4_ties_go_to_the_even_code() -> None:
    """Fails if a border of the rounding table lies on the wrong side."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor([ties + [-tie for tie in ties] + [6.0] * 18])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert codecs.fake_quantize_fp4(row)[0, :14].tolist() == expected + [-value for value in expected]


def test_fp8_rounds_to_nearest_even() -> None:
    """Fails for truncation, and for a scale other than 1 when the largest value is exactly 448."""
    grid = [e4m3_value(byte) for byte in range(127)]
    middles = [(a + b) / 2 for a, b in pairwise(grid)]
    rounded = codecs.fake_quantize_fp8_block(torch.tensor([[*middles, 448.0]]))[0].tolist()
    assert rounded == [*(_nearest_even(value, grid) for value in middles), 448.0]


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([codecs.FP8_MAX, codecs.FP4_MAX]))
def test_a_scale_is_the_smallest_power_of_two_that_does_not_saturate(amax: float, largest: float) -> None:
    """Fails if an exact power of two is bumped to the next one, or a value just above it is not."""
    scale = codecs.power_of_two_scale(torch.tensor(amax), largest).item()
    assert math.frexp(scale)[0] == 0.5
    assert amax <= largest * scale
    assert amax > largest * scale / 2


def test_zero_blocks_stay_zero() -> None:
    """Fails if an all-zero block divides by zero."""
    assert not codecs.fake_quantize_fp4(torch.zeros(2, 64)).any()
    assert not codecs.fake_quantize_fp8_block(torch.zeros(130, 5)).any()
    assert codecs.quantize_fp4(torch.zeros(1, 32))[1].item() == 1
