"""How a message is read: which editor there is, and what is done where there is none: pipes and dumb terminals.

Knows lines and the fence of several lines; does not know /commands or what becomes of a message."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

PROMPT, CONTINUATION, FENCE = ">>> ", "... ", '"""'


class Input(Protocol):
    """Where messages come from."""

    def read(self, draft: str) -> str:
        """The next message, beginning with `draft` in the line. Raises EOFError at the end of input and
        KeyboardInterrupt at Ctrl-C."""

    def typed_so_far(self) -> str:
        """What the interrupted line held."""

    @property
    def can_edit(self) -> bool:
        """Whether a draft can be shown."""


def open_input(status: Callable[[int], str] | None, *, history: bool) -> Input:
    """The best there is for this standard input and output. status: a line of at most so many columns to
    show under what is typed.

    history: whether what is typed is kept for later chats."""
    person = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if not person or importlib.util.find_spec("prompt_toolkit") is None:
        return PlainInput()
    from localmoe.cli.chat_history import history_path
    from localmoe.cli.chat_terminal import TerminalInput

    return TerminalInput(status, history_path() if history else None)


def unfenced(message: str) -> str:
    """A message without the fence around it, if it has one."""
    if not message.startswith(FENCE):
        return message
    return message.removeprefix(FENCE).rstrip(" \t").removesuffix(FENCE).strip("\n")


class PlainInput:
    """Standard input, line by line; in a terminal with what readline can do, where it exists."""

    def __init__(self) -> None:
        with contextlib.suppress(ImportError):
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
            readline.parse_and_bind("tab: self-insert")

    @property
    def can_edit(self) -> bool:
        try:
            import readline  # noqa: F401
        except ImportError:
            return False
        return sys.stdin.isatty() and sys.stdout.isatty()

    def read(self, draft: str) -> str:
        try:
            with _prefilled(draft if self.can_edit else ""):
                line = read_line(PROMPT)
            rest = line.removeprefix(FENCE)
            while line.startswith(FENCE) and not rest.endswith(FENCE):
                rest = read_line(CONTINUATION)
                line += f"\n{rest}"
        except EOFError:
            if sys.stdin.isatty():
                sys.stderr.write("\n")
            raise
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            raise
        return unfenced(line)

    def typed_so_far(self) -> str:
        with contextlib.suppress(ImportError):
            import readline

            return readline.get_line_buffer()
        return ""


@contextlib.contextmanager
def _prefilled(draft: str) -> Iterator[None]:
    """While this holds, a line that readline reads begins with the draft."""
    if not draft:
        yield
        return
    import readline

    readline.set_startup_hook(lambda: readline.insert_text(draft))
    try:
        yield
    finally:
        readline.set_startup_hook()


def read_line(prompt: str) -> str:
    """A line of standard input; the prompt is shown only to a person, and never goes into a redirected stdout."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    if sys.stdin.isatty():
        sys.stderr.write(prompt)
        sys.stderr.flush()
    return input()
