"""What Ctrl-C means while a chat or a batch runs. Knows signals and time; does not know what is read or generated."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

from localmoe.cli.endings import asked

# A second Ctrl-C within this time leaves the chat.
LEAVE_SECONDS = 1.0


class Interrupts:
    """What Ctrl-C means while a chat runs: it ends the reading of a line, or is remembered for whoever asks `stopped`.

    Installed for the whole chat, so that one that comes between two turns does not end it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, leave_seconds: float = LEAVE_SECONDS) -> None:
        """leave_seconds: how soon after the first one a second one leaves."""
        self._clock = clock
        self._leave_seconds = leave_seconds
        self._last = -math.inf
        self._reading = False
        self.stopped = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While this holds, Ctrl-C raises KeyboardInterrupt."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    @property
    def must_stop(self) -> bool:
        """Whether what is being made is to end: because of Ctrl-C, or because the whole program is."""
        return self.stopped or asked() is not None

    def _handle(self, _signum: int, _frame: FrameType | None) -> None:
        if self._reading:
            raise KeyboardInterrupt
        self.stopped = True
        self.note()

    def note(self) -> None:
        """Count one Ctrl-C. Raises KeyboardInterrupt if it is the second in quick succession."""
        previous, self._last = self._last, self._clock()
        if self._last - previous < self._leave_seconds:
            raise KeyboardInterrupt
