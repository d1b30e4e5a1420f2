"""The next of a series are made by another thread while this one is used: reading and rounding beside writing.

Knows nothing of what it carries. Memory: `depth` more of the series."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(series: Iterator[T], depth: int) -> Generator[T]:
    """The same series, up to `depth` further on. What it raises is raised in its place; closing this waits for what is
    being made."""
    thread = ThreadPoolExecutor(1, "ahead")
    try:
        following = deque(thread.submit(next, series, _END) for _ in range(depth))
        while (found := following.popleft().result()) is not _END:
            following.append(thread.submit(next, series, _END))
            yield found  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)
