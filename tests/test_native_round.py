"""Rounding to integers with a searched scale: the compiled kernels have the bits of their twin."""

from __future__ import annotations

import pytest
import torch

from localmoe.kernels import codecs, reference
from tests.loops import noise
from tests.native_kernels import ISAS, library, needs_native, using

pytestmark = needs_native
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "group", "groups"), [(1, 32, 1), (7, 64, 5), (130, 128, 2), (3, 256, 3)])
def test_codes_and_scales_are_those_of_the_twin(isa: str, bits: int, rows: int, group: int, groups: int) -> None:
    """Large, tiny and zero groups too. Fails if a tie is rounded otherwise, sums are added in another order, or a
    thread takes another's rows."""
    weight = noise(rows, group * groups, seed=rows)
    weight[0, ::17] *= 9
    weight[-1, :group] *= 1e-36
    if rows > 1:
        weight[1, :group] = 0
        weight[1, group:] = weight[1, group:].round()
    with using(isa):
        codes, scales = library().round_groups(weight, bits, group, SHARES)
    expected = reference.round_groups(weight, bits, group, SHARES)
    assert torch.equal(scales, expected[1])
    assert torch.equal(codes, expected[0])


def test_the_best_of_the_scales_is_taken() -> None:
    """By trying each alone. Fails if the first or the last is taken, or the error is of other codes."""
    weight = noise(16, 128, seed=2)

    def errors(shares: tuple[float, ...]) -> torch.Tensor:
        codes, scales = library().round_groups(weight, 4, 32, shares)
        off = codecs.dequantize_int(codes, scales, None, 4) - weight
        return off.square().unflatten(1, (-1, 32)).sum(-1)

    each = torch.stack([errors((share,)) for share in SHARES])
    assert torch.allclose(errors(SHARES), each.amin(0), rtol=1e-4)
    assert len(each.argmin(0).unique()) > 4


def test_what_does_not_fit_is_refused() -> None:
    for bits, group in [(4, 48), (5, 32), (4, 512), (8, 96)]:
        with pytest.raises(ValueError, match="fit together"):
            library().round_groups(noise(2, 128), bits, group, SHARES)
