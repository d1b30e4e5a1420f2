"""Rounding with a searched scale: the compiled kernels have the bits of their twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localmoe.kernels import codebooks, codecs, rounding
from tests.loops import noise
from tests.native_kernels import ISAS, library, needs_native, using

pytestmark = needs_native
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


def odd_matrix(rows: int, cols: int, group: int) -> Tensor:
    """Outliers, a group of zeros, one of whole numbers, and groups whose squares leave float32 on both sides."""
    weight = noise(rows, cols, seed=rows)
    weight[0, ::17] *= 9
    weight[-1, :group] *= 1e-36
    if rows > 1:
        weight[1, :group] = 0
        weight[1, group:] = weight[1, group:].round()
    if rows > 3:
        weight[2, :group] *= 1e30
        weight[3] *= 1e-39
    return weight


def importance_of(cols: int, kind: str) -> Tensor:
    return torch.ones(cols) if kind == "even" else noise(cols, seed=9).square()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("importance", ["even", "odd"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "group", "groups"), [(1, 32, 1), (7, 64, 5), (130, 128, 2), (3, 256, 3)])
def test_codes_and_scales_are_those_of_the_twin(
    isa: str, bits: int, rows: int, group: int, groups: int, importance: str
) -> None:
    """Large, tiny and zero groups too. Fails if a tie is rounded otherwise, sums are added in another order, or a
    thread takes another's rows."""
    weight, weights = odd_matrix(rows, group * groups, group), importance_of(group * groups, importance)
    with using(isa):
        codes, scales = library().round_groups(weight, weights, bits, group, SHARES)
    expected = rounding.round_groups(weight, weights, bits, group, SHARES)
    assert torch.equal(scales, expected[1])
    assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("importance", ["even", "odd"])
@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (7, 160), (130, 64)])
def test_codebooks_are_those_of_the_twin(isa: str, bits: int, rows: int, cols: int, importance: str) -> None:
    """Fails if the library has another table or scale, or chooses another of equally good ones."""
    weight, weights = odd_matrix(rows, cols, 32), importance_of(cols, importance)
    with using(isa):
        codes, marks = library().round_books(weight, weights, bits)
    expected = rounding.round_books(weight, weights, bits)
    assert torch.equal(marks, expected[1])
    assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_size_of_the_weights_does_not_matter(bits: int) -> None:
    """Fails if squares overflow or vanish, so that any scale looks as good as another."""

    def error(scale: float) -> float:
        weight, ones = noise(8, 128) * scale, torch.ones(128)
        if bits == 4:
            found = codecs.dequantize_int(*library().round_groups(weight, ones, 4, 32, SHARES), None, 4)
        else:
            found = codebooks.dequantize_book(*library().round_books(weight, ones, bits), bits)
        return float((found.double() - weight).norm() / weight.double().norm())

    for scale in (1e30, 1e-25, 1e-36):
        assert error(scale) == pytest.approx(error(1.0), rel=0.02)


def test_the_best_of_the_scales_is_taken() -> None:
    """By trying each alone. Fails if the first or the last is taken, or the error is of other codes."""
    weight = noise(16, 128, seed=2)

    def errors(shares: tuple[float, ...]) -> torch.Tensor:
        codes, scales = library().round_groups(weight, torch.ones(128), 4, 32, shares)
        off = codecs.dequantize_int(codes, scales, None, 4) - weight
        return off.square().unflatten(1, (-1, 32)).sum(-1)

    each = torch.stack([errors((share,)) for share in SHARES])
    assert torch.allclose(errors(SHARES), each.amin(0), rtol=1e-4)
    assert len(each.argmin(0).unique()) > 4


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_important_inputs_lose_less(bits: int) -> None:
    """Fails if importance is ignored, or of other columns."""
    weight, weights = noise(64, 256, seed=3), importance_of(256, "odd")

    def error(given: Tensor) -> float:
        if bits == 4:
            found = codecs.dequantize_int(*library().round_groups(weight, given, 4, 64, SHARES), None, 4)
        else:
            found = codebooks.dequantize_book(*library().round_books(weight, given, bits), bits)
        return float(((found - weight).square() * weights).sum())

    assert error(weights) < 0.97 * error(torch.ones(256))


def test_what_does_not_fit_is_refused() -> None:
    for bits, group in [(4, 48), (5, 32), (4, 512), (8, 96)]:
        with pytest.raises(ValueError, match="fit together"):
            library().round_groups(noise(2, 128), torch.ones(128), bits, group, SHARES)
    for bits, cols in [(4, 128), (3, 48)]:
        with pytest.raises(ValueError, match="fit together"):
            library().round_books(noise(2, cols), torch.ones(cols), bits)
    for cols, shares in [(96, SHARES), (128, (1.0,) * 9), (128, ())]:
        with pytest.raises(ValueError, match="fit together"):
            library().round_nf4(noise(2, cols), torch.ones(cols), shares)
    with pytest.raises(ValueError, match="float32"):
        library().round_books(noise(2, 64), torch.ones(32), 3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("importance", ["even", "odd"])
@pytest.mark.parametrize(("rows", "group", "groups"), [(1, 32, 1), (7, 64, 5), (130, 32, 2)])
def test_levels_are_those_of_the_twin(isa: str, rows: int, group: int, groups: int, importance: str) -> None:
    """Fails if a tie goes to another level, or another of equally good scales is chosen."""
    weight, weights = odd_matrix(rows, group * groups, group), importance_of(group * groups, importance)
    largest = weight.unflatten(-1, (-1, group)).abs().amax(-1).clamp(min=1e-30)
    candidates = torch.stack([largest * share for share in SHARES])
    with using(isa):
        found = library().round_levels(weight, weights, codecs.NF4_LEVELS, candidates)
    expected = rounding.round_levels(weight, weights, codecs.NF4_LEVELS, candidates)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("importance", ["even", "odd"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (7, 320), (130, 128)])
def test_nf4_is_that_of_the_twin(isa: str, rows: int, cols: int, importance: str) -> None:
    """Fails if a group of zeros has no scale, nibbles change places, or a piece of rows is left out."""
    weight, weights = odd_matrix(rows, cols, 64), importance_of(cols, importance)
    with using(isa):
        codes, scales = library().round_nf4(weight, weights, SHARES)
    expected = rounding.round_nf4(weight, weights, SHARES)
    assert torch.equal(scales, expected[1])
    assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("importance", ["even", "odd"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (7, 320), (300, 1024)])
def test_nf4_of_fp4_is_that_of_its_numbers(isa: str, rows: int, cols: int, importance: str) -> None:
    """Every number as a group's largest, scales of both halves near each other, far apart and at the ends of float32,
    and zeros. Fails if a table is used for another group than its own, or loses a bit."""
    generator = torch.Generator().manual_seed(rows)
    data = torch.randint(256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
    largest = torch.randint(8, (rows, cols // 32), generator=generator, dtype=torch.uint8).repeat_interleave(16, 1)
    data &= largest * 17 | 0x88
    exponents = torch.randint(118, 128, (rows, cols // 32), generator=generator, dtype=torch.uint8)
    exponents[rows // 2] = torch.arange(cols // 32).mul(37).add(3).remainder(255).to(torch.uint8)
    exponents[rows // 3] = 126 * (rows > 1)
    data[rows // 3, : cols // 4] &= 0x88
    weights = importance_of(cols, importance)
    with using(isa):
        codes, scales = library().round_nf4_fp4(data, exponents, weights, SHARES[:5])
    expected = rounding.round_nf4_fp4(data, exponents, weights, SHARES[:5])
    assert torch.equal(scales, expected[1])
    assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (130, 512), (1100, 512)])
def test_codes_are_looked_up_as_by_the_twin(isa: str, shape: tuple[int, int]) -> None:
    """Fails if the two codes of a byte change places, or a piece begins in another's place."""
    pairs = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    table = torch.randperm(256, generator=torch.Generator().manual_seed(1))[:16].to(torch.uint8)
    with using(isa):
        assert torch.equal(library().look_up(pairs, table), rounding.look_up(pairs, table))


def test_the_signs_of_zeros_are_those_of_the_twin() -> None:
    """Fails if a zero is missed, or a sign goes to another."""
    codes = torch.randint(256, (7, 33), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[2] = 0x88
    assert torch.equal(library().zero_signs(codes), rounding.zero_signs(codes))
    assert library().zero_signs(codes[:1] | 0x11).numel() == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("importance", ["even", "odd"])
@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (7, 160), (130, 64)])
def test_codebooks_of_fp4_are_those_of_the_twin(isa: str, bits: int, rows: int, cols: int, importance: str) -> None:
    """Scales of all sizes in a row. Fails if errors of one scale are used for another, or sums are in other order."""
    data, exponents = codecs.quantize_fp4(odd_matrix(rows, cols, 32))
    exponents[rows // 2] = torch.arange(cols // 32).mul(37).add(3).remainder(255).to(torch.uint8)
    weights = importance_of(cols, importance)
    with using(isa):
        codes, marks = library().round_books_fp4(data, exponents, weights, bits)
    expected = rounding.round_books_fp4(data, exponents, weights, bits)
    assert torch.equal(marks, expected[1])
    assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("bits", [3, 2])
def test_codebooks_of_fp4_are_as_good_as_those_of_its_numbers(bits: int) -> None:
    """Fails if the shortcut loses anything that the search over numbers does not."""
    data, exponents = codecs.quantize_fp4(noise(64, 512) * 0.02)
    values, weights = codecs.dequantize_fp4(data, exponents), importance_of(512, "odd")

    def error(found: tuple[Tensor, Tensor]) -> float:
        return float(((codebooks.dequantize_book(*found, bits) - values).square() * weights).sum())

    short, full = (
        library().round_books_fp4(data, exponents, weights, bits),
        library().round_books(values, weights, bits),
    )
    assert error(short) == pytest.approx(error(full), rel=1e-5)
