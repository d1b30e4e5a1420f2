"""What a chat takes from files and puts elsewhere: a file's text, the conversation, the clipboard.

Knows messages as plain data; never overwrites a file that is not its own."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localmoe.errors import UsageError
from localmoe.files import shown, write_atomically

# More than a context of a million tokens holds of most texts.
MAX_FILE_BYTES = 4 << 20
# What common terminals accept at least in one OSC 52, after base64.
MAX_CLIPBOARD_BYTES = 74_994 * 3 // 4


def read_text(path: Path) -> str:
    """The text of a file. Raises UsageError unless it is a regular file of UTF-8 text, not empty and not too large."""
    try:
        # Not to wait for the other end of a pipe.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{shown(path)} is not a regular file, expected a file of text")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as cause:
        raise UsageError(f"{shown(path)} cannot be read ({cause.strerror}); check the path") from None
    return text_of(data, shown(path))


def text_of(data: bytes, name: str) -> str:
    """The bytes of what is called `name` as text; MAX_FILE_BYTES + 1 of them are enough to see that it is too large.

    Raises UsageError unless they are UTF-8 text, not empty and not too large."""
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB; give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise UsageError(f"{name} is not UTF-8 text (byte {cause.start}); convert it") from None
    if "\0" in text or not text.strip():
        raise UsageError(f"{name} {'is empty' if not text.strip() else 'is not text'}, expected text")
    return text


class OwnFiles:
    """Writes files; those that were written before may be written over, all others may not."""

    def __init__(self) -> None:
        self._written: set[Path] = set()

    def write(self, path: Path, text: str) -> None:
        """Raises UsageError if the file is somebody else's or cannot be written."""
        try:
            path = path.parent.resolve() / path.name
            if path not in self._written and os.path.lexists(path):
                raise UsageError(f"{shown(path)} exists and was not written by this chat; choose another name")
            write_atomically(path, text.encode())
        except OSError as cause:
            raise UsageError(f"{shown(path)} cannot be written ({cause.strerror}); choose another place") from None
        self._written.add(path)


def as_json(model: str, messages: Sequence[dict[str, Any]]) -> str:
    """The conversation as OpenAI-style messages."""
    return json.dumps({"model": model, "messages": list(messages)}, ensure_ascii=False, indent=1) + "\n"


def as_markdown(model: str, messages: Sequence[dict[str, Any]]) -> str:
    """The conversation with a heading for each message; reasoning is quoted."""
    parts = [f"# Conversation with {model}"]
    for message in messages:
        parts.append(f"## {str(message['role']).capitalize()}")
        reasoning = str(message.get("reasoning_content") or "").strip()
        if reasoning:
            parts.append("\n".join(f"> {line}".rstrip() for line in reasoning.split("\n")))
        parts.append(str(message.get("content") or "").strip("\n"))
        if message.get("tool_calls"):
            parts.append(f"```json\n{json.dumps(message['tool_calls'], ensure_ascii=False, indent=1)}\n```")
    return "\n\n".join(parts) + "\n"


def to_clipboard(text: str) -> None:
    """Ask the terminal to take a text (OSC 52). Raises UsageError without a terminal, or for too long a text."""
    data = text.encode()
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError("there is no terminal whose clipboard could take it; /copy FILE writes it to a file")
    if len(data) > MAX_CLIPBOARD_BYTES:
        raise UsageError("terminals do not take a text as long as this; /copy FILE writes it to a file")
    # base64: nothing of the text can end the sequence.
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    sys.stdout.flush()
