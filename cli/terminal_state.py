"""The terminal as it was found: whatever ends the program, the shell after it echoes and breaks lines as before."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


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
