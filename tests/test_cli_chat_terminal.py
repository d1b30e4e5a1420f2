"""`localmoe chat` as a person meets it: the real program in a pseudo-terminal, with a fake model and real keys."""

from __future__ import annotations

import functools
import json
import signal
import stat
import threading
from pathlib import Path

import pytest

from localmoe.cli.chat import EMPTY_LINE_HINT
from localmoe.cli.endings import HUNG_UP, TERMINATED
from localmoe.cli.main import INTERRUPTED
from tests.terminal import Start


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


def test_a_paste_of_200_kb_with_escapes_is_one_message(start: Start, tmp_path: Path) -> None:
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
    # Once when it arrives and once when it is sent, with its escapes made visible; not again with every key.
    assert len(chat.raw) < 4 * len(pasted)
    chat.answers("/export chat.json", "2 messages written")
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert json.loads((tmp_path / "chat.json").read_text("utf-8"))["messages"][0]["content"] == pasted


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
def test_an_answer_is_markdown_in_a_terminal(
    start: Start, tmp_path: Path, term: str, option: tuple[str, ...], line: str
) -> None:
    """Also: copied, it is what the model wrote."""
    chat = start(["- **b", "** and ", "`c`"], *option, term=term)
    chat.type("a\r")
    chat.expect(line)
    chat.expect(chat.prompt)
    chat.type("/copy copied\r")
    chat.expect("written: copied")
    assert (tmp_path / "copied").read_text() == "- **b** and `c`"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGHUP, HUNG_UP)])
def test_an_end_from_outside_gives_the_terminal_back(start: Start, number: int, code: int) -> None:
    """Fails if the shell would go on without echo."""
    chat = start(1)
    chat.kill(number)
    assert chat.exit_code() == code


@pytest.mark.parametrize("moment", ["prompt", "reply"])
def test_a_closed_terminal_saves_the_session(terminals: Start, tmp_path: Path, moment: str) -> None:
    """With the embedded model. Fails if what was read, or what there was of a reply, is lost."""
    chat = terminals("chat", "--session", "s", "--seed", "1", "--no-loop-guard", fake=None)
    chat.expect(chat.prompt)
    chat.answers("/set min_p 0.1", "min_p")
    chat.answers("Hello.", "ttft")
    if moment == "reply":
        # Nothing but the end of the context would end it.
        chat.answers("/set max_tokens 1800", "max_tokens")
        chat.type("Tell me a long story about a dog.\r")
        chat.expect(" ")
        chat.expect("the")
    assert chat.hang_up() == HUNG_UP
    chat = terminals("chat", "--session", "s", fake=None)
    chat.expect(f"s: {4 if moment == 'reply' else 2} messages, ")
    kept = int(chat.expect(" tokens need not be read again").replace(",", ""))
    assert kept > 10
