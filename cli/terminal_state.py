"""The terminal as it was found: whatever ends the program, the shell after it echoes and breaks lines as before.

Or it went away, which must not keep a program from ending in order."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Afterwards standard input's terminal, if it is one, has the modes it had before.

    A line editor gives them back as well; but the exception of a signal handler can come while its event loop is about
    to end, and is then lost with that part of the loop's own cleanup."""
    try:
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, OSError, ValueError, termios.error):
        yield
        return
    try:
        yield
    finally:
        # In the background a terminal belongs to somebody else, and setting it would stop this process.
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(terminal) == os.getpgrp() and termios.tcgetattr(terminal) != before:
                termios.tcsetattr(terminal, termios.TCSANOW, before)


class _Lasting(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as problem:
            if problem.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def lasting(stream: TextIO) -> TextIO:
    """The same stream, but what is written to a terminal that went away goes nowhere.

    There is nobody to be told, and an error in its place would come in the midst of saving."""
    if not (isinstance(stream, io.TextIOWrapper) and stream.isatty()):
        return stream
    buffer = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
    kept = {"encoding": stream.encoding, "errors": stream.errors}
    return io.TextIOWrapper(buffer, line_buffering=stream.line_buffering, write_through=stream.write_through, **kept)


def columns(stream: TextIO) -> int:
    """Of the terminal that the stream is; 80 if that does not know, or went away."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
