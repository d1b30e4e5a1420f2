"""localmoe as a person meets it: in a pseudo-terminal, with real keys. The fixtures are in conftest.py."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fork_server import HUNG_UP

ROOT = Path(__file__).parents[1]
# Adds to the file that it is given.
EDITOR = Path(__file__).parent / "fake_editor.py"
# What moves the cursor or changes colours: a line editor draws only what has changed.
CONTROL = re.compile(r"\x1b(?:\][^\x07]*\x07|\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|[\r\x08\x0f]")


class ForkServer:
    """fork_server.py in a process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


# What the line editor asks for when it begins to listen: that pasted text is marked.
_PASTE_ON = "\x1b[?2004h"


class Terminal:
    """A process of localmoe in a terminal. raw: all that it wrote there."""

    def __init__(
        self,
        server: ForkServer,
        folder: Path,
        *arguments: str,
        fake: dict[str, Any] | None,
        term: str = "xterm",
        columns: int = 100,
        redirect: dict[int, Path] | None = None,
        **environment: str,
    ) -> None:
        """folder: its working directory, and where chats keep their own. The others as in fork_server.shell."""
        self._master, slave = os.openpty()
        self._folder = folder
        self.resize(columns)
        variables = os.environ | {"TERM": term, "XDG_STATE_HOME": str(folder), "PYTHONPATH": str(ROOT)}
        variables |= {"EDITOR": f"{sys.executable} {EDITOR}"} | environment
        variables.pop("VISUAL", None)
        self.pid = server.ask(
            tty=os.ttyname(slave),
            folder=str(folder),
            environment=variables,
            redirect={str(fd): str(path) for fd, path in (redirect or {}).items()},
            arguments=arguments,
            fake=fake,
        )
        os.close(slave)
        self._bytes = b""
        # A line editor moves the cursor where a space would do; without one the prompt must be complete, or a Ctrl-C
        # comes before readline waits for it.
        self.prompt = ">>> " if term == "dumb" else ">>>"
        self.seen_until = 0

    @property
    def raw(self) -> str:
        return self._bytes.decode("utf-8", "ignore")

    @property
    def screen(self) -> str:
        return CONTROL.sub("", self.raw)

    def type(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._master, data) :]

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))

    def interrupt(self) -> None:
        self.type("\x03")

    def interrupt_until(self, text: str) -> str:
        """Again after a while, because Python's input() can miss one that comes just before it begins to wait."""
        self.interrupt()
        return self.expect(text, interrupting=True)

    def interrupt_line(self) -> None:
        """Drop the line that is edited, and wait until the editor listens again: a prompt may only have been drawn once
        more before, and what is typed between two lines is echoed by the terminal itself."""
        asked, deadline = self.raw.count(_PASTE_ON), time.monotonic() + 30
        self.interrupt()
        while self.raw.count(_PASTE_ON) == asked:
            assert time.monotonic() < deadline, f"no new line in {self.raw!r}"
            if not self._read(2.0):
                self.interrupt()
        self.expect(self.prompt)

    def answers(self, message: str, text: str) -> str:
        """Send a message or command and wait for the text, then for the prompt; returns what came before the text."""
        self.type(f"{message}\r")
        before = self.expect(text)
        self.expect(self.prompt)
        return before

    def expect(self, text: str, *, interrupting: bool = False) -> str:
        """Wait for the text on the screen; returns what came before it."""
        deadline = time.monotonic() + 30
        while (at := (screen := self.screen).find(text, self.seen_until)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {screen[self.seen_until :]!r}"
            if not self._read(2.0) and interrupting:
                self.interrupt()
        before, self.seen_until = screen[self.seen_until : at], at + len(text)
        return before

    def interrupt_until_it_leaves(self) -> None:
        """Like an impatient person, because a busy machine may take two interrupts for one or be slow to the second."""
        for _ in range(100):
            self.interrupt()
            until = time.monotonic() + 0.2
            while (left := until - time.monotonic()) > 0:
                self._read(left)
            if "[exit " in self.screen[self.seen_until :]:
                return

    def kill(self, number: int) -> None:
        """Send a signal to what runs in the terminal."""
        group = os.tcgetpgrp(self._master)
        # 0 is no group here, and that of the tests for killpg.
        assert group > 0, "nothing runs in the terminal"
        os.killpg(group, number)

    def exit_code(self) -> int:
        """As a shell reports it: 128 more than the signal that ended the program, if one did. Fails if the program did
        not leave the terminal as it was."""
        self.expect("[exit ")
        self.expect("]")
        code = re.findall(r"\[exit (.*?)\]", self.screen)[-1]
        assert "terminal changed" not in code
        return int(code) if int(code) >= 0 else 128 - int(code)

    def hang_up(self) -> int:
        """Take the terminal away, as a closed window does; returns the exit code of the program."""
        os.close(self._master)
        self._master = -1
        deadline = time.monotonic() + 30
        while not (said := self._folder / HUNG_UP).exists():
            assert time.monotonic() < deadline, "it goes on without its terminal"
            time.sleep(0.02)
        return int(said.read_text())

    def close(self) -> None:
        if self._master < 0:
            return
        with contextlib.suppress(AssertionError, ProcessLookupError):
            self.kill(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        """Take what was written, waiting for it at most so long; returns whether there was something."""
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            read = os.read(self._master, 100_000)
        except OSError:
            # Nobody has opened the terminal yet.
            time.sleep(0.01)
            return False
        self._bytes += read
        # Asked where its cursor is, a terminal answers; without, there is no status line.
        self.type("\x1b[5;1R" * read.count(b"\x1b[6n"))
        return True


Start = Callable[..., Terminal]
