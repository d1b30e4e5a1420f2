"""Which marks stay: the latest, and of the older ones so many that going back far costs little more than that far."""

from __future__ import annotations

import pytest

from localmoe.marks import LATEST, LEAST_MARKS, MAX_MARKS, least_useful, most_marks


@pytest.mark.parametrize(("nbytes", "most"), [(0, 32), (1 << 20, 32), (4 << 20, 16), (23 << 20, 8)])
def test_large_marks_are_fewer(nbytes: int, most: int) -> None:
    assert most_marks(nbytes) == most


@pytest.mark.parametrize("most", [LEAST_MARKS, MAX_MARKS])
@pytest.mark.parametrize("turn", [[100], [7, 100], [1000, 3]])
def test_going_back_costs_a_share_of_the_way(most: int, turn: list[int]) -> None:
    """Fails if old turns have no mark near them, or the latest ones are given up for old ones."""
    lengths, made = list[int](), list[int]()
    for number in range(1000):
        made.append((made[-1] if made else 0) + turn[number % len(turn)])
        lengths.append(made[-1])
        if len(lengths) > most:
            del lengths[least_useful(lengths)]
    assert len(lengths) == most
    assert lengths[-LATEST:] == made[-LATEST:]
    end = made[-1]
    for point in made[:-1]:
        again = point - max((mark for mark in lengths if mark <= point), default=0)
        assert again <= (end - point) * (4 if most == LEAST_MARKS else 0.6)
