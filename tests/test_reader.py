"""Threads that read: whatever goes wrong in one of them, who waits is told, and the others go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localmoe.errors import UsageError
from localmoe.experts.file import File
from localmoe.experts.layout import Range
from localmoe.experts.paging import Paging
from localmoe.experts.reader import THREADS, Cancelled, Job, Reader
from localmoe.experts.slots import TorchSlots
from tests.test_paged_experts import CONFIG, STATE, logits, opened, paged
from tests.tiny_v4 import write_published

SECONDS = 20.0


class Odd(Exception):
    """None of ours, and none of the system's."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("model"), CONFIG, STATE, shards=1)


def within(work: Callable[[], Any]) -> Any:
    """What work() returns or raises. Fails if that takes for ever."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert found, f"not done after {SECONDS} s"
    result, error = found[0]
    if error is not None:
        raise error
    return result


class Disk:
    """Gives zeros, and what goes wrong with them."""

    def __init__(self) -> None:
        self.wrong: set[str] = set()

    def open(self, _number: int) -> Disk:
        self.fail("open")
        return self

    def read(self, target: memoryview, _offset: int, _needed: int) -> None:
        self.fail("read")
        target[:] = bytes(len(target))

    def fail(self, where: str) -> None:
        if where in self.wrong:
            raise Odd(where)

    def close(self) -> None: ...


@pytest.mark.parametrize("urgent", [True, False])
@pytest.mark.parametrize("where", ["open", "read", "finish"])
def test_an_error_of_any_kind_reaches_who_waits(where: str, urgent: bool) -> None:
    """More often than there are threads. Fails if who waits is never told, or a thread ends."""
    disk = Disk()
    reader = Reader(disk.open)  # type: ignore[arg-type]

    def submit() -> Job:
        part = Range(0, 0, 5 << 20, 0, 5 << 20)
        return reader.submit([part], memoryview(bytearray(5 << 20)), lambda: disk.fail("finish"), urgent=urgent)

    disk.wrong = {where}
    for _ in range(THREADS + 1):
        job = submit()
        with pytest.raises(Odd, match=where):
            within(lambda job=job: reader.wait(job))
    disk.wrong = set()
    within(lambda: reader.wait(submit()))
    before = reader.busy_seconds
    assert reader.busy_seconds == before, "nothing is being read"
    within(reader.close)


@pytest.mark.parametrize("slots", [2, 9])
@pytest.mark.parametrize("where", ["read", "finish"])
def test_a_pager_survives_an_error_of_any_kind(
    published: Path, where: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the step hangs, an expert that was half read is computed with, or close() does not return."""
    engine, plain = opened(published, Paging(slots=slots)), opened(published, Paging())
    good, calls = logits(plain), [0]
    broken = {"read": (File, "read"), "finish": (TorchSlots, "put")}[where]
    real = getattr(*broken)

    def odd(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] % 7 == 0:
            raise Odd(where)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*broken, odd)
        for _ in range(THREADS + 1):
            with pytest.raises(Odd, match=where):
                within(lambda: logits(engine))
            paged(engine).check()
    assert within(lambda: logits(engine)).equal(good)
    within(paged(engine).close)


def test_what_is_closed_waits_for_nothing() -> None:
    """Fails if who waits for what will not be read any more does so for ever."""
    reader = Reader(Disk().open, threads=1)  # type: ignore[arg-type]
    begun, gate, part = threading.Event(), threading.Event(), Range(0, 0, 8, 0, 8)

    def submit(finish: Callable[[], object], *, urgent: bool) -> Job:
        return reader.submit([part], memoryview(bytearray(8)), finish, urgent=urgent)  # type: ignore[arg-type]

    first = submit(lambda: (begun.set(), gate.wait(SECONDS)), urgent=True)
    assert begun.wait(SECONDS)
    others = [submit(lambda: None, urgent=urgent) for urgent in (True, False)]
    closing = threading.Thread(target=reader.close, daemon=True)
    closing.start()
    for job in others:
        with pytest.raises(Cancelled):
            within(lambda job=job: reader.wait(job))
    gate.set()
    within(lambda: reader.wait(first))
    closing.join(SECONDS)
    assert not closing.is_alive()
    with pytest.raises(UsageError, match="has been closed"):
        submit(lambda: None, urgent=True)
