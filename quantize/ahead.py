"""The next of a series is made by another thread while this one is used: reading and rounding beside writing.

Knows nothing of what it carries. Memory: one more of the series."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(series: Iterator[T]) -> Generator[T]:
    """The same series, one further on. What it raises is raised in its place; closing this waits for the last."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        following = thread.submit(next, series, _END)
        while (found := following.result()) is not _END:
            following = thread.submit(next, series, _END)
            yield found  # type: ignore[misc]
