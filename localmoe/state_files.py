"""States of engine sessions in one folder: written within a limit, and found again by the tokens they begin with.

Knows files and token ids; does not know conversations. Looking for a prefix reads the heads of the files only, which
say what they can be continued from. Removing a state loses nothing but time: its tokens can be read again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localmoe.errors import CheckpointError, ResourceError
from localmoe.files import shown
from localmoe.identity import difference
from localmoe.session import Session, saved_ends
from localmoe.snapshot import Snapshot, open_file, prefix_digests, read_head, stored_nbytes, write_file

if TYPE_CHECKING:
    from localmoe.api import LLM

STATE, PREFIXES = ".state", "prefixes"
# A writer that has not finished in this time was killed.
_ABANDONED_SECONDS = 24 * 3600


class StateFiles:
    """FOLDER/*.state and FOLDER/prefixes/*.state, together of at most max_bytes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def write(self, path: Path, snapshot: Snapshot, llm: LLM) -> None:
        """Save a session's state; one writer at a time of the same path. Prefixes make room for it, those used longest
        ago first, and then conversations, but those not for a prefix.

        Raises ResourceError if they do not leave enough, OSError."""
        snapshot = Snapshot(snapshot.facts | llm.identity(), snapshot.tensors)
        self._make_room(stored_nbytes(snapshot), path)
        write_file(path, snapshot)

    def used(self, path: Path) -> None:
        """Remember that a state was of use."""
        # It may be another's, or gone by now.
        try:
            os.utime(path)
        except OSError:
            return

    def find(self, ids: Sequence[int], llm: LLM, at_least: int) -> tuple[Session, int] | None:
        """A session that can go on from the longest beginning of ids that any saved state has read, and its length.

        session.begin(ids) then keeps so many. Less than all of ids; None if there is nothing of at_least so many.
        States of other models and damaged ones are passed over."""
        if len(ids) <= at_least:
            return None
        ends = sorted((end for end in self._ends(llm) if end[0] >= at_least), key=lambda end: -end[0])
        # One token must be left to get logits from.
        digests = prefix_digests(ids[:-1], {length for length, _digest, _path in ends})
        for length, digest, path in ends:
            if digests.get(length) != digest:
                continue
            session = llm.session()
            try:
                with open_file(path) as file:
                    session.restore(file)
            except CheckpointError:
                continue
            if session.ids[:length] == list(ids[:length]):
                self.used(path)
                return session, length
        return None

    def paths(self) -> list[Path]:
        """All states, of conversations and prefixes."""
        return [*self.folder.glob(f"*{STATE}"), *(self.folder / PREFIXES).glob(f"*{STATE}")]

    def _ends(self, llm: LLM) -> Iterator[tuple[int, str, Path]]:
        """What states of this model can be continued from: length, digest of so many ids, file."""
        model = llm.identity()
        for path in self.paths():
            try:
                with open_file(path) as file:
                    head = read_head(file)
                lengths = saved_ends(head)
            except CheckpointError:
                continue
            if difference(head.facts, model) is None:
                digests = [digest for _length, digest in head.facts["ends"]]
                yield from ((n, digest, path) for n, digest in zip(lengths, digests, strict=True) if n > 0)

    def _make_room(self, need: int, path: Path) -> None:
        """Remove states until `need` bytes more fit; the one at `path` will be replaced and does not count.

        Raises ResourceError, having removed none, if too few may be removed."""
        abandoned = time.time() - _ABANDONED_SECONDS
        for folder in (self.folder, self.folder / PREFIXES):
            for partial in folder.glob(f".*{STATE}.partial"):
                if _stat(partial)[0] < abandoned:
                    partial.unlink(missing_ok=True)
        # Whoever saved a conversation asked for it; prefixes are kept unasked.
        found = sorted((other.parent == self.folder, *_stat(other), other) for other in self.paths() if other != path)
        total = need + sum(nbytes for *_, nbytes, _path in found)
        removable = [each for each in found if path.parent == self.folder or not each[0]]
        if total - sum(nbytes for *_, nbytes, _path in removable) > self.max_bytes:
            raise ResourceError(
                f"{shown(path)}: needs {need} bytes, saved states may have {self.max_bytes} together; "
                "remove saved sessions that are of no more use"
            )
        for *_, nbytes, other in removable:
            if total <= self.max_bytes:
                break
            other.unlink(missing_ok=True)
            total -= nbytes


def _stat(path: Path) -> tuple[float, int]:
    """Time of last use and bytes; zeros for a file that has just gone."""
    try:
        info = path.stat()
    except OSError:
        return 0.0, 0
    return info.st_mtime, info.st_size
