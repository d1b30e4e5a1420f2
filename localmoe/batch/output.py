"""The output of a batch: its rows, what they were made of, and what is known of them when a run goes on.

When all is done, the rows are put in the order of the input, the last one of each id. Memory: two hundred bytes or so
per request."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from localmoe.batch.input import Survey, key
from localmoe.batch.rows import RowFile
from localmoe.errors import ModelError, UsageError
from localmoe.files import MIB, full_disk, read_json, shown, write_atomically

SYNC_ROWS, SYNC_SECONDS = 64, 5.0


class Row(NamedTuple):
    """Where the last row of an id is, the digest of its request, and whether it failed."""

    file: RowFile
    at: int
    length: int
    digest: str
    failed: bool


class Output:
    """Open one, then add() rows; close() in any case."""

    def __init__(self, path: Path, state: dict[str, Any], *, restart: bool) -> None:
        """state: what the output is made of. Raises UsageError if it is another's, or was made of something else."""
        self._state_path = path.with_name(f"{path.name}.state.json")
        self._unsynced, self._synced = 0, time.monotonic()
        self.rows: dict[bytes, Row] = {}
        self._file = RowFile(path)
        try:
            self._begin(state, restart)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, state: dict[str, Any], restart: bool) -> None:
        if restart:
            self._file.set_aside()
        elif self._file.path.exists():
            self._compare(state)
        with full_disk(self._file.path):
            write_atomically(self._state_path, json.dumps(state).encode())
        for at, length, row in self._file.open():
            self._note(self._file, at, length, row)

    def _compare(self, state: dict[str, Any]) -> None:
        name = shown(self._file.path)
        if not self._state_path.exists():
            raise UsageError(f"{name}: was not made by a batch; choose another, or begin anew with --restart")
        saved = read_json(self._state_path, MIB, ModelError)
        wrong = next((fact for fact, value in state.items() if saved.get(fact) != value), None)
        if wrong is not None:
            raise UsageError(f"{name}: was made with another {wrong}; choose another file, or --restart")

    def _note(self, file: RowFile, at: int, length: int, row: dict[str, Any]) -> None:
        try:
            digest, failed = str(row["response"]["request_id"]), row["error"] is not None
            self.rows[key(row["custom_id"])] = Row(file, at, length, digest, failed)
        except (KeyError, TypeError, AttributeError):
            raise UsageError(f"{shown(file.path)}: byte {at} begins no row of a batch; use --restart") from None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. Raises ResourceError if the disk is full."""
        self._note(self._file, *self._file.add(row), row)
        self._unsynced += 1
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """Put on the disk what has waited long enough."""
        if self._unsynced >= SYNC_ROWS or (self._unsynced and time.monotonic() - self._synced > SYNC_SECONDS):
            self._file.sync()
            self._unsynced, self._synced = 0, time.monotonic()

    def sort(self, survey: Survey) -> None:
        """Rewrite in the order of the input, each id once; rows of ids that are not in it come last."""
        last = len(survey.order)
        rows = sorted(self.rows.items(), key=lambda row: (survey.order.get(row[0], last), row[1].at))
        self._file.rewrite(row.file.read(row.at, row.length) for _key, row in rows)

    def close(self) -> None:
        """All rows are on the disk afterwards."""
        self._file.close()
