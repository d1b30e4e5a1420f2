"""Ops that do not take the way of their reference."""

from __future__ import annotations

import math

import pytest
import torch

from localmoe import ops
from localmoe.kernels import reference


@pytest.fixture(autouse=True)
def nothing_is_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "SORTED_WHOLE", 0)


@pytest.mark.parametrize(("rows", "width", "k"), [(3, 100, 7), (1, 1000, 1), (5, 257, 64), (2, 64, 16), (4, 3, 9)])
@pytest.mark.parametrize("kind", ["any", "ties", "hidden", "alike"])
def test_a_long_row_is_selected_from_as_if_it_were_sorted(rows: int, width: int, k: int, kind: str) -> None:
    """Fails if narrowing loses one of the largest, one behind the last whole group, or the order of equal scores."""
    scores = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    scores[:, -1] = scores.amax() + 1
    if kind == "ties":
        scores = scores.round()
    if kind == "hidden":
        # As of early queries: fewer are visible than are wanted.
        scores[:, k // 2 :] = -math.inf
    if kind == "alike":
        scores.zero_()
    assert torch.equal(ops.select_top(scores, k), reference.select_top(scores, k))


def test_rows_that_are_broken_are_still_selected_from() -> None:
    """Fails if NaN would stop the step, which is to say where it came from, or reach past the row."""
    scores = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    scores[0, 3:90] = math.nan
    scores[1] = math.nan
    chosen = ops.select_top(scores, 7)
    assert chosen.shape == (3, 7)
    assert int(chosen.min()) >= 0 and int(chosen.max()) < 100
    assert torch.equal(chosen[2], reference.select_top(scores, 7)[2])
