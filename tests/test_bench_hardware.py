"""Hardware rows: what is read is what was asked for, and no file stays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from localmoe.bench import hardware
from localmoe.bench.hardware import Place, buffers_for, check_room, disk_rows, memory_rows, rates, read_pieces, row
from localmoe.bench.measure import Spread
from localmoe.errors import ResourceError, UsageError

MIB = 1 << 20


def silent(_doing: str) -> None:
    pass


def test_a_rate_is_amount_per_second_and_the_best_is_the_fastest() -> None:
    """Fails if bytes per second would be printed as seconds per byte, or the best be the slowest."""
    record = row("x", Spread((1e9, 4e9, 2e9)))
    assert (record["median"], record["best"], record["unit"]) == (2.0, 4.0, "GB/s")
    assert row("x", Spread((3e12,)), unit="TFLOP/s")["median"] == 3.0


def test_rates_count_each_repetition_but_the_first() -> None:
    calls: list[int] = []
    assert len(rates(lambda: calls.append(1), 1.0, 4).samples) == 4
    assert len(calls) == 5


@pytest.mark.parametrize("readers", [1, 3])
def test_every_piece_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: int) -> None:
    """Fails if several readers would share out the work with gaps or twice."""
    (tmp_path / "f").write_bytes(bytes(10 * 4096))
    pieces = [(i * 4096, 4096) for i in range(10)]
    seen: list[tuple[int, int]] = []
    preadv = os.preadv

    def record(fd: int, buffers: Any, offset: int) -> int:
        seen.append((offset, len(buffers[0])))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", record)
    with open(tmp_path / "f", "rb") as file:
        read_pieces(file.fileno(), pieces, buffers_for(readers))
    assert sorted(seen) == pieces


def test_a_short_read_is_an_error(tmp_path: Path) -> None:
    """Fails if bytes that never came would count as speed."""
    (tmp_path / "f").write_bytes(bytes(100))
    with open(tmp_path / "f", "rb") as file, pytest.raises(ResourceError, match="100 of 4096"):
        read_pieces(file.fileno(), [(0, 4096)], buffers_for(1))


def test_no_file_is_left_or_even_seen(tmp_path: Path) -> None:
    """Fails if a kill in the middle would leave gigabytes behind."""
    for record in disk_rows(Place(tmp_path, 16 * MIB), 2, silent):
        assert record["median"] > 0
        assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_no_file(tmp_path: Path) -> None:
    rows = disk_rows(Place(tmp_path, 16 * MIB), 2, silent)
    next(rows)
    with pytest.raises(KeyboardInterrupt):
        rows.throw(KeyboardInterrupt)
    assert not list(tmp_path.iterdir())


def test_memory_is_read_with_one_thread_and_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the threads would stay at one for what is measured after it."""
    used: list[int] = []
    monkeypatch.setattr(hardware, "BUFFER_BYTES", MIB)
    monkeypatch.setattr(hardware, "use_threads", lambda count, _library: used.append(count))
    names = [record["what"] for record in memory_rows(None, 2, 2, silent)]
    assert names == ["memory read, 1 thread", "memory read, 2 threads", "memory copy, 2 threads"]
    assert used == [1, 2, 2, 2]


def test_lack_of_room_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the disk would be filled to the last byte, or memory be swapped."""
    with pytest.raises(ResourceError, match=r"more than half of the .* GiB free"):
        check_room(Place(tmp_path, 1 << 60))
    with pytest.raises(UsageError, match="not a directory"):
        check_room(Place(tmp_path / "absent", MIB))
    monkeypatch.setattr(hardware, "available_memory", lambda: 1 << 30)
    with pytest.raises(ResourceError, match=r"3\.0 GiB of RAM and 1\.0 GiB"):
        check_room(Place(tmp_path, MIB))
