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


@pytest.mark.parametrize(("n", "first", "block"), [(1, 0, 4), (7, 0, 3), (8, 5, 5), (29, 63, 16), (100, 1, 512)])
def test_expanded_attention_equals_its_twin(monkeypatch: pytest.MonkeyPatch, n: int, first: int, block: int) -> None:
    """Fails if a key is hidden or shown that should not be where blocks of queries and of keys meet, or sums are not
    scaled to a new maximum."""
    monkeypatch.setattr(ops, "EXPANDED_QUERIES", 8)
    g = torch.Generator().manual_seed(n)
    q, cache = torch.randn(n, 3, 10, generator=g), torch.randn(first + n, 12, generator=g)
    # The maximum rises from block to block.
    cache *= torch.linspace(0.1, 4, first + n)[:, None]
    up = torch.randn(3 * 11, 8, generator=g)

    def expand(rows: torch.Tensor) -> torch.Tensor:
        return (rows @ up.t()).unflatten(-1, (3, -1))

    found, expected = (
        form(q, cache, expand, width=8, first=first, scale=0.3, block=block)
        for form in (ops.expanded_attention, reference.expanded_attention)
    )
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_a_broken_key_breaks_the_queries_that_see_it() -> None:
    """Fails if the running maximum would drop NaN; the step says where it came from."""
    q, cache = torch.randn(40, 2, 6), torch.randn(40, 7)
    cache[20, 1] = math.nan
    found = ops.expanded_attention(
        q, cache, lambda rows: rows.repeat(1, 2).unflatten(-1, (2, -1)), width=4, first=0, scale=1.0, block=16
    )
    assert not found[20:].isfinite().all(-1).any()
