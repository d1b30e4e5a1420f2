"""What was typed in chats before, in a file that only its owner can read. Best effort: without it a chat works too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

# A longer message is hardly looked for with the arrow keys, and every start reads the whole file.
MAX_MESSAGE_CHARACTERS = 10_000
# Of a file that has grown to MAX, the latest KEPT bytes stay.
MAX_BYTES, KEPT_BYTES = 2 << 20, 1 << 20


def open_history(path: Path | None) -> History:
    """The history in a file, made with mode 0600; one that ends with the chat if path is None or cannot be used."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        with open(fd, "rb+") as file:
            os.fchmod(fd, 0o600)
            size = os.fstat(fd).st_size
            if size > MAX_BYTES:
                kept = os.pread(fd, KEPT_BYTES, size - KEPT_BYTES)
                file.truncate(0)
                # Entries begin with an empty line and a comment.
                file.write(b"\n#" + kept.partition(b"\n\n#")[2])
    except OSError:
        return InMemoryHistory()
    return _File(str(path))


def history_path() -> Path:
    """Where the file is, by the rules of the system."""
    from platformdirs import user_state_path

    return user_state_path("localmoe", appauthor=False) / "chat-history"


class _File(FileHistory):
    def load_history_strings(self) -> list[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        # Lone surrogates are input that was not UTF-8, and are no message; a full disk must not end the chat.
        with contextlib.suppress(OSError, UnicodeError):
            string.encode()
            if len(string) <= MAX_MESSAGE_CHARACTERS:
                super().store_string(string)
