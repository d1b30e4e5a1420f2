"""`localmoe chat` as a person meets it: the real program in a pseudo-terminal, with a fake model and real keys."""

from __future__ import annotations

import functools
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localmoe.cli.chat import EMPTY_LINE_HINT
from localmoe.cli.main import INTERRUPTED, TERMINATED

# Adds to the file that it is given.
EDITOR = Path(__file__).parent / "fake_editor.py"


# What moves the cursor or changes colours: a line editor draws only what has changed.
CONTROL = re.compile(r"\x1b(?:\][^\x07]*\x07|\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|[\r\x08\x0f]")


class Terminal:
    """The real program in a pseudo-terminal, with a fake model that says `pieces` slowly, then "done"."""

    def __init__(self, pieces: int | list[str], state: Path, term: str, *options: str) -> None:
        self.pexpect = pytest.importorskip("pexpect")
        words = [f"w{i} " for i in range(pieces)] if isinstance(pieces, int) else pieces
        replies = [[("answer", word) for word in words], [("answer", "done")]]
        code = f"from tests.fake_llm import run_with; run_with({replies!r}, seconds_per_piece=0.1)"
        environment = os.environ | {"TERM": term, "PYTHONPATH": str(Path(__file__).parents[1])}
        environment |= {"XDG_STATE_HOME": str(state)}
        environment |= {"EDITOR": f"{sys.executable} {EDITOR}"}
        environment.pop("VISUAL", None)
        self.child = self.pexpect.spawn(
            sys.executable,
            ["-c", code, "chat", *options],
            env=environment,
            encoding="utf-8",
            timeout=60,
            cwd=state,
            dimensions=(30, 100),
        )
        self.child.delaybeforesend = None
        self.raw = ""
        # A line editor moves the cursor where a space would do; without one the prompt must be complete, or a Ctrl-C
        # comes before readline waits for it.
        self.prompt = ">>> " if term == "dumb" else ">>>"
        self.seen_until = 0
        self.expect(self.prompt)

    def type(self, text: str) -> None:
        self.child.send(text)

    def interrupt(self) -> None:
        self.child.send("\x03")

    def interrupt_until(self, text: str) -> str:
        """Again after a while, because Python's input() can miss one that comes just before it begins to wait."""
        self.interrupt()
        return self.expect(text, interrupting=True)

    def expect(self, text: str, *, interrupting: bool = False) -> str:
        """Wait for the text on the screen; returns what came before it."""
        deadline = time.monotonic() + 30
        while (at := (screen := CONTROL.sub("", self.raw)).find(text, self.seen_until)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {screen[self.seen_until :]!r}"
            try:
                read = self.child.read_nonblocking(100_000, timeout=2)
            except self.pexpect.TIMEOUT:
                if interrupting:
                    self.interrupt()
                continue
            self.raw += read
            # Asked where its cursor is, a terminal answers; without, there is no status line.
            self.type("\x1b[5;1R" * read.count("\x1b[6n"))
        before, self.seen_until = screen[self.seen_until : at], at + len(text)
        return before

    def interrupt_until_it_leaves(self) -> None:
        """Like an impatient person, because a busy machine may take two interrupts for one or be slow to the second."""
        for _ in range(100):
            self.interrupt()
            if self.child.expect([self.pexpect.EOF, self.pexpect.TIMEOUT], timeout=0.2) == 0:
                return

    def exit_code(self) -> int:
        """As a shell reports it: 128 more than the signal that ended the program, if one did."""
        self.child.read()
        self.child.wait()
        status = self.child.exitstatus
        return status if status is not None else 128 + self.child.signalstatus


Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    opened: list[Terminal] = []

    def begin(pieces: int | list[str], *options: str, term: str = "xterm") -> Terminal:
        opened.append(Terminal(pieces, tmp_path, term, *options))
        return opened[-1]

    yield begin
    for each in opened:
        each.child.close(force=True)


@pytest.fixture(params=["xterm", "dumb"])
def terminal(request: pytest.FixtureRequest, start: Start) -> Start:
    """With the line editor, and without."""
    return functools.partial(start, term=request.param)


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(terminal: Start) -> None:
    """Also: at an empty prompt it only explains itself, and Ctrl-D leaves with exit code 0."""
    chat = terminal(600)
    chat.type("a\r")
    chat.expect("w2 ")
    chat.interrupt()
    assert "w599" not in chat.expect("cancelled")
    chat.expect(chat.prompt)
    chat.type("typed in vain")
    chat.expect("typed in vain")
    assert EMPTY_LINE_HINT not in chat.interrupt_until(chat.prompt)
    chat.type("b\r")
    chat.expect("done")
    chat.expect(chat.prompt)
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_ctrl_c_on_an_empty_line_explains_and_twice_leaves(terminal: Start) -> None:
    chat = terminal(1)
    chat.interrupt_until(EMPTY_LINE_HINT)
    chat.interrupt_until_it_leaves()
    assert chat.exit_code() == INTERRUPTED


def test_ctrl_c_twice_during_a_reply_leaves(terminal: Start) -> None:
    chat = terminal(600)
    chat.type("a\r")
    chat.expect("w2 ")
    chat.interrupt_until_it_leaves()
    assert chat.exit_code() == INTERRUPTED


def test_a_paste_of_two_lines_is_one_message(start: Start) -> None:
    """Fails if each pasted line is sent on its own, as most chats do."""
    chat = start(1)
    chat.type("\x1b[200~one\ntwo\x1b[201~\r")
    chat.expect("w0")
    assert "done" not in chat.expect(chat.prompt)
    chat.type("/exit\r")
    assert chat.exit_code() == 0


def test_a_paste_of_200_kb_with_escapes_is_one_message(start: Start) -> None:
    """Also: nothing of it is obeyed by the terminal while it is shown."""
    chat = start(1)
    pasted = "".join(f"line {i} \x1b]0;owned\x07 of many\n" for i in range(7000))
    # As fast as it is taken, not as fast as it could be written.
    writer = threading.Thread(target=chat.type, args=("\x1b[200~" + pasted + "\x1b[201~",), daemon=True)
    writer.start()
    chat.expect("line 6999")
    writer.join()
    chat.type("\r")
    chat.expect("w0")
    assert "done" not in chat.expect(chat.prompt)
    assert "\x1b]0;owned" not in chat.raw
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_a_fence_and_alt_enter_make_several_lines(start: Start) -> None:
    chat = start(1)
    chat.type('"""a\r')
    chat.expect("...")
    chat.type('b"""\r')
    chat.expect("w0")
    chat.expect(chat.prompt)
    chat.type("/undo\r")
    chat.expect(r"taken back: a\nb")
    chat.expect(chat.prompt)
    chat.type("c\x1b\rd\r")
    chat.expect("done")
    chat.expect(chat.prompt)
    chat.type("/undo\r")
    chat.expect(r"taken back: c\nd")


def test_history_is_kept_for_its_owner_only(start: Start, tmp_path: Path) -> None:
    """Also: --no-history writes nothing."""
    chat = start(1, "--no-history")
    chat.type("secret\r")
    chat.expect("w0")
    chat.expect(chat.prompt)
    chat.type("\x04")
    assert chat.exit_code() == 0
    file = tmp_path / "localmoe" / "chat-history"
    assert not file.exists()
    chat = start(1)
    chat.type("remember me\r")
    chat.expect("w0")
    chat.expect(chat.prompt)
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    chat = start(1)
    chat.type("\x1b[A")
    chat.expect("remember me")


def test_tab_completes_commands_and_files(start: Start, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("five words are in here")
    chat = start(1)
    chat.type("/re\t")
    chat.expect("/retry")
    chat.type("a\t")
    chat.type(" not\t")
    chat.expect("notes.txt")
    chat.type("\r")
    chat.expect("notes.txt: 5 tokens")


def test_the_editor_writes_a_message(start: Start) -> None:
    chat = start(1)
    chat.type("draft\x18\x05")
    chat.expect("w0")
    chat.expect(chat.prompt)
    chat.type("/undo\r")
    chat.expect("taken back: draft, edited")


def test_edit_puts_the_last_message_into_the_line(terminal: Start) -> None:
    """Also: dropped with Ctrl-C, it leaves the conversation as it was."""
    chat = terminal(1)
    chat.type("first\r")
    chat.expect("w0")
    chat.expect(chat.prompt)
    chat.type("/edit\r")
    chat.expect("first")
    chat.interrupt_until(chat.prompt)
    chat.type("/edit\r")
    chat.expect("first")
    chat.type(" changed\r")
    chat.expect("done")
    chat.expect(chat.prompt)
    chat.type("/undo\r")
    chat.expect("taken back: first changed")
    chat.expect(chat.prompt)
    chat.type("/undo\r")
    chat.expect("nothing was said yet")


def test_the_status_line_shows_model_context_and_speed(start: Start) -> None:
    chat = start(3)
    chat.expect("fake | context 0 of 2,048")
    chat.type("a\r")
    chat.expect("fake | context 6 of 2,048 | 8.00 tok/s")


@pytest.mark.parametrize(
    ("term", "option", "line"),
    [("xterm", (), "• b and c"), ("xterm", ("--plain",), "- **b** and `c`"), ("dumb", (), "- **b** and `c`")],
)
def test_an_answer_is_markdown_in_a_terminal(start: Start, term: str, option: tuple[str, ...], line: str) -> None:
    """Also: copied, it is what the model wrote."""
    chat = start(["- **b", "** and ", "`c`"], *option, term=term)
    chat.type("a\r")
    chat.expect(line)
    chat.expect(chat.prompt)
    chat.type("/copy copied\r")
    chat.expect("written: copied")
    assert (Path(chat.child.cwd) / "copied").read_text() == "- **b** and `c`"


def test_sigterm_gives_the_terminal_back(start: Start) -> None:
    """Fails if the shell would go on without echo."""
    chat = start(1)
    chat.child.kill(signal.SIGTERM)
    assert chat.exit_code() == TERMINATED
