"""Files we did not write: limits, strict JSON, printable names."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.errors import CheckpointError, ResourceError
from localmoe.files import (
    full_disk,
    open_regular,
    parse_json,
    pread_into,
    read_json,
    replacing,
    shown,
    sized,
    write_atomically,
)

HOSTILE_JSON = {
    "deep lists": (b"[" * 100_000, "deep"),
    "deep objects": (b'{"a":' * 100_000, "deep"),
    "duplicate key": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key c appears twice"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "Infinity": (b'{"a": -Infinity}', "Infinity"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
    "cut": (b'{"a": [1, 2', "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "list": (b"[1]", "expected a JSON object"),
    "too many values": (b'{"a": [' + b"[]," * 1_100_000 + b"[]]}", "more than"),
}


@pytest.mark.parametrize("name", list(HOSTILE_JSON))
def test_hostile_json_is_refused_in_one_sentence(name: str) -> None:
    """Fails if Python's own parser decides: it keeps the last duplicate, reads NaN, and runs out of stack or memory."""
    raw, expected = HOSTILE_JSON[name]
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        parse_json(raw, "x.json", CheckpointError)
    assert time.monotonic() - started < 1
    message = str(caught.value)
    assert message.startswith("x.json: ")
    assert expected in message
    assert "\n" not in message
    assert len(message) < 400


@given(st.text())
def test_shown_text_has_no_control_or_invisible_characters(text: str) -> None:
    """Fails if a name from a file can move the cursor, turn the writing direction, or fill the screen."""
    assert shown(text).isprintable()
    assert len(shown(text)) <= 120 * 10 + 3


def test_shown_escapes_a_terminal_sequence_and_cuts_a_long_name() -> None:
    """Fails if ESC reaches the terminal, or a 10 MB name the message."""
    assert shown("a\x1b]0;pwn\x07") == r"a\x1b]0;pwn\x07"
    assert len(shown("n" * 10_000_000)) == 123
    assert shown([[1] * 1000] * 1000) == "a list of 1000"


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    """Fails if the size is checked after reading. The file is sparse: 1 TB that takes no disk."""
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match="expected at most 1000"):
        read_json(path, 1000, CheckpointError)


def test_a_pipe_or_directory_is_refused_at_once(tmp_path: Path) -> None:
    """Fails if opening a FIFO waits for a writer that never comes."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(CheckpointError, match="not a regular file"):
            open_regular(path, CheckpointError)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Fails if OSError escapes."""
    with pytest.raises(CheckpointError, match=r"nothing\.json: cannot be opened"):
        read_json(tmp_path / "nothing.json", 1000, CheckpointError)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a half-filled buffer is used."""
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    fd, size = open_regular(path, CheckpointError)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: _short_read(fd, buffers[0], at))
    buffer = bytearray(size - 3)
    pread_into(fd, memoryview(buffer), 3, "data", CheckpointError)
    os.close(fd)
    assert buffer == bytes(range(3, 100))


def _short_read(fd: int, buffer: memoryview, at: int) -> int:
    part = os.pread(fd, min(7, len(buffer)), at)
    buffer[: len(part)] = part
    return len(part)


def test_a_read_error_names_file_and_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an I/O error escapes as a traceback, or does not say where."""

    def broken(fd: int, buffers: list[memoryview], at: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="data: reading at byte 40 failed"):
        pread_into(0, memoryview(bytearray(10)), 40, "data", CheckpointError)


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a file is written in place, or half of one is left behind."""
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, broken)
        with pytest.raises(OSError, match="Input/output error"):
            write_atomically(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at, real=os.pwrite: real(fd, data[:2], at))
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_lack_of_room_is_one_sentence_and_nothing_is_left(code: int, tmp_path: Path) -> None:
    """Fails if a full disk, quota or file is an OSError, or what was written of a file stays."""
    path = tmp_path / "file"
    full = pytest.raises(ResourceError, match="file: the disk is full; free some disk space")
    with full, full_disk(path), replacing(path) as fd:
        os.write(fd, b"half")
        raise OSError(code, "no room")
    assert not list(tmp_path.iterdir())
    with pytest.raises(PermissionError), full_disk(path):
        raise PermissionError


def test_sizes_are_printed_in_powers_of_1024() -> None:
    assert [sized(n) for n in (0, 10_256_000, 1 << 30, 160_210_000_000)] == [
        "0.0 MiB", "9.8 MiB", "1.00 GiB", "149.21 GiB",
    ]  # fmt: skip
