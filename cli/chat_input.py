"""How a message is read where there is no full line editor: pipes, dumb terminals, and Python's own readline.

Knows lines and the fence of several lines; does not know /commands or what becomes of a message."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
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
            if not line.startswith(FENCE):
                return line
            lines = [line.removeprefix(FENCE)]
            while not lines[-1].endswith(FENCE):
                lines.append(read_line(CONTINUATION))
        except EOFError:
            if sys.stdin.isatty():
                sys.stderr.write("\n")
            raise
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            raise
        return "\n".join([*lines[:-1], lines[-1].removesuffix(FENCE)]).strip("\n")

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
