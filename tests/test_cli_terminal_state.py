"""The terminal is as it was found, however a program that changed it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import termios

import pytest

# A session of its own, whose terminal standard input becomes; raw, and left so by an exception. A group that isn't in
# the foreground gets there by being moved after a child was made the foreground.
PROGRAM = """
import fcntl, os, sys, termios, tty
from localmoe.cli.terminal_state import given_back
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with given_back():
    tty.setraw(0)
    if sys.argv[1] == "background":
        import signal, subprocess
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "input()"], process_group=0, stdin=subprocess.PIPE)
        os.tcsetpgrp(0, child.pid)
    sys.exit(7)
"""


@pytest.mark.parametrize("place", ["foreground", "background"])
def test_an_exit_from_within_gives_the_modes_back(place: str) -> None:
    """Also: what belongs to somebody else by then stays as it is."""
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    program = subprocess.run([sys.executable, "-c", PROGRAM, place], stdin=slave, start_new_session=True, timeout=60)
    assert program.returncode == 7
    assert (termios.tcgetattr(slave) == before) == (place == "foreground")
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("stdin", [subprocess.DEVNULL, subprocess.PIPE])
def test_without_a_terminal_there_is_nothing_to_give_back(stdin: int) -> None:
    code = "from localmoe.cli.terminal_state import given_back\nwith given_back(): raise SystemExit(7)"
    assert subprocess.run([sys.executable, "-c", code], stdin=stdin).returncode == 7
