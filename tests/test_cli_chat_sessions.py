"""Saved sessions in a chat: what was said is there again, and need not be read again."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from localmoe import transcript
from localmoe.cli.main import main


@pytest.fixture(autouse=True)
def state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("localmoe.cli.chat_sessions._folder", lambda: tmp_path / "sessions")
    return tmp_path / "sessions"


def chat(monkeypatch: pytest.MonkeyPatch, *lines: str, options: tuple[str, ...] = ()) -> int:
    """A chat with the embedded model."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", "--temp", "0", "-n", "12", *options])


def test_a_session_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the second chat reads again what the first has read, or answers other than one that went on."""
    assert chat(monkeypatch, "Tell me a story.", "And then?") == 0
    whole = capsys.readouterr().out
    assert chat(monkeypatch, "Tell me a story.", options=("--session", "frog")) == 0
    first = capsys.readouterr()
    assert "a new session" in first.err
    assert chat(monkeypatch, "And then?", options=("--session", "frog")) == 0
    second = capsys.readouterr()
    assert first.out + second.out == whole
    assert "reused" in second.err
    assert "frog: 2 messages" in second.err


def test_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a chat is not saved from /save on, /load leaves the old one, or a taken name is written over."""
    assert chat(monkeypatch, "/sessions", "/save", "Hello.", "/save one", "Again.", "/sessions") == 0
    shown = capsys.readouterr().err
    assert "there are no saved sessions" in shown
    assert "expected /save NAME" in shown
    assert "saved as one" in shown
    assert "* one: 'Hello.', 4 messages" in shown
    assert chat(monkeypatch, "Other.", "/save one", "/load two", "/load one", "/tokens", "/undo", "/undo") == 0
    shown = capsys.readouterr().err
    assert "is another conversation" in shown
    assert "no saved session two" in shown
    assert "one: 4 messages" in shown
    assert "taken back: Hello." in shown


def test_a_cleared_chat_is_nobodys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if what follows /clear is added to the session that was left."""
    assert chat(monkeypatch, "Hello.", "/save one", "/clear", "Other.", "/sessions") == 0
    assert "  one: 'Hello.', 2 messages" in capsys.readouterr().err


def test_a_damaged_session_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state_folder: Path
) -> None:
    """Fails if a broken state ends the chat or is gone on with."""
    assert chat(monkeypatch, "Hello.", "/save one") == 0
    state = state_folder / "one.state"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    capsys.readouterr()
    assert chat(monkeypatch, "And then?", options=("--session", "one")) == 0
    found = capsys.readouterr()
    assert "the text is read again" in found.err
    assert found.out


@pytest.mark.parametrize("left", [b"", b'{"keep": 0, "mess'])
def test_a_session_that_never_had_a_turn_is_a_new_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state_folder: Path, left: bytes
) -> None:
    """Fails if a chat that was killed while it saved its first turn cannot be begun again under its name."""
    state_folder.mkdir()
    (state_folder / "one.jsonl").write_bytes(left)
    assert chat(monkeypatch, "Hello.", options=("--session", "one", "--system", "Be brief.")) == 0
    assert "a new session, saved as one" in capsys.readouterr().err
    assert chat(monkeypatch, "/sessions", options=("--session", "one")) == 0
    assert "one: 3 messages" in capsys.readouterr().err


def test_what_a_session_does_not_take_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if --system is accepted and has no effect, without a word."""
    assert chat(monkeypatch, "Hello.", "/save one") == 0
    assert "are those of the session" not in capsys.readouterr().err
    assert chat(monkeypatch, "/sessions", options=("--session", "one", "--system", "Be brief.")) == 0
    assert "are those of the session" in capsys.readouterr().err
    assert chat(monkeypatch, "/sessions", options=("--session", "one")) == 0
    assert "are those of the session" not in capsys.readouterr().err


def test_a_transcript_is_read_once_to_go_on_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more at the end, to see that nobody else has changed it. Fails if it is read to see whether it
    is there, too."""
    assert chat(monkeypatch, "Hello.", "/save one") == 0
    read: list[Path] = []
    real = transcript.read
    monkeypatch.setattr(transcript, "read", lambda path: read.append(path) or real(path))
    assert chat(monkeypatch, options=("--session", "one")) == 0
    assert len(read) == 2
