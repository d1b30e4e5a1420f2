"""Guesses are read after everything else, cost nothing when they are wrong, and stop when they mostly are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from localmoe.errors import ReadError
from localmoe.experts import guesses as module
from localmoe.experts.guesses import Guesses
from localmoe.experts.layout import Range
from localmoe.experts.reader import Cancelled, Job, Reader
from localmoe.experts.residency import MOST_GUESSES, guess_slots

PART = Range(0, 0, 8, 0, 8)


@dataclass
class Disk:
    """A file whose reads wait until they are let go; notes what was read."""

    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    offsets: list[int] = field(default_factory=list)
    broken: bool = False

    def read(self, target: memoryview, offset: int, needed: int) -> None:
        self.started.release()
        assert self.gate.wait(10), "nobody opened the gate"
        self.offsets.append(offset)
        if self.broken:
            raise ReadError("the disk is broken")
        target[:] = bytes([offset]) * len(target)

    def close(self) -> None: ...


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def reader(disk: Disk) -> Iterator[Reader]:
    found = Reader(lambda _number: disk, threads=1)  # type: ignore[arg-type, return-value]
    yield found
    disk.gate.set()
    found.close()


def submit(reader: Reader, number: int, *, urgent: bool = True, nbytes: int = 8) -> Job:
    part = Range(0, number, nbytes, 0, nbytes)
    return reader.submit([part], memoryview(bytearray(nbytes)), lambda: None, urgent=urgent)


def test_what_is_urgent_is_read_first(reader: Reader, disk: Disk) -> None:
    """Fails if a guess that was submitted earlier delays what the layer waits for."""
    submit(reader, 1)
    disk.started.acquire()
    patient, urgent, hurried = submit(reader, 2, urgent=False), submit(reader, 3), submit(reader, 4, urgent=False)
    reader.hurry(hurried)
    disk.gate.set()
    for job in (urgent, hurried, patient):
        reader.wait(job)
    assert disk.offsets == [1, 3, 4, 2]


def test_a_cancelled_job_is_not_read(reader: Reader, disk: Disk) -> None:
    """Fails if a wrong guess is read to its end, or whoever waits for its memory waits for ever."""
    submit(reader, 1)
    disk.started.acquire()
    job = submit(reader, 2, urgent=False, nbytes=5 << 20)
    before = reader.bytes_read
    reader.cancel(job)
    reader.settle(job)
    assert isinstance(job.error, Cancelled)
    disk.gate.set()
    reader.wait(submit(reader, 3))
    assert disk.offsets == [1, 3]
    assert reader.bytes_read - before == 16


def test_a_job_that_is_being_read_ends_before_its_memory_is_used_again(reader: Reader, disk: Disk) -> None:
    """Fails if a cancelled read can still write into a slot that has another expert by then."""
    job = submit(reader, 2, urgent=False)
    disk.started.acquire()
    reader.cancel(job)
    assert not job.done
    disk.gate.set()
    reader.settle(job)
    assert isinstance(job.error, Cancelled)


def test_a_guess_that_was_given_up_while_it_was_read_is_no_guess(reader: Reader, disk: Disk) -> None:
    """Fails if whoever asks for the expert a moment later is told that reading it was cancelled."""
    table = Table(reader)
    table.guesses.begin([5], table.read)
    disk.started.acquire()
    table.guesses.judge([])
    threading.Timer(0.05, disk.gate.set).start()
    assert table.guesses.claim(5, 3) is None
    assert table.guesses.counts.true == 0
    reader.wait(submit(reader, 5))


def test_an_urgent_or_finished_job_cannot_be_cancelled(reader: Reader, disk: Disk) -> None:
    """Fails if a guess that came true is thrown away with the wrong ones."""
    disk.gate.set()
    done = submit(reader, 1, urgent=False)
    reader.wait(done)
    reader.cancel(done)
    urgent = submit(reader, 2)
    reader.cancel(urgent)
    reader.wait(urgent)
    assert done.error is None


class Table:
    """Guesses in slots 10 and 11 over a disk; notes which were cleared."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.cleared = reader, list[int]()
        self.guesses = Guesses([10, 11], reader, self.cleared.append)
        self.slots: dict[int, int] = {}

    def read(self, key: int, slot: int) -> Job:
        self.slots[key] = slot
        return submit(self.reader, key, urgent=False)


def test_a_true_guess_exchanges_slots(reader: Reader, disk: Disk) -> None:
    """Fails if a slot is lost or shared when a guess comes true."""
    disk.gate.set()
    table = Table(reader)
    table.guesses.begin([5, 6, 7], table.read)
    assert sorted(table.slots) == [5, 6]
    found = table.guesses.claim(5, 3)
    assert found is not None
    assert found[0] == table.slots[5]
    table.guesses.begin([8], table.read)
    assert table.slots[8] == 3
    assert (table.guesses.counts.made, table.guesses.counts.true) == (3, 1)
    assert table.guesses.claim(5, 3) is None


def test_the_oldest_guess_makes_room(reader: Reader, disk: Disk) -> None:
    """Fails if guesses end when their slots are full, or the table goes on pointing at overwritten bytes."""
    disk.gate.set()
    table = Table(reader)
    table.guesses.begin([5, 6], table.read)
    table.guesses.begin([6, 7], table.read)
    assert table.cleared == [5]
    assert table.slots[7] == table.slots[5]


def test_a_guess_that_could_not_be_read_is_no_guess(reader: Reader, disk: Disk) -> None:
    """Fails if an error is told to somebody who never asked, or a broken expert is handed out."""
    disk.broken = True
    disk.gate.set()
    table = Table(reader)
    table.guesses.begin([5], table.read)
    reader.settle(table.guesses._read[5][1])
    assert table.guesses.claim(5, 3) is None
    assert table.cleared == [5]
    table.guesses.begin([6, 7], table.read)
    assert {table.slots[6], table.slots[7]} == {10, 11}


def test_a_layer_that_asks_for_others_stops_the_reading(reader: Reader, disk: Disk) -> None:
    """Fails if wrong guesses go on being read while the layer waits, or a right one is stopped."""
    table = Table(reader)
    submit(reader, 1)
    disk.started.acquire()
    table.guesses.begin([5, 6], table.read)
    table.guesses.judge([6])
    disk.gate.set()
    found = table.guesses.claim(6, 3)
    assert found is not None
    reader.wait(found[1])
    assert disk.offsets == [1, 6]


def test_guessing_pauses_where_it_fails(reader: Reader, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model whose experts cannot be foreseen pays for guesses for ever, or is never tried again."""
    monkeypatch.setattr(module, "_PAUSE", 3)
    disk.gate.set()
    table = Table(reader)
    for key in range(0, 128, 2):
        assert table.guesses.worthwhile()
        table.guesses.begin([key, key + 1], table.read)
        table.guesses.judge([])
    assert [table.guesses.worthwhile() for _ in range(5)] == [False, False, False, True, True]


def test_guesses_take_a_small_share_of_the_slots() -> None:
    """Fails if two slots are halved for guesses, or a large machine sets gigabytes apart."""
    assert [guess_slots(n) for n in (2, 15, 16, 64, 10_000)] == [0, 0, 1, 4, MOST_GUESSES]
