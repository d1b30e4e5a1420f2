"""`localmoe chat` as a person meets it: the real program in a pseudo-terminal, with a fake model and real keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localmoe.cli.chat import EMPTY_LINE_HINT
from localmoe.cli.main import INTERRUPTED


class Terminal:
    """The real program in a pseudo-terminal, with a fake model that says `pieces` slowly, then "done"."""

    def __init__(self, pieces: int) -> None:
        pexpect = pytest.importorskip("pexpect")
        replies = [[("answer", f"w{i} ") for i in range(pieces)], [("answer", "done")]]
        code = f"from tests.fake_llm import run_with; run_with({replies!r}, seconds_per_piece=0.1)"
        environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[1])}
        self.child = pexpect.spawn(
            sys.executable, ["-c", code, "chat"], env=environment, encoding="utf-8", timeout=60, cwd=Path.home()
        )
        self.child.delaybeforesend = None
        self.expect(">>> ")

    def type(self, text: str) -> None:
        self.child.send(text)

    def interrupt(self) -> None:
        self.child.sendintr()

    def expect(self, text: str) -> str:
        """Wait for the text; returns what came before it."""
        self.child.expect_exact(text)
        return self.child.before

    def interrupt_until_it_leaves(self) -> None:
        """Like an impatient person, because a busy machine may take two interrupts for one or be slow to the second."""
        pexpect = pytest.importorskip("pexpect")
        for _ in range(100):
            self.interrupt()
            if self.child.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=0.2) == 0:
                return

    def exit_code(self) -> int:
        """As a shell reports it: 128 more than the signal that ended the program, if one did."""
        self.child.read()
        self.child.wait()
        status = self.child.exitstatus
        return status if status is not None else 128 + self.child.signalstatus


@pytest.fixture
def terminal() -> Iterator[Callable[[int], Terminal]]:
    opened: list[Terminal] = []

    def start(pieces: int) -> Terminal:
        opened.append(Terminal(pieces))
        return opened[-1]

    yield start
    for each in opened:
        each.child.close(force=True)


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(terminal: Callable[[int], Terminal]) -> None:
    """Also: at an empty prompt it only explains itself, and Ctrl-D leaves with exit code 0."""
    chat = terminal(600)
    chat.type("a\r")
    chat.expect("w2 ")
    chat.interrupt()
    assert "w599" not in chat.expect("cancelled")
    chat.expect(">>> ")
    chat.type("typed in vain")
    chat.expect("typed in vain")
    chat.interrupt()
    assert EMPTY_LINE_HINT not in chat.expect(">>> ")
    chat.type("b\r")
    chat.expect("done")
    chat.expect(">>> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_ctrl_c_on_an_empty_line_explains_and_twice_leaves(terminal: Callable[[int], Terminal]) -> None:
    chat = terminal(1)
    chat.interrupt()
    chat.expect(EMPTY_LINE_HINT)
    chat.interrupt_until_it_leaves()
    assert chat.exit_code() == INTERRUPTED


def test_ctrl_c_twice_during_a_reply_leaves(terminal: Callable[[int], Terminal]) -> None:
    chat = terminal(600)
    chat.type("a\r")
    chat.expect("w2 ")
    chat.interrupt_until_it_leaves()
    assert chat.exit_code() == INTERRUPTED


def test_a_paste_of_two_lines_is_one_message(terminal: Callable[[int], Terminal]) -> None:
    """Fails if each pasted line is sent on its own, as most chats do."""
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit has no bracketed paste")
    chat = terminal(1)
    chat.type("\x1b[200~one\ntwo\x1b[201~\r")
    chat.expect("w0")
    assert "done" not in chat.expect(">>> ")
    chat.type("/exit\r")
    assert chat.exit_code() == 0
