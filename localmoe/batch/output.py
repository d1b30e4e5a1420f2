"""The output of a batch: a file of JSON lines that only grows, and what is known of it when a run goes on.

A process that dies while it writes loses at most a line, which is cut off at the next start. When all is done, the
lines are put in the order of the input, the last one of each id. Memory: a hundred bytes or so per request."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from localmoe.batch.input import Survey, key
from localmoe.errors import ModelError, UsageError
from localmoe.files import MIB, full_disk, parse_json, read_json, replacing, shown, write_atomically
from localmoe.locks import lock

SYNC_ROWS, SYNC_SECONDS = 64, 5.0
# Rows are looked at in terminals and cut into lines by other programs: what those obey or take for an end is escaped.
_UNSAFE = (*range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x2070), *range(0xFFF9, 0xFFFC))
_ESCAPED = {code: json.dumps(chr(code))[1:-1] for code in (*_UNSAFE, *range(0xE0000, 0xE0080))}


class Output:
    """Open one, then add() rows; close() in any case."""

    def __init__(self, path: Path, state: dict[str, Any], *, restart: bool) -> None:
        """state: what the output is made of. Raises UsageError if it is another's, or was made of something else."""
        self.path, self._state_path = path, path.with_name(f"{path.name}.state.json")
        if path.is_dir() or path.is_symlink() or not path.absolute().parent.is_dir():
            raise UsageError(f"{shown(path)}: cannot be written to; expected a file in a folder that there is")
        self._lock = lock(path.absolute().with_name(f".{path.name}.lock"))
        try:
            self._begin(state, restart)
        except BaseException:
            os.close(self._lock)
            raise

    def _begin(self, state: dict[str, Any], restart: bool) -> None:
        if restart and self.path.exists():
            # Nothing is ever thrown away without being looked at.
            os.replace(self.path, self.path.with_name(f"{self.path.name}.old"))
        elif self.path.exists():
            self._compare(state)
        with full_disk(self.path):
            write_atomically(self._state_path, json.dumps(state).encode())
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._unsynced, self._synced = 0, time.monotonic()
        # Of each id, the place of its last row, the digest of its request, and whether it failed.
        self.rows: dict[bytes, tuple[int, int, str, bool]] = {}
        self._scan()

    def _compare(self, state: dict[str, Any]) -> None:
        if not self._state_path.exists():
            raise UsageError(
                f"{shown(self.path)}: was not made by a batch; choose another, or begin anew with --restart"
            )
        saved = read_json(self._state_path, MIB, ModelError)
        wrong = next((name for name, value in state.items() if saved.get(name) != value), None)
        if wrong is not None:
            raise UsageError(f"{shown(self.path)}: was made with another {wrong}; choose another file, or --restart")

    def _scan(self) -> None:
        at = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._fd, at)
                    break
                self._note(line, at)
                at += len(line)
        self._end = at

    def _note(self, line: bytes, at: int) -> None:
        row = parse_json(line, f"{shown(self.path)}: byte {at}", UsageError, "begin anew with --restart")
        try:
            digest, failed = str(row["response"]["request_id"]), row["error"] is not None
            self.rows[key(row["custom_id"])] = (at, len(line), digest, failed)
        except (KeyError, TypeError, AttributeError):
            raise UsageError(f"{shown(self.path)}: byte {at} begins no row of a batch; use --restart") from None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. Raises ResourceError if the disk is full."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_ESCAPED).encode() + b"\n"
        with full_disk(self.path):
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        self._note(line, self._end)
        self._end += len(line)
        self._unsynced += 1
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """Put on the disk what has waited long enough."""
        if self._unsynced >= SYNC_ROWS or (self._unsynced and time.monotonic() - self._synced > SYNC_SECONDS):
            os.fsync(self._fd)
            self._unsynced, self._synced = 0, time.monotonic()

    def sort(self, survey: Survey) -> None:
        """Rewrite in the order of the input, each id once; rows of ids that are not in it come last."""
        last = len(survey.order)
        rows = sorted(self.rows.items(), key=lambda row: (survey.order.get(row[0], last), row[1][0]))
        with full_disk(self.path), replacing(self.path) as fd:
            for _key, (at, length, _digest, _failed) in rows:
                rest = memoryview(os.pread(self._fd, length, at))
                while rest:
                    rest = rest[os.write(fd, rest) :]

    def close(self) -> None:
        """All rows are on the disk afterwards."""
        os.fsync(self._fd)
        os.close(self._fd)
        os.close(self._lock)
