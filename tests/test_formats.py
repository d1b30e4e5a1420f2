"""Formats: one table row per format; shapes, bytes, values and refusals."""

from __future__ import annotations

import pytest
import torch

from localmoe.errors import FormatError
from localmoe.formats import FORMATS, format_of
from localmoe.kernels.codecs import encode_e8m0
from localmoe.weights import linear

# name, columns, bytes of a [130, cols] matrix with its scales in memory, worst relative error of the largest value
TABLE = [
    ("fp8_block", 200, 130 * 200 + 2 * 2 * 4, 2**-4),
    ("fp4", 96, 130 * 48 + 130 * 3, 2**-2),
    ("int8_g32", 96, 130 * (96 + 3 * 2), 0.6 / 127),
    ("int8_g64", 192, 130 * (192 + 3 * 2), 0.6 / 127),
    ("int8_g128", 384, 130 * (384 + 3 * 2), 0.6 / 127),
    ("int4_g32", 96, 130 * (48 + 3 * 2), 0.6 / 7),
    ("int4_g64", 192, 130 * (96 + 3 * 2), 0.6 / 7),
    ("int4_g128", 384, 130 * (192 + 3 * 2), 0.6 / 7),
    ("nf4", 192, 130 * (96 + 3 * 4), 0.16),
    ("book3", 96, 130 * (36 + 4 + 3), 0.3),
    ("book2", 96, 130 * (24 + 4 + 3), 0.6),
]


def test_the_table_covers_every_format() -> None:
    """Fails if a format is added without a row here."""
    assert {row[0] for row in TABLE} == set(FORMATS)


@pytest.mark.parametrize(("name", "cols", "nbytes", "error"), TABLE)
def test_a_quantized_matrix_has_the_declared_shapes(name: str, cols: int, nbytes: int, error: float) -> None:
    """Fails if the loader's shape check and the codec disagree, or memory is counted wrongly."""
    fmt, weight = FORMATS[name], torch.randn(130, cols)
    packed = fmt.quantize(weight)
    assert packed.data.shape == fmt.data_shape(130, cols)
    assert packed.scale.shape == fmt.scale_shape(130, cols)
    assert packed.nbytes == nbytes
    # FP8's scales are a byte each on disk, and become float32.
    assert fmt.nbytes(130, cols) == nbytes - (3 * packed.scale.numel() if name == "fp8_block" else 0)
    assert (packed.dequantize() - weight).abs().max() <= error * weight.abs().max()


@pytest.mark.parametrize("name", list(FORMATS))
def test_matmul_is_the_product_with_the_dequantized_matrix(name: str) -> None:
    """Fails if linear transposes, or computes in another dtype than its input's."""
    packed = FORMATS[name].quantize(torch.randn(7, 128))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 128).to(dtype)
        assert torch.equal(linear(x, packed), x @ packed.dequantize(dtype).t())


def test_formats_are_told_apart_by_dtype() -> None:
    """Fails if two formats claim one dtype, or a plain dtype is taken for a packed one."""
    assert [format_of(dtype) for dtype in ("F8_E4M3", "I8", "BF16")] == [FORMATS["fp8_block"], FORMATS["fp4"], None]


def test_fp8_takes_float_scales_as_they_are_and_decodes_e8m0() -> None:
    """Fails if an e8m0 byte is read as a number, or a float scale is rounded to a power of two."""
    fmt, data = FORMATS["fp8_block"], torch.ones(2, 2).to(torch.float8_e4m3fn)
    assert fmt.bind(data, torch.tensor([[0.3]]), (2, 2)).dequantize()[0, 0] == torch.tensor(0.3)
    e8m0 = encode_e8m0(torch.tensor([[0.25]])).view(torch.float8_e8m0fnu)
    assert fmt.bind(data, e8m0, (2, 2)).dequantize()[0, 0] == 0.25


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_fp8_refuses_scales_no_quantizer_writes(bad: float) -> None:
    """Fails if NaN scales, or the zeros of a file lost in a crash, are multiplied in silently."""
    with pytest.raises(FormatError, match="scales"):
        FORMATS["fp8_block"].bind(torch.zeros(2, 2).to(torch.float8_e4m3fn), torch.tensor([[bad]]), (2, 2))


@pytest.mark.parametrize("bad", [255, 0])
def test_fp4_refuses_scales_no_quantizer_writes(bad: int) -> None:
    """Fails if NaN scales, or the zeros of a file lost in a crash, are multiplied in silently."""
    scale = torch.tensor([[127], [bad]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(FormatError, match="scales"):
        FORMATS["fp4"].bind(torch.zeros(2, 16, dtype=torch.int8), scale, (2, 32))


def test_fp4_refuses_columns_that_are_no_multiple_of_32() -> None:
    """Fails if a partial group is packed with a scale that the layout has no room for."""
    with pytest.raises(FormatError, match="33 columns"):
        FORMATS["fp4"].quantize(torch.zeros(2, 33))


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_worked_out_by_hand(bits: int) -> None:
    """Fails if a nibble, a group's scale or its zero point is taken for another."""
    fmt = FORMATS[f"int{bits}_g32"]
    codes = torch.arange(64, dtype=torch.uint8)[None] % 16
    data = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    scale, zero = torch.tensor([[0.5, 2.0]]).bfloat16(), torch.tensor([[3, 10]], dtype=torch.uint8)
    expected = [[(c % 16 - (3 if c < 32 else 10)) * (0.5 if c < 32 else 2.0) for c in range(64)]]
    assert fmt.bind(data, scale, (1, 64), zero).dequantize().tolist() == expected
    middle = 1 << (bits - 1)
    symmetric = [[(c % 16 - middle) * (0.5 if c < 32 else 2.0) for c in range(64)]]
    assert fmt.bind(data, scale, (1, 64)).dequantize().tolist() == symmetric


def test_zero_points_use_the_whole_range() -> None:
    """Fails if asymmetric codes are no finer than symmetric ones where all weights have one sign."""
    weight = 1 + torch.rand(5, 64)
    fmt = FORMATS["int4_g32"]
    errors = [(fmt.quantize(weight, symmetric=s).dequantize() - weight).abs().max() for s in (True, False)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_integers_refuse_scales_no_quantizer_writes(bad: float) -> None:
    """Fails if NaN scales, or the zeros of a file lost in a crash, are multiplied in silently."""
    with pytest.raises(FormatError, match="scales"):
        FORMATS["int4_g32"].bind(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([[bad]]), (1, 32))


def test_a_group_of_zeros_stays_zero() -> None:
    """Fails with 0 / 0."""
    for name in FORMATS:
        assert torch.equal(FORMATS[name].quantize(torch.zeros(2, 128)).dequantize(), torch.zeros(2, 128))


@pytest.mark.parametrize("bits", [3, 2])
def test_a_codebook_of_one_row_is_one(bits: int) -> None:
    """Fails if the scale of a row is read as a word where it does not begin at one."""
    packed = FORMATS[f"book{bits}"].quantize(torch.randn(3, 32))
    one = packed.format.bind(packed.data[1:2], packed.scale[1:2], (1, 32))
    assert torch.equal(one.dequantize(), packed.dequantize()[1:2])
