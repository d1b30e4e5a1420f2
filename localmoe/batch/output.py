"""The output of a batch: its rows, what they were made of, and what is known of them when a run goes on.

When all is done, the rows are put in the order of the input, the last one of each id. Memory: two hundred bytes or so
per request."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from localmoe.batch.duration import Pace, measured
from localmoe.batch.input import Survey, key
from localmoe.batch.rows import RowFile
from localmoe.errors import ModelError, UsageError
from localmoe.files import MIB, full_disk, read_json, shown, write_atomically

SYNC_ROWS, SYNC_SECONDS = 64, 5.0
_ERRORS, _PACE = "errors file", "requests and seconds of the last run"


class Row(NamedTuple):
    """Where the last row of an id is, the digest of its request, and whether it failed."""

    file: RowFile
    at: int
    length: int
    digest: str
    failed: bool


class Output:
    """Open one, then add() rows; close() in any case."""

    def __init__(
        self,
        path: Path,
        state: dict[str, Any],
        *,
        errors: Path | None = None,
        restart: bool = False,
        changed_input: bool = False,
    ) -> None:
        """state: what the output is made of. errors: where rows of what failed are kept instead.

        changed_input: the rows may have been made of other lines; those of the same requests are kept.
        Raises UsageError if a file is another's, or was made of something else."""
        self._state_path, self.pace = _state_path(path), pace_of(path, state)
        self._unsynced, self._synced = 0, time.monotonic()
        self.rows: dict[bytes, Row] = {}
        self._files = [RowFile(path)]
        try:
            if errors is not None:
                self._files.append(RowFile(errors))
                # The two can be moved together.
                state = state | {_ERRORS: os.path.relpath(errors.absolute(), path.absolute().parent)}
            self._begin(state, restart, changed_input)
        except BaseException:
            self.close()
            raise

    def _begin(self, state: dict[str, Any], restart: bool, changed_input: bool) -> None:
        for file in self._files:
            if restart:
                file.set_aside()
            elif file.path.exists():
                self._compare(file, state, changed_input)
        self._state = state
        self._write_state()
        # What succeeded when it was tried again goes before what is left of its failure.
        for file in reversed(self._files):
            for at, length, row in file.open():
                self._note(file, at, length, row)

    def left(self, survey: Survey, chosen: range, *, retry_errors: bool) -> int:
        """How many of the chosen places have no row yet that would be kept, if they are asked as before."""
        done = (survey.order.get(id, -1) for id, row in self.rows.items() if not (row.failed and retry_errors))
        return len(chosen) - sum(place in chosen for place in done)

    def remember(self, pace: Pace) -> None:
        """For whoever asks how long the next run will take."""
        self.pace = pace
        self._write_state()

    def _write_state(self) -> None:
        known = {} if self.pace is None else {_PACE: self.pace.fact()}
        with full_disk(self._state_path):
            write_atomically(self._state_path, json.dumps(self._state | known).encode())

    def _compare(self, file: RowFile, state: dict[str, Any], changed_input: bool) -> None:
        """Raises UsageError unless this file can go on."""
        name, saved = shown(file.path), {}
        if self._state_path.exists():
            saved = read_json(self._state_path, MIB, ModelError)
        if not saved or (file is not self._files[0] and saved.get(_ERRORS) != state[_ERRORS]):
            raise UsageError(f"{name}: was not made by this batch; choose another, or begin anew with --restart")
        facts = state.keys() - {_ERRORS, "input" if changed_input else ""}
        wrong = next((fact for fact in state if fact in facts and saved.get(fact) != state[fact]), None)
        hint = ", or --allow-changed-input keeps what was asked in the same way" if wrong == "input" else ""
        if wrong is not None:
            raise UsageError(f"{name}: was made with another {wrong}; choose another file, or --restart{hint}")

    def _note(self, file: RowFile, at: int, length: int, row: dict[str, Any]) -> None:
        try:
            digest, failed = str(row["response"]["request_id"]), row["error"] is not None
            self.rows[key(row["custom_id"])] = Row(file, at, length, digest, failed)
        except (KeyError, TypeError, AttributeError):
            raise UsageError(f"{shown(file.path)}: byte {at} begins no row of a batch; use --restart") from None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. Raises ResourceError if the disk is full."""
        file = self._files[-1 if row["error"] is not None else 0]
        self._note(file, *file.add(row), row)
        self._unsynced += 1
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """Put on the disk what has waited long enough."""
        if self._unsynced >= SYNC_ROWS or (self._unsynced and time.monotonic() - self._synced > SYNC_SECONDS):
            for file in self._files:
                file.sync()
            self._unsynced, self._synced = 0, time.monotonic()

    def sort(self, survey: Survey) -> None:
        """Rewrite in the order of the input, each id once; rows of ids that are not in it come last."""
        last = len(survey.order)
        ordered = sorted(self.rows.items(), key=lambda row: (survey.order.get(row[0], last), row[1].at))
        # Rows that go from one file to the other are in both for a moment, not in none.
        for file in reversed(self._files):
            rows = (row for _key, row in ordered if file is self._files[-1 if row.failed else 0])
            file.rewrite(row.file.read(row.at, row.length) for row in rows)

    def close(self) -> None:
        """All rows are on the disk afterwards."""
        with contextlib.ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)


def pace_of(path: Path, state: dict[str, Any] | None = None) -> Pace | None:
    """How fast the last run of this output was; None if there was none that said so, or not of the state's model."""
    try:
        saved = read_json(_state_path(path), MIB, ModelError)
    except ModelError:
        return None
    return measured(saved.get(_PACE)) if state is None or saved.get("model") == state.get("model") else None


def _state_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.state.json")
