"""What ends a command from outside: SIGTERM, and SIGHUP when its terminal is closed. Knows signals and exit codes."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

HUNG_UP, TERMINATED = 129, 143
_CODES = {getattr(signal, name): code for name, code in (("SIGHUP", HUNG_UP), ("SIGTERM", TERMINATED))
          if hasattr(signal, name)}  # fmt: skip
# A session that ends sends both, and its shell one more: what comes so soon after the first is the same end.
_SAME_SECONDS = 5.0


class _Endings:
    """code: the exit code that was asked for; None before that."""

    def __init__(self) -> None:
        self.code: int | None = None
        self._at = -math.inf
        self._finishing = False

    def handle(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._at < _SAME_SECONDS:
            return
        wait = self._finishing and self.code is None
        self.code, self._at = _CODES[signum], now
        if not wait:
            sys.exit(self.code)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        before, self._finishing = self._finishing, True
        already = self.code
        try:
            yield
        finally:
            self._finishing = before
        if self.code is not None and already is None:
            sys.exit(self.code)


_endings = _Endings()


def install() -> None:
    """From now on, these signals end the process in order: SystemExit is raised in the main thread."""
    for signum in _CODES:
        # nohup has a command go on without its terminal. (Python's default for the others ends without cleanup, and can
        # leave a terminal without its cursor.)
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _endings.handle)


def ignore() -> None:
    """From now on, they change nothing: the process is about to end as it should."""
    for signum in _CODES:
        signal.signal(signum, signal.SIG_IGN)


def asked() -> int | None:
    """The exit code that a signal asked for; None if there was none."""
    return _endings.code


def finishing() -> contextlib.AbstractContextManager[None]:
    """What is inside is done to its end, and SystemExit raised then; it should look at asked() if it takes long.

    A signal that comes again after some seconds doesn't wait."""
    return _endings.finishing()
