"""A file of JSON lines that only grows, one row each, for one process at a time.

A process that dies while it writes loses at most a line, which is cut off at the next start. Knows rows as objects;
does not know what is in them. Memory: one row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from localmoe.errors import UsageError
from localmoe.files import full_disk, parse_json, pwrite_all, replacing, shown
from localmoe.locks import lock

# Rows are looked at in terminals and cut into lines by other programs: what those obey or take for an end is escaped.
_UNSAFE = (*range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x2070), *range(0xFFF9, 0xFFFC))
_ESCAPED = {code: json.dumps(chr(code))[1:-1] for code in (*_UNSAFE, *range(0xE0000, 0xE0080))}


class RowFile:
    """Locked when it is made; open() it, and close() it in any case."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError if it cannot be written to, or another process writes it."""
        self.path = path
        if path.is_dir() or path.is_symlink() or not path.absolute().parent.is_dir():
            raise UsageError(f"{shown(path)}: cannot be written to; expected a file in a folder that there is")
        self._lock = lock(path.absolute().with_name(f".{path.name}.lock"), path)
        self._fd = -1
        self._end = 0

    def set_aside(self) -> None:
        """Begin anew; nothing is ever thrown away without being looked at."""
        if self.path.exists():
            os.replace(self.path, self.path.with_name(f"{self.path.name}.old"))

    def open(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Place, length and content of each row there is; add() may be called once all have been read.

        Raises UsageError for a line that is no row."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o666)
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._fd, self._end)
                    break
                name = f"{shown(self.path)}: byte {self._end}"
                yield self._end, len(line), parse_json(line, name, UsageError, "begin anew with --restart")
                self._end += len(line)

    def add(self, row: dict[str, Any]) -> tuple[int, int]:
        """Append a row; returns its place and length. Raises ResourceError if the disk is full."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_ESCAPED).encode() + b"\n"
        at = self._end
        with full_disk(self.path):
            pwrite_all(self._fd, memoryview(line), at)
        self._end += len(line)
        return at, len(line)

    def read(self, at: int, length: int) -> bytes:
        """A row as it was written, also after rewrite()."""
        return os.pread(self._fd, length, at)

    def sync(self) -> None:
        """Put on the disk what is not there yet."""
        os.fsync(self._fd)

    def rewrite(self, rows: Iterable[bytes]) -> None:
        """Have these rows and no others, all or nothing. Nothing can be added afterwards."""
        with full_disk(self.path), replacing(self.path) as fd:
            at = 0
            for row in rows:
                pwrite_all(fd, memoryview(row), at)
                at += len(row)

    def close(self) -> None:
        """All rows are on the disk afterwards."""
        try:
            if self._fd >= 0:
                os.fsync(self._fd)
                os.close(self._fd)
        finally:
            os.close(self._lock)
