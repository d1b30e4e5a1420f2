"""How many replies run at once follows what steps took."""

from __future__ import annotations

from collections.abc import Callable

from localmoe.batch.size import FIRST, MEASURED, PATIENCE, BatchSize


def run(size: BatchSize, seconds: Callable[[int], float], steps: int, prompt_tokens: int = 0) -> None:
    for _ in range(steps):
        size.observe(size.limit, prompt_tokens, seconds(size.limit))


def test_it_grows_to_what_memory_holds_where_company_is_free() -> None:
    """Fails if it stops early: a step of paged experts takes hardly longer for more replies."""
    size = BatchSize(24)
    run(size, lambda _rows: 1.0, 8 * MEASURED)
    assert size.limit == 24
    assert size.curve() == {4: 4.0, 8: 8.0, 16: 16.0, 24: 24.0}


def test_it_stays_where_more_at_once_brings_nothing() -> None:
    """Fails if it grows while each reply takes its full time: that is memory and latency for nothing."""
    size = BatchSize(64)
    run(size, lambda rows: float(rows), 6 * MEASURED)
    assert size.limit == FIRST
    assert list(size.curve()) == [FIRST, 2 * FIRST]


def test_it_goes_back_to_the_best() -> None:
    """Fails if it stays where it is slower: more replies than the caches of the machine hold, for example."""
    size = BatchSize(64)
    run(size, lambda rows: 1.0 if rows <= 16 else 5.0, 12 * MEASURED)
    assert size.limit == 16


def test_it_tries_again_later() -> None:
    """Fails if one bad measurement decides a week."""
    size = BatchSize(64)
    run(size, lambda rows: float(rows), 6 * MEASURED)
    run(size, lambda _rows: 1.0, PATIENCE + 6 * MEASURED)
    assert size.limit == 64


def test_steps_with_prompts_are_not_measured_but_do_not_hold_it_back_for_ever() -> None:
    size = BatchSize(64)
    run(size, lambda _rows: 1.0, PATIENCE - 1, prompt_tokens=100)
    assert (size.limit, size.curve()) == (FIRST, {})
    run(size, lambda _rows: 1.0, 1, prompt_tokens=100)
    assert size.limit == 2 * FIRST


def test_it_never_exceeds_what_memory_holds() -> None:
    assert BatchSize(1).limit == 1
