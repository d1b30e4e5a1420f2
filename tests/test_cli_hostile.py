"""Hostile text through the whole command line: a terminal obeys none of it, and the model gets it as it was written.

The texts are in hostile.py; what they become as tokens is tested in test_prompt_injection.py."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe.cli.chat_commands import COMMANDS
from localmoe.cli.main import main
from tests.chat_talk import Talk, said
from tests.fake_llm import FakeLLM
from tests.hostile import CORPUS, HUGE_LINE, NUL, SURROGATE, obeyed

every_text = pytest.mark.parametrize("text", [*CORPUS.values(), NUL, HUGE_LINE], ids=[*CORPUS, "NUL", "huge line"])
# What a name of a file can be.
NAMES = [text for text in CORPUS.values() if "/" not in text and len(text.encode()) < 200]


@pytest.fixture(autouse=True)
def state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("localmoe.cli.chat_sessions._folder", lambda: tmp_path / "sessions")
    return tmp_path / "sessions"


def safe(capsys: Any) -> str:
    """What was shown since the last time, if a terminal may get it."""
    shown = "".join(capsys.readouterr())
    assert not obeyed(shown)
    return shown


@every_text
def test_run(fake_model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str) -> None:
    """As prompt, system text, reasoning and answer; cut anywhere, here after every other character."""
    half = len(text) // 2
    fake_model.replies = [[(kind, part) for kind in ("reasoning", "answer") for part in (text[:half], text[half:])]]
    monkeypatch.setattr(sys, "stdin", None)
    for how in ([], ["--no-stream"]):
        assert main(["run", text, "-s", text, "--think", "on", *how]) == 0
        safe(capsys)
        assert said(fake_model)[-1] == [text, text]
    assert main(["run", text, "--json"]) == 0
    shown = safe(capsys)
    assert json.loads(shown.splitlines()[0])["text"] == text


@pytest.mark.parametrize("text", [*CORPUS.values(), HUGE_LINE], ids=[*CORPUS, "huge line"])
def test_run_of_files_and_pipes(
    fake_model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, text: str
) -> None:
    """Between words, because a mark of byte order and blanks at the ends have meanings of their own."""
    text = f"x{text}y"
    (tmp_path / "file").write_bytes(text.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    assert main(["run", "-f", str(tmp_path / "file")]) == 0
    safe(capsys)
    assert said(fake_model) == [[f"{text}\n{text}"]]


@every_text
def test_chat(fake_model: type[FakeLLM], talk: Talk, tmp_path: Path, capsys: Any, text: str) -> None:
    """As message, reply, file that is read and system text; and in what /undo, /set and the loop guard show of it."""
    fake_model.replies = [[("reasoning", text), ("answer", text)]]
    text = f"x{text}y"
    (tmp_path / "file").write_bytes(text.encode())
    talk(text, f"/system {text}", "/undo", f"/set stop {text}", f"/tokens {text}", f"/read {tmp_path / 'file'}", text)
    safe(capsys)
    read = [text] if text != f"x{NUL}y" and len(text) < 2048 * 5 else []
    assert said(fake_model)[0] == [text]
    assert said(fake_model)[-1] == [text, *read, text]


@pytest.mark.parametrize("command", [name for command in COMMANDS if command.arguments for name in command.names])
def test_arguments_of_commands(
    fake_model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, talk: Talk, tmp_path: Path, capsys: Any, command: str
) -> None:
    """Whatever a command says of what was typed after it, or of a file of that name that is or is not there."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(NAMES):
        if number % 2:
            (tmp_path / f"x{name}").write_text("text")
    talk("a", *(f"{command} x{text}" for text in (*CORPUS.values(), NUL)))
    safe(capsys)


def test_a_wrong_command_and_a_message_that_is_no_text(fake_model: type[FakeLLM], talk: Talk, capsys: Any) -> None:
    talk(*(f"/x{text}" for text in CORPUS.values()), SURROGATE, f"/tokens {SURROGATE}", "a")
    assert "not UTF-8" in safe(capsys)
    assert said(fake_model) == [["a"]]


@pytest.mark.parametrize("answer", [SURROGATE, f"```\n{SURROGATE}\n```\n"])
def test_half_a_character_in_a_reply(fake_model: type[FakeLLM], talk: Talk, capsys: Any, answer: str) -> None:
    fake_model.replies = [[("answer", answer)]]
    assert talk("a", "/undo") == 0
    safe(capsys)


def test_a_session_with_all_of_it(monkeypatch: pytest.MonkeyPatch, talk: Talk, state_folder: Path, capsys: Any) -> None:
    """Saved, listed, taken up and shown again, with the embedded model. Fails if the transcript or its title is obeyed,
    or if the text comes back changed."""
    text = f"x{''.join(CORPUS.values())}{NUL}y"
    quick = ("--temp", "0", "-n", "2")
    assert talk(text, f"/system {text}", "/save one", "/sessions", options=quick) == 0
    safe(capsys)
    assert talk("/sessions", "/load one", "/system", "/undo", "/save one", options=quick) == 0
    assert "taken back: x" in safe(capsys)
    transcript = next(state_folder.glob("*one*.jsonl"))
    assert json.loads(transcript.read_bytes().split(b"\n")[0])["messages"][-2]["content"] == text


def test_names_of_sessions(monkeypatch: pytest.MonkeyPatch, talk: Talk, state_folder: Path, capsys: Any) -> None:
    """Given by the user, and of files that somebody else put there."""
    assert talk("a", *(f"/save x{name}" for name in CORPUS.values()), options=("-n", "1", "--temp", "0")) == 0
    safe(capsys)
    for name in NAMES:
        (state_folder / f"y{name}.jsonl").write_text("no transcript")
    assert talk("/sessions", *(f"/load y{name}" for name in NAMES)) == 0
    safe(capsys)


def test_names_of_models(library_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for name in NAMES:
        (library_folder / f"x{name}").mkdir()
    assert main(["list"]) == 0
    safe(capsys)
    for name in NAMES:
        assert main(["show", f"x{name}"]) == 4
        safe(capsys)
        assert main(["run", "hi", "-m", f"none{name}"]) == 4
        safe(capsys)
