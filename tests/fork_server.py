"""Starts localmoe in pseudo-terminals without importing torch each time: a process that has it and forks.

Run as a program: reads requests as JSON lines from standard input and answers each with a line. It computes nothing
itself, so that it has no threads that a fork would lose."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import termios
import time
from pathlib import Path
from typing import Any

from localmoe.files import write_atomically

# Where it says how a command ended whose terminal went away.
HUNG_UP = "hung-up"


def serve() -> None:
    import tests.fake_llm  # noqa: F401

    # Nobody asks how a session ended, and none is to be left behind as a zombie.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            shell(json.loads(line))
            return
        print(pid, flush=True)


def shell(job: dict[str, Any]) -> None:
    """Run a command in a terminal as a shell does. Says there how it ended and whether it left the terminal as it was;
    when it is stopped, any line continues it.

    When the terminal is taken away, the command is told so, twice as bash and the kernel may do it, and how it ended is
    written to a file of its folder.

    tty: the terminal. redirect: other files for some of the streams 0, 1 and 2. fake: arguments of run_with, None for
    the real models."""
    os.setsid()
    terminal = os.open(job["tty"], os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    # Or the shell would be stopped when it takes the terminal back.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    before = termios.tcgetattr(terminal)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        # What runs in the background of a script inherits that interrupts are ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become(job, terminal)
        return

    def hung_up(*_: object) -> None:
        for _ in range(2):
            os.killpg(pid, signal.SIGHUP)
            time.sleep(0.05)

    signal.signal(signal.SIGHUP, hung_up)
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.isatty(terminal):
            write_atomically(Path(job["folder"]) / HUNG_UP, str(os.waitstatus_to_exitcode(status)).encode())
            return
        os.tcsetpgrp(terminal, os.getpgrp())
        if not os.WIFSTOPPED(status):
            break
        os.write(terminal, b"[stopped]")
        os.read(terminal, 100)
        os.tcsetpgrp(terminal, pid)
        os.kill(pid, signal.SIGCONT)
    changed = termios.tcgetattr(terminal) != before
    os.write(terminal, b"[exit %d%s]" % (os.waitstatus_to_exitcode(status), b", terminal changed" * changed))
    # The end of the session takes the terminal away.
    signal.pause()


def become(job: dict[str, Any], terminal: int) -> None:
    """Run the command line of localmoe in place of this program."""
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for fd in (0, 1, 2):
        path = job["redirect"].get(str(fd))
        file = terminal if path is None else os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, fd)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.argv = ["localmoe", *job["arguments"]]
    if job["fake"] is not None:
        from tests.fake_llm import run_with

        run_with(**job["fake"])
    from localmoe.cli.main import run

    run()


if __name__ == "__main__":
    serve()
