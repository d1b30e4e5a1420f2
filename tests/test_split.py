"""How many of a layer's experts go to an accelerator: the best division by the times there are."""

from __future__ import annotations

import pytest

from localmoe.experts.split import FIRST, RECHECK, Costs, load_of


def test_both_devices_end_together() -> None:
    """The CPU takes 2 s for an expert, a copy 1 s, the device 0.5 s. Fails if the division is not the best."""
    costs = Costs()
    assert [costs.copies(1, 0, 5), costs.copies(1, 3, 0)] == [0, 0]
    costs.note("cpu", 1, 2, 4.0)
    assert costs.copies(1, 0, 5) == 1
    costs.note("copy", 1, 1, 1.0)
    costs.note("accelerator", 1, 2, 1.0)
    # c copies: 2 (5 - c) s on the CPU beside 1.5 c.
    assert costs.copies(1, 0, 5) == 3
    # 4 others take the accelerator 2 s, while copies are made.
    assert costs.copies(1, 4, 5) == 3
    # 20 others take the accelerator 10 s anyway.
    assert costs.copies(1, 20, 5) == 0
    assert costs.copies(2, 0, 5) == 0


def test_times_that_nothing_measures_any_more_are_measured_again() -> None:
    costs = Costs()
    for work, seconds in (("cpu", 1.0), ("copy", 50.0), ("accelerator", 0.1)):
        costs.note(work, 1, 1, seconds)  # type: ignore[arg-type]
    assert [costs.copies(1, 2, 3) for _ in range(2 * RECHECK)].count(1) == 2
    for _ in range(40):
        costs.note("copy", 1, 1, 0.01)
    chosen = [costs.copies(1, 0, 3) for _ in range(2 * RECHECK)]
    assert (chosen.count(3), chosen.count(2)) == (2 * RECHECK - 2, 2)


def test_times_follow_what_is_measured() -> None:
    costs = Costs()
    costs.note("cpu", 1, 4, 4.0)
    costs.note("cpu", 1, 0, 9.0)
    assert costs.seconds("cpu", 1) == 1.0
    # One time that is odd is not believed.
    costs.note("cpu", 1, 1, 5.0)
    assert costs.seconds("cpu", 1) == 2.0
    for _ in range(60):
        costs.note("cpu", 1, 2, 6.0)
    assert costs.seconds("cpu", 1) == pytest.approx(3.0, rel=0.01)
    assert costs.seconds("copy", 1) is None


def test_loads_are_powers_of_two() -> None:
    assert [load_of(uses, 2) for uses in (0, 2, 4, 7, 8, 200)] == [1, 1, 2, 3, 3, 7]


def test_the_division_is_the_best_one() -> None:
    """The CPU takes 3 s for an expert and 1 s to hand one over, which is copied in 1 s and computed in 0.5 s."""
    costs = Costs()
    assert [costs.through(1, 0, others) for others in (0, 1, 7, 8, 256)] == [0, 1, 7, 7, 256 - 256 // FIRST]
    for work, seconds in (("cpu", 3.0), ("pass", 1.0), ("accelerator", 0.5)):
        costs.note(work, 1, 1, seconds)  # type: ignore[arg-type]
    assert costs.through(1, 0, 16) == 14
    costs.note("stage", 1, 1, 0.1)
    # n pass: n s of the device beside 0.1 n + 3 (16 - n) s of the CPU.
    assert costs.through(1, 0, 16) == 13
    # 20 more take the device 10 s anyway: 10 + 0.5 n.
    assert costs.through(1, 20, 16) == 12
    assert costs.through(1, 200, 16) == 0
    chosen = [costs.through(1, 0, 16) for _ in range(RECHECK)]
    assert sorted(set(chosen)) == [13, 14]
