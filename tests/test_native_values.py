"""Whole matrices: decoded as their twins decode them, and compared."""

from __future__ import annotations

import pytest
import torch

from tests.loops import noise
from tests.native_kernels import ISAS, KINDS, PLAIN, bound, library, needs_native, packed, using

pytestmark = needs_native


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_matrix_is_decoded_as_its_twin_decodes_it(isa: str, kind: str) -> None:
    """Fails for one wrong place, scale or last bit, or a number written beyond the last row."""
    for rows, cols in [(1, 128), (130, 384), (257, 1152)]:
        weight = packed(kind, noise(rows, cols, seed=rows))
        with using(isa) as lib:
            found = lib.decode(bound(weight))
        expected = weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "cols"), [("fp8_block", 67), ("bf16", 1), ("fp4", 32), ("nf4", 192), ("book3", 160)])
@pytest.mark.parametrize("isa", ISAS)
def test_a_partial_last_block_is_decoded(isa: str, kind: str, cols: int) -> None:
    weight = packed(kind, noise(7, cols))
    with using(isa) as lib:
        found = lib.decode(bound(weight))
    assert torch.equal(found, weight.to(PLAIN["f32"]) if isinstance(weight, torch.Tensor) else weight.dequantize())


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_sums_are_those_of_float64(scale: float) -> None:
    """Fails if squares leave float32, or a row or a column is left out; the same bits with all instruction sets."""
    a, b = noise(131, 77) * scale, noise(131, 77, seed=1) * scale
    found = []
    for isa in ISAS:
        with using(isa, threads=1 + len(found)) as lib:
            found.append(lib.compare(a, b))
    assert set(found) == {found[0]}
    x, y = a.double(), b.double()
    assert found[0] == pytest.approx(
        [float(s) for s in (x @ x.t()).diagonal().sum()[None]]
        + [float((y * y).sum()), float((x * y).sum()), float(((x - y) ** 2).sum())],
        rel=1e-12,
    )


def test_matrices_of_two_shapes_are_not_compared() -> None:
    with pytest.raises(ValueError, match="float32"):
        library().compare(noise(3, 4), noise(4, 3))
