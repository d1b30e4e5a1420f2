"""The compiled products against exact arithmetic on the dequantized matrix, for every format and instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe.formats import FORMATS, QuantizedTensor
from localmoe.kernels import codecs
from localmoe.kernels.native import Mode
from localmoe.kernels.reference import fake_quant_int8
from localmoe.weights import bind_native, linear_float32
from tests.loops import noise
from tests.native_kernels import (
    ISAS,
    KINDS,
    PLAIN,
    bound,
    library,
    multiplied,
    needs_native,
    packed,
    rounds_to_bf16,
    rounds_to_int8,
    using,
    values,
)

pytestmark = needs_native

# Of the sum of all magnitudes of products. Strict: float32 rounding over thousands of terms. Fast: weights and
# activations are rounded to bf16, by half a unit in the eighth bit at most. Activations in int8 have a twin instead.
STRICT, FAST = 2e-6, 2.02 * 2**-8
# Rows and columns around every block, tile and panel border; tokens around every kernel's border.
SHAPES = [(1, 128), (33, 2176), (7, 4224), (130, 384)]
TOKENS = [1, 2, 3, 4, 5, 8, 9, 13, 100, 210]
# Columns that leave a partial last block, down to a single one where the format allows it.
PARTIAL = [
    *(("fp8_block", 1), ("fp8_block", 67), ("bf16", 63), ("f32", 1), ("fp4", 32), ("fp4", 160)),
    *(("int8_g32", 96), ("int4_g32", 32), ("int4_g64", 192)),
    *(("nf4", 64), ("nf4", 192), ("book3", 32), ("book3", 160), ("book2", 96)),
]


def within(found: Tensor, x: Tensor, w: Tensor, tolerance: float) -> bool:
    exact, magnitude = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    return bool(((found.double() - exact).abs() <= tolerance * magnitude + 1e-30).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["strict", "fast"])
def test_products_are_those_of_the_dequantized_matrix(isa: str, kind: str, mode: Mode) -> None:
    """Fails if a nibble, scale, zero point, row, column or token is taken for another, at any size."""
    with using(isa) as lib:
        for rows, cols in SHAPES:
            weight = packed(kind, noise(rows, cols, seed=rows))
            for tokens in TOKENS:
                x = noise(tokens, cols, seed=tokens)
                y = lib.linear(x, bound(weight), mode=mode)
                x = multiplied(x, kind, isa, mode)
                tolerance = FAST if rounds_to_bf16(kind, isa, mode, tokens) else STRICT
                assert within(y, x, values(weight), tolerance), (rows, cols, tokens)


@pytest.mark.parametrize(("kind", "cols"), PARTIAL)
@pytest.mark.parametrize("isa", ISAS)
def test_a_partial_last_block_reads_nothing_beyond_its_row(isa: str, kind: str, cols: int) -> None:
    """Fails if the next row, or memory after the matrix, takes part: the rows there are huge."""
    weight = packed(kind, torch.cat((noise(5, cols), 1e30 * torch.ones(1, cols))))
    x = noise(3, cols, seed=1)
    with using(isa) as lib:
        y = lib.linear(x, bound(weight))
    assert within(y[:, :5], multiplied(x, kind, isa, "fast"), values(weight)[:5], FAST)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["strict", "fast"])
@pytest.mark.parametrize("kind", ["fp8_block", "fp4", "int8_g32", "int4_g32"])
def test_every_byte_means_what_its_twin_says(isa: str, kind: str, mode: Mode) -> None:
    """Fails for one wrong code, a lost sign or denormal, or a NaN code read as a number. Row b is made of bytes b."""
    fmt = FORMATS[kind]
    rows, width = fmt.data_shape(256, 64)
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(rows, width).contiguous()
    scale = torch.full(fmt.scale_shape(256, 64), 0.25)
    if kind == "fp4":
        scale = codecs.encode_e8m0(scale)
    elif kind != "fp8_block":
        scale = scale.bfloat16()
    weight = QuantizedTensor(fmt, (256, 64), codes.view(torch.float8_e4m3fn) if kind == "fp8_block" else codes, scale)
    for count in (64, 4):  # unit vectors pick single weights
        x = torch.eye(64)[:count]
        with using(isa) as lib:
            found = lib.linear(x, bound(weight), mode=mode)
        expected = (x @ weight.dequantize().t()).nan_to_num(7e7)
        # A scale of 1 / 127 is not exact.
        rounded = rounds_to_int8(kind, isa, mode, count)
        assert torch.allclose(found.nan_to_num(7e7), expected, rtol=1e-6 if rounded else 0, atol=1e-5 if rounded else 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [3, 2])
def test_every_mark_means_what_its_twin_says(isa: str, bits: int) -> None:
    """Fails for one wrong level of a table, or a scale. Row m has mark m and codes of every value."""
    fmt = FORMATS[f"book{bits}"]
    codes = torch.arange(16 * bits, dtype=torch.uint8).mul(37).expand(256, -1).contiguous()
    row = torch.rand(256, 1, generator=torch.Generator().manual_seed(0)).add(0.5).view(torch.uint8)
    marks = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 4)
    weight = QuantizedTensor(fmt, (256, 128), codes, torch.cat((row, marks), 1))
    x = torch.eye(128)
    with using(isa) as lib:
        assert torch.equal(lib.linear(x, bound(weight), mode="strict"), weight.dequantize().t())
        assert torch.equal(lib.linear(x[5:8], bound(weight), mode="fast"), weight.dequantize().t()[5:8])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["strict", "fast"])
def test_every_power_of_two_is_a_scale(isa: str, mode: Mode) -> None:
    """Fails if a scale byte is read as a number or with a sign. Row s has scale byte s."""
    # A scale of 1 / 127 is not exact, and sums of codes need room above and below.
    rounded = rounds_to_int8("fp4", isa, mode)
    scale = torch.arange(*((12, 240) if rounded else (2, 252)), dtype=torch.uint8)[:, None].expand(-1, 4).contiguous()
    codes = torch.full((len(scale), 64), 0x22, dtype=torch.uint8)  # ones
    weight = QuantizedTensor(FORMATS["fp4"], (len(scale), 128), codes, scale)
    for count in (1, 3, 6, 12):
        with using(isa) as lib:
            found = lib.linear(torch.eye(128)[:count], bound(weight), mode=mode)
        expected = codecs.decode_e8m0(scale[:, 0])[None].expand(count, -1)
        assert torch.allclose(found, expected, rtol=2e-6 if rounded else 0, atol=0)


@pytest.mark.parametrize("scale", [0.3, 1.7e-3, 64.0])
@pytest.mark.parametrize("isa", ISAS)
def test_fp8_scales_need_not_be_powers_of_two(isa: str, scale: float) -> None:
    """Fails if only the exponent of an F32 scale is used, as for E8M0."""
    data, scales = codecs.quantize_fp8_block(noise(200, 300))
    weight = QuantizedTensor(FORMATS["fp8_block"], (200, 300), data, scales * scale)
    for tokens in (1, 6, 20):
        x = noise(tokens, 300, seed=1)
        with using(isa) as lib:
            assert within(lib.linear(x, bound(weight)), x, values(weight), FAST)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_integer_scales_come_in_three_dtypes(isa: str, dtype: torch.dtype) -> None:
    """Fails if one is read as another, or small float16 scales (denormals) are lost."""
    fmt = FORMATS["int4_g32"]
    weight = fmt.quantize(noise(40, 576))
    scale = (weight.scale.float() * torch.logspace(-6, 0, 40)[:, None]).to(dtype)
    weight = QuantizedTensor(fmt, weight.shape, weight.data, scale)
    for tokens in (1, 9):
        x = noise(tokens, 576, seed=1)
        with using(isa) as lib:
            found = lib.linear(x, bound(weight))
        assert within(found, multiplied(x, "int4_g32", isa, "fast"), values(weight), FAST)


@pytest.mark.parametrize("kind", ["fp4", "fp8_block", "int8_g32", "bf16"])
def test_groups_meet_their_own_inputs(kind: str) -> None:
    """Fails if a row of a block-diagonal matrix is multiplied with another group's inputs."""
    weight, x = packed(kind, noise(3 * 70, 160)), noise(5, 3, 160, seed=1)
    found = library().linear(x, bound(weight), groups=3)
    for g in range(3):
        rows = slice(70 * g, 70 * g + 70)
        inputs = multiplied(x[:, g], kind, library().isa, "fast")
        assert within(found[:, rows], inputs, values(weight)[rows], FAST)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 300),
    blocks=st.integers(1, 20),
    tokens=st.integers(1, 40),
    threads=st.integers(1, 4),
    isa=st.sampled_from(ISAS or ["none"]),
    seed=st.integers(0, 1000),
)
def test_strict_results_depend_on_nothing_but_their_own_row_and_token(
    kind: str, rows: int, blocks: int, tokens: int, threads: int, isa: str, seed: int
) -> None:
    """Fails if threads, batch mates or a row's place in the matrix change the order of additions."""
    cols = 128 * blocks if kind not in (*PLAIN, "fp8_block") else 128 * blocks - seed % 100
    weight = packed(kind, noise(rows, cols, seed=seed))
    x = noise(tokens, cols, seed=seed + 1)
    with using(isa, threads) as lib:
        together = lib.linear(x, bound(weight), mode="strict")
    with using(isa, 1) as lib:
        t = seed % tokens
        assert torch.equal(together[t : t + 1], lib.linear(x[t : t + 1], bound(weight), mode="strict"))
        if isinstance(weight, Tensor):
            r = seed % rows
            assert torch.equal(together[:, r : r + 1], lib.linear(x, bound(weight[r : r + 1].clone()), mode="strict"))


def rows_of(weight: Tensor | QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    assert isinstance(weight, QuantizedTensor)
    part = slice(first, last)
    zero = None if weight.zero is None else weight.zero[part].clone()
    shape = last - first, weight.shape[1]
    return QuantizedTensor(weight.format, shape, weight.data[part].clone(), weight.scale[part].clone(), zero)


@pytest.mark.skipif("avx512-vnni" not in ISAS, reason="no AVX-512 VNNI")
@pytest.mark.parametrize("cols", [128, 640, 1408])  # fewer than sixteen scales, and more, but not by sixteens
@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith(("fp4", "int4", "int8"))])
def test_products_in_int8_do_not_depend_on_the_rows_and_tokens_beside_them(kind: str, cols: int) -> None:
    """Fails if a row of several computed at once meets another's weights or scales, or is added up in another order."""
    weight, x = packed(kind, noise(33, cols)), noise(8, cols, seed=1)
    few = 4 if kind.startswith("int8") else 8  # more are products of another order
    with using("avx512-vnni", 1) as lib:
        alone = [lib.linear(x[:1], bound(rows_of(weight, r, r + 1)))[0, 0] for r in range(33)]
        for rows in (1, 2, 3, 5, 31, 33):
            part = bound(rows_of(weight, 0, rows))
            one_by_one = torch.cat([lib.linear(x[t : t + 1], part) for t in range(few)])
            assert torch.equal(one_by_one[0], torch.stack(alone[:rows]))
            for tokens in range(2, few + 1):
                assert torch.equal(lib.linear(x[:tokens], part), one_by_one[:tokens]), (rows, tokens)


def test_no_tokens_give_no_rows() -> None:
    assert library().linear(torch.empty(0, 64), bound(noise(5, 64))).shape == (0, 5)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if rounds_to_int8("fp4", isa, "fast")])
@pytest.mark.parametrize("kind", ["fp4", "int4_g32", "int8_g32"])
def test_rounded_activations_are_those_of_the_twin(isa: str, kind: str) -> None:
    """Fails if a group is rounded by another's largest number, tiny ones make an infinite scale, or NaN becomes one."""
    weight, x = packed(kind, noise(40, 160)), noise(4, 160, seed=1)
    x[0, 40], x[1, 32:64], x[2, 5], x[3, 150] = 30, 1e-33, float("nan"), float("inf")
    for count in (1, 4, 8 if isa == "amx" else 20):
        inputs = x.repeat(5, 1)[:count]
        with using(isa) as lib:
            found = lib.linear(inputs, bound(weight))
        rounded = fake_quant_int8(inputs)
        assert found.isnan().all(1).tolist() == rounded.isnan().any(1).tolist()
        sound = ~rounded.isnan().any(1)
        assert within(found[sound], rounded[sound], values(weight), STRICT)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["fp4", "int4_g32", "int8_g32", "fp8_block", "bf16"])
def test_numbers_that_are_none_stay_with_their_token(isa: str, kind: str) -> None:
    """Fails if NaN or infinity becomes a number, or reaches another token, of which there are many here."""
    weight, x = packed(kind, noise(40, 384)), noise(45, 384, seed=1)
    sound = x.clone()
    sound[7], sound[40] = 0, 0
    x[7, 100], x[40, 383] = float("nan"), float("inf")
    with using(isa) as lib:
        found, expected = lib.linear(x, bound(weight)), lib.linear(sound, bound(weight))
    assert not found[[7, 40]].isfinite().any()
    rest = [t for t in range(45) if t not in (7, 40)]
    assert torch.equal(found[rest], expected[rest])


@pytest.mark.parametrize("kind", ["fp4", "int4_g32", "int4_g64 asymmetric", "int8_g32", "int8_g32 asymmetric"])
def test_the_largest_codes_do_not_overflow(kind: str) -> None:
    """Fails if products are added up in too few bits: all weights and activations are as large as they can be."""
    name, _, asymmetric = kind.partition(" ")
    fmt = FORMATS[name]
    for byte in (0xFF, 0x00, 0x77, 0x88):
        weight = packed(kind, noise(16, 256).abs() if asymmetric else noise(16, 256))
        assert isinstance(weight, QuantizedTensor)
        weight = QuantizedTensor(fmt, weight.shape, torch.full_like(weight.data, byte), weight.scale, weight.zero)
        for isa in ISAS:
            for sign in (1.0, -1.0):
                x = torch.full((20, 256), sign)
                expected = x.double() @ values(weight).t()
                for count in (1, 20):
                    with using(isa) as lib:
                        found = lib.linear(x[:count], bound(weight))
                    # Codes may add up to nothing.
                    assert torch.allclose(found.double(), expected[:count], rtol=FAST, atol=1e-4), (byte, isa, count)


@pytest.mark.parametrize(("kind", "exact"), [("int4_g32", False), ("int8_g32", True), ("bf16", True), ("fp4", True)])
def test_logits_are_computed_in_float32_unless_their_matrix_is_coarser(kind: str, exact: bool) -> None:
    """Fails if the head's inputs were rounded where its weights are finer, or decoded slowly where they are not."""
    weight, x = packed(kind, noise(70, 160)), noise(3, 160, seed=1)
    bound_weight = bind_native(weight, library(), "fast")
    mode: Mode = "strict" if exact else "fast"
    assert torch.equal(linear_float32(x, bound_weight), library().linear(x, bound_weight.matrix, mode=mode))
    strict = bind_native(weight, library(), "strict")
    assert torch.equal(linear_float32(x, strict), library().linear(x, strict.matrix, mode="strict"))
