"""Where the prompt of `localmoe run` is from: files, standard input and the argument, in this order.

Knows texts only; nothing is read that is larger than chat_files allows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from localmoe.cli.chat_files import MAX_FILE_BYTES, read_text, text_of
from localmoe.errors import UsageError

STDIN = Path("-")


def read_prompt(argument: str | None, files: Sequence[Path] = ()) -> str:
    """The files, then what is piped in, then the argument, with a newline between them.

    "-" among the files is standard input, which then comes at that place. Newlines at the end of a file are dropped, as
    a shell does for $(...). Raises UsageError if nothing is left or something is not text."""
    if list(files).count(STDIN) > 1:
        raise UsageError("standard input can be read only once; leave one --file - out")
    parts = [_standard_input(required=True) if file == STDIN else read_text(file) for file in files]
    if STDIN not in files and sys.stdin is not None and not sys.stdin.isatty():
        parts.append(_standard_input(required=False))
    parts = [part.rstrip("\r\n") for part in parts]
    prompt = "\n".join(part for part in (*parts, argument) if part)
    if not prompt:
        raise UsageError('no prompt; give one, for example localmoe run "Tell me a story.", or pipe it in')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text (character {error.start}); convert it first") from None
    return prompt


def _standard_input(*, required: bool) -> str:
    """Raises UsageError unless it is text; if it is not required, it may be empty."""
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    return text_of(data, "standard input") if required or data.strip() else ""
