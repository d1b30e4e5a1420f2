"""Conversations on disk: a transcript that only grows, and the engine's state beside it when that is wanted.

Owns a folder: NAME.jsonl is the transcript, NAME.state the state, prefixes/ holds states that belong to no
conversation. A state is only ever a shortcut: one that does not fit is left out and said so, and the text is read
again. Nothing read from a file becomes a path. Memory: one transcript; states are streamed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from localmoe import transcript
from localmoe.conversation import Conversation, Point, from_lines, line_of
from localmoe.errors import CheckpointError, LocalMoeError, ResourceError, UsageError
from localmoe.files import full_disk, partial_of, shown
from localmoe.locks import lock
from localmoe.resume import restored
from localmoe.session import Session
from localmoe.state_files import PREFIXES, STATE, StateFiles

if TYPE_CHECKING:
    from localmoe.api import LLM

TRANSCRIPT, LOCK = ".jsonl", ".lock"
# Room for the longest suffix, the dot and the .partial of a file being written.
_MAX_NAME = 200


@dataclass(frozen=True)
class Saved:
    """One line of list(). updated: seconds since 1970. problem: why it cannot be loaded; the rest is then empty."""

    name: str
    title: str = ""
    messages: int = 0
    updated: float = 0.0
    state_nbytes: int = 0
    problem: str | None = None


class SessionStore:
    """The sessions of one folder. Several processes may use it; one saves to a session at a time."""

    def __init__(self, folder: Path, *, max_state_bytes: int = 16 << 30, wait_seconds: float = 10.0) -> None:
        """folder: made for its owner only if it is not there. max_state_bytes: of all states together, the least
        recently used are removed for new ones. wait_seconds: for another process that is saving the same session."""
        self.folder = folder
        self._wait = wait_seconds
        with _disk(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.states = StateFiles(folder, max_state_bytes)

    def save(self, name: str, conversation: Conversation) -> None:
        """Append what is new since the last save; what is said is on the disk when this returns. Cheap: no tensors.

        Raises UsageError if another conversation has that name, or another process has changed it since it was loaded;
        ResourceError if the disk does not take it."""
        with self._locked(name):
            self._append(name, conversation)

    def save_state(self, name: str, conversation: Conversation, llm: LLM) -> None:
        """save(), and the state of its engine session, so that load() need not read the conversation again.

        Raises also GenerationError if the session was interrupted within a step; the text is saved even then."""
        with self._locked(name):
            self._append(name, conversation)
            if conversation.session is not None:
                with _disk(self.folder):
                    self.states.write(self._file(name, STATE), conversation.session.snapshot(), llm)

    def load(self, name: str, llm: LLM | None = None) -> Conversation:
        """find() of a session that there must be. Raises UsageError if there is none, CheckpointError if its transcript
        is damaged or holds no finished turn."""
        found = self.find(name, llm)
        if found is not None:
            return found
        path = self._file(name, TRANSCRIPT)
        if path.exists():
            raise CheckpointError(f"{shown(path)}: holds no finished turn; start a new session")
        raise UsageError(f"there is no saved session {shown(name)} in {shown(self.folder)}")

    def find(self, name: str, llm: LLM | None = None) -> Conversation | None:
        """The conversation as it was last saved; with an llm, it has a session: the saved one if that fits, or empty.

        None if there is none of that name; one whose first turn was not completely saved is none. What was left out is
        told in its notices. Raises CheckpointError if its transcript is damaged."""
        path = self._file(name, TRANSCRIPT)
        found = transcript.read(path) if path.exists() else transcript.Transcript()
        if not found.lines:
            return None
        conversation, points = from_lines(found.lines, shown(path))
        conversation.saved_as = (name, found.tail)
        if found.torn:
            conversation.notices += ("the last turn was not completely saved and is left out",)
        if llm is not None:
            self._load_state(name, conversation, points, llm)
        return conversation

    def list(self) -> list[Saved]:
        """Every session of the folder, the last one used first."""
        names = [_name(path) for path in self.folder.glob(f"*{TRANSCRIPT}")]
        return sorted((self._saved(name) for name in names if name is not None), key=lambda s: -s.updated)

    def remove(self, name: str) -> None:
        """Take a session away, text and state. Raises UsageError if there is none of that name."""
        if not self._file(name, TRANSCRIPT).exists():
            raise UsageError(f"there is no saved session {shown(name)} in {shown(self.folder)}")
        with self._locked(name), _disk(self.folder):
            state = self._file(name, STATE)
            for path in (partial_of(state), state, self._file(name, TRANSCRIPT), self._file(name, LOCK)):
                path.unlink(missing_ok=True)

    def save_prefix(self, session: Session, llm: LLM, name: str | None = None, *, at: int | None = None) -> str:
        """Keep the state of a session that has read a system text or a document, for find_prefix(); returns its name.

        name: a later prefix of that name replaces it; by default one made from its tokens. at: one of the session's
        marks, to keep only what had been read there."""
        snapshot = session.snapshot(at)
        name = name or str(snapshot.facts["ends"][-1][1])
        folder = self.folder / PREFIXES
        with _disk(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            fd = locked(folder / LOCK, self._wait, shown(folder))
            try:
                self.states.write(folder / (file_stem(name) + STATE), snapshot, llm)
            finally:
                os.close(fd)
        return name

    def find_prefix(self, ids: Sequence[int], llm: LLM, *, at_least: int = 1) -> tuple[Session, int] | None:
        """A session that has read the longest beginning of ids that a saved state of this model can go on from, and
        how many tokens that is; None if there is none of at_least so many. Reads heads of states, and one state."""
        return self.states.find(ids, llm, at_least)

    def _append(self, name: str, conversation: Conversation) -> None:
        path = self._file(name, TRANSCRIPT)
        before = transcript.read(path) if path.exists() else transcript.Transcript()
        if before.lines and conversation.saved_as != (name, before.tail):
            ours = conversation.saved_as is not None and conversation.saved_as[0] == name
            problem = "was changed by another process" if ours else "is another conversation"
            raise UsageError(f"the saved session {shown(name)} {problem}; save under another name")
        saved = from_lines(before.lines, shown(path))[0] if before.lines else None
        line = line_of(conversation, saved)
        if not (before.lines and _nothing_new(line, before.lines[-1])):
            with _disk(path):
                before = transcript.append(path, before, line)
        conversation.title, conversation.updated = line["title"], line["updated"]
        conversation.saved_as = (name, before.tail)

    def _load_state(self, name: str, conversation: Conversation, points: Sequence[Point], llm: LLM) -> None:
        conversation.session = llm.session()
        path = self._file(name, STATE)
        if not path.exists():
            return
        try:
            session = restored(path, conversation, points, llm)
        except CheckpointError as problem:
            conversation.notices += (f"the saved state is not used and the text is read again: {problem}",)
            return
        conversation.session = session
        self.states.used(path)

    def _saved(self, name: str) -> Saved:
        try:
            found = self.load(name)
        except LocalMoeError as problem:
            return Saved(name, problem=str(problem))
        state = self._file(name, STATE)
        nbytes = state.stat().st_size if state.exists() else 0
        return Saved(name, found.title, len(found.messages), found.updated, nbytes)

    def _file(self, name: str, suffix: str) -> Path:
        return self.folder / (file_stem(name) + suffix)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Raises UsageError if another process keeps saving this session."""
        path = self._file(name, LOCK)
        with _disk(self.folder):
            fd = locked(path, self._wait, f"the saved session {shown(name)}")
        try:
            yield
        finally:
            os.close(fd)


def file_stem(name: str) -> str:
    """A session's name as a plain file name, never hidden, never a path; different names stay different.

    Raises UsageError if it is empty or too long."""
    try:
        stem = quote(name, safe="")
    except UnicodeEncodeError:
        raise UsageError("a session's name holds a lone surrogate; choose another") from None
    if stem.startswith("."):
        stem = "%2E" + stem[1:]
    if not 0 < len(stem) <= _MAX_NAME:
        raise UsageError(f"a session's name needs {len(stem)} bytes as a file name, expected 1 to {_MAX_NAME}")
    return stem


def locked(path: Path, wait_seconds: float, what: str) -> int:
    """Descriptor of a lock file, waited for. Raises UsageError naming `what` if another process keeps it."""
    deadline = time.monotonic() + wait_seconds
    while True:
        # Made here, because lock() would let others read it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            fd = lock(path)
        except UsageError:
            if time.monotonic() > deadline:
                raise UsageError(f"{what} is being saved by another process; try again when it is done") from None
            time.sleep(0.02)
            continue
        # Whoever removed the session removed the file that we waited for.
        if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
        os.close(fd)


def _nothing_new(line: dict[str, Any], last: dict[str, Any]) -> bool:
    settings = ("title", "thinking", "effort", "params", "tokens", "ids")
    return (
        not line["messages"]
        and line["keep"] == last["keep"] + len(last["messages"])
        and all(line[k] == last[k] for k in settings)
    )


def _name(path: Path) -> str | None:
    """The session whose transcript this is; None for a file that is not ours."""
    stem = path.name.removesuffix(TRANSCRIPT)
    name = unquote(stem, errors="replace")
    try:
        return name if file_stem(name) == stem else None
    except UsageError:
        return None


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Raises ResourceError for what the disk, or its owner, does not let us do."""
    try:
        with full_disk(path):
            yield
    except OSError as cause:
        raise ResourceError(f"{shown(path)}: cannot be written ({cause.strerror}); check its permissions") from None
