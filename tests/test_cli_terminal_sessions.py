"""Whole sessions in a pseudo-terminal: each goes through many moments, sizes and streams."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from localmoe.cli.chat import EMPTY_LINE_HINT
from localmoe.cli.chat_commands import COMMANDS
from localmoe.cli.main import INTERRUPTED
from tests.hostile import CORPUS, SEQUENCES
from tests.terminal import Start

WORDS = [("answer", f"w{i} ") for i in range(25)]
# Sequences that neither the program nor its line editor sends: strings, resets, bells, the 8-bit forms.
FOREIGN = re.compile("\x1b[]P_^Xc]|[\x07\x0e\x80-\x9f]")
COLOUR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[\d;]*m")


# What to type and what is said to it, step by step. A command that is not here is typed as /help shows it.
SCRIPT: dict[str, list[tuple[str, str]]] = {
    "/help": [("/help", "this list")],
    "/retry": [("Hello.", "ttft"), ("/retry", "ttft")],
    "/undo": [("/undo", "taken back: Hello.")],
    "/edit": [("Hello.", "ttft"), ("/edit", "Hello."), (" Again.", "ttft"), ("/undo", "taken back: Hello. Again.")],
    "/think": [("/think off", "thinking is off")],
    "/system": [("/system Be brief.", "system text: Be brief.")],
    "/set": [("/set top_k 5", "top_k 5")],
    "/read": [("/read notes.txt", "read before what you say next")],
    "/copy": [("Hello.", "ttft"), ("/copy", "sent to the terminal's clipboard"), ("/copy a.md", "written: a.md")],
    "/export": [("/export b.md", "messages written: b.md")],
    "/save": [("/save one", "saved as one")],
    "/load": [("/load one", "need not be read again")],
    "/sessions": [("/sessions", "* one")],
    "/stats": [("/stats", "generated:")],
    "/tokens": [("/tokens a b", "context:")],
    "/clear": [("/clear", "the conversation is forgotten")],
}


def test_every_command(terminals: Start, tmp_path: Path) -> None:
    """With the embedded model. Fails if one ends the chat, does not do what it says, or breaks what comes after it."""
    (tmp_path / "notes.txt").write_text("five words are in here")
    chat = terminals("chat", "-n", "8", "--seed", "1", fake=None)
    chat.expect(chat.prompt)
    for command in COMMANDS:
        name = command.names[0]
        for typed, expected in SCRIPT.get(name, [] if name == "/exit" else [(f"{name} {command.arguments}", "\n")]):
            if typed == "/edit":
                chat.type("/edit\r")
                chat.expect(expected)
            else:
                chat.answers(typed, expected)
    chat.type("/exit\r")
    assert chat.exit_code() == 0
    assert "Traceback" not in chat.raw and "internal error" not in chat.raw
    assert (tmp_path / "a.md").exists() and (tmp_path / "b.md").exists()


def test_a_terminal_obeys_nothing_hostile(terminals: Start, tmp_path: Path) -> None:
    """Said by the model, recalled from the history and pasted, in a terminal of 20 columns without colours."""
    everything = "".join(f"{text}\n" for text in CORPUS.values())
    (tmp_path / "localmoe").mkdir()
    (tmp_path / "localmoe" / "chat-history").write_text(
        "\n#\n+" + "x".join(SEQUENCES.values()).replace("\n", "") + "\n"
    )
    replies = [[("reasoning", everything), ("answer", everything), ("answer", "all said\n")]]
    chat = terminals("chat", "--no-loop-guard", "-q", fake={"replies": replies}, columns=20, NO_COLOR="1")
    chat.expect(chat.prompt)
    chat.answers("a", "all said")
    chat.type("\x1b[A\x1b[A")
    chat.expect("ding")
    chat.interrupt_line()
    chat.type(f"\x1b[200~{everything}\x1b[201~ pasted")
    chat.expect("pasted")
    chat.answers("", "all said")
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert not FOREIGN.search(chat.raw)
    assert not COLOUR.search(chat.raw)


def test_resizes_and_ctrl_c_at_every_moment(terminals: Start) -> None:
    """While a prompt is read, at an empty prompt, in a line that is typed, and in a reply; each leaves the chat usable.
    Resized in a reply and in a line, nothing is lost or shown twice. At last, twice while a prompt is read, it ends."""
    chat = terminals("chat", fake={"replies": [WORDS], "seconds_per_piece": 0.05, "prefill_seconds": [60, 0, 0, 0, 60]})
    chat.expect(chat.prompt)
    chat.type("a\r")
    chat.expect("reading the prompt")
    chat.interrupt()
    chat.expect("nothing was said; the message is dropped")
    chat.expect(chat.prompt)
    # A reply lasts longer than a second, in which two would leave.
    chat.type("b\r")
    chat.expect("w3 ")
    chat.resize(20)
    chat.expect("w9 ")
    chat.resize(100)
    said = chat.expect("w24")
    assert re.findall(r"w\d+", said) == [f"w{i}" for i in range(10, 24)]
    chat.expect(chat.prompt)
    chat.interrupt_until(EMPTY_LINE_HINT)
    chat.expect(chat.prompt)
    chat.answers("c", "w24")
    chat.type("one ")
    chat.expect("one")
    chat.resize(20)
    chat.expect(chat.prompt)
    chat.type("two ")
    chat.expect("two")
    chat.resize(100)
    chat.expect(chat.prompt)
    chat.type("three\r")
    chat.expect("w3 ")
    chat.interrupt()
    chat.expect("cancelled")
    chat.expect(chat.prompt)
    chat.answers("/undo", "taken back: one two three")
    chat.type("typed in vain")
    chat.expect("vain")
    chat.interrupt_until(chat.prompt)
    chat.type("d\r")
    chat.expect("reading the prompt")
    chat.interrupt_until_it_leaves()
    assert chat.exit_code() == INTERRUPTED
    assert "Traceback" not in chat.raw


@pytest.mark.parametrize("command", [["chat"], ["run", "hi"]])
def test_ctrl_c_while_the_model_loads(terminals: Start, command: list[str]) -> None:
    """Fails if a traceback is shown, or the cursor stays hidden."""
    terminal = terminals(*command, fake={"replies": [WORDS], "load_seconds": 60})
    terminal.expect("loading")
    terminal.interrupt()
    assert terminal.exit_code() == INTERRUPTED
    assert "Traceback" not in terminal.raw
    assert terminal.raw.rfind("\x1b[?25h") >= terminal.raw.rfind("\x1b[?25l")


def test_run_in_a_terminal(terminals: Start) -> None:
    """Its reply is cut by Ctrl-C after some words. Fails if they are lost, or the shell goes on in their line."""
    replies = [[("answer", "\x1b]0;owned\x07 "), *WORDS]]
    terminal = terminals("run", "hi", fake={"replies": replies, "seconds_per_piece": 0.1})
    terminal.expect("w1 ")
    terminal.interrupt()
    terminal.expect("\n")
    terminal.expect("cancelled")
    assert terminal.exit_code() == INTERRUPTED
    assert not FOREIGN.search(terminal.raw)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_where_one_stream_is_a_file(terminals: Start, tmp_path: Path, stream: int, term: str) -> None:
    """Fails if a prompt or an escape sequence gets into a file, or if nobody is asked."""
    file = tmp_path / "file"
    file.write_text("a\n" if stream == 0 else "")
    fake = {"replies": [[("reasoning", "hm"), ("answer", "done")]]}
    chat = terminals("chat", fake=fake, term=term, redirect={stream: file})
    if stream == 0:
        chat.expect("done")
    else:
        chat.expect(chat.prompt)
        chat.answers("a", "ttft" if stream == 1 else "done")
        chat.type("\x04")
    assert chat.exit_code() == 0
    assert (chat.prompt in chat.screen) == (stream != 0)
    if stream == 1:
        assert file.read_text() == "done\n"
    if stream == 2:
        assert re.fullmatch(r"fake, .*\nhm\nprompt 3 .*\n+", file.read_text())
    if term == "dumb":
        assert "\x1b" not in re.sub(r"\x1b\[\?2004[hl]", "", chat.raw)


def test_ctrl_z_and_back(terminals: Start) -> None:
    """Fails if the line that was being typed is lost, or if keys are not read any more."""
    chat = terminals("chat", fake={"replies": [[("answer", "done")]]})
    chat.expect(chat.prompt)
    chat.type("kept ")
    chat.expect("kept")
    chat.type("\x1a")
    chat.expect("[stopped]")
    chat.type("fg\r")
    chat.expect("kept")
    chat.answers("on", "done")
    chat.answers("/undo", "taken back: kept on")
    chat.type("\x04")
    assert chat.exit_code() == 0
