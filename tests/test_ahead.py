"""A series that is made ahead is the same series."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from localmoe.quantize.ahead import ahead


def test_it_is_the_same_series() -> None:
    for length in range(7):
        assert list(ahead(iter(range(length)), 3)) == list(range(length))


def test_it_is_made_before_it_is_asked_for() -> None:
    """Fails if nothing is made while the first is used, or more than there is room for."""
    made = []
    third = threading.Event()

    def series() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            if i == 2:
                third.set()
            yield i

    found = ahead(series(), 3)
    assert next(found) == 0
    assert third.wait(10)
    assert len(made) <= 5
    found.close()


def test_what_goes_wrong_is_raised_in_its_place() -> None:
    def series() -> Iterator[int]:
        yield 1
        raise ValueError("two")

    found = ahead(series(), 4)
    assert next(found) == 1
    with pytest.raises(ValueError, match="two"):
        next(found)


def test_closing_it_ends_the_work() -> None:
    """Fails if a series without an end goes on after nobody wants it."""
    made = []

    def series() -> Iterator[int]:
        while True:
            made.append(1)
            yield 1

    found = ahead(series(), 2)
    next(found)
    found.close()
    count = len(made)
    assert count == len(made)
    assert all(not thread.name.startswith("ahead") or not thread.is_alive() for thread in threading.enumerate())
