"""Long texts that a chat has read: other chats go on from their state, with the same replies and nothing else kept."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe.cli.chat_totals import Totals
from localmoe.cli.main import main
from localmoe.errors import ResourceError
from localmoe.events import Completion
from localmoe.snapshot import unpack

LONG = ("The frog lived in a green pond and was kind to everyone. " * 40).strip()


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this test's chats keep the states of texts."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "localmoe" / "sessions" / "prefixes"


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[Completion]:
    found = list[Completion]()
    monkeypatch.setattr(Totals, "add", lambda _self, completion: found.append(completion))
    return found


def chat(monkeypatch: pytest.MonkeyPatch, *lines: str, options: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", "--temp", "0", "-n", "12", *options]) == 0


def test_a_system_text_is_read_once(
    monkeypatch: pytest.MonkeyPatch, states: Path, replies: list[Completion], capsys: Any
) -> None:
    """Fails if another chat reads it again, answers otherwise for it, or keeps it twice; or if more than it is kept."""
    before = os.umask(0)
    chat(monkeypatch, "Who are you?", options=("-s", LONG))
    os.umask(before)
    assert "is kept for other chats" in capsys.readouterr().err
    (state,) = states.glob("*.state")
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    chat(monkeypatch, "/clear", f"/system {LONG}", "Why?", "And then?")
    assert "reused" in capsys.readouterr().err
    assert list(states.glob("*.state")) == [state]
    chat(monkeypatch, "Why?", "And then?", options=("-s", LONG, "--no-keep-prefixes"))
    first, other, _then, alone, _alone_then = replies
    kept = len(unpack(state.read_bytes()).tensors["ids"])
    assert first.stats.reused_tokens == alone.stats.reused_tokens == 0
    assert other.stats.reused_tokens == kept
    assert other.prompt_tokens - 10 < kept < other.prompt_tokens
    assert [r.token_ids for r in replies[1:3]] == [r.token_ids for r in replies[3:5]]


def test_a_document_is_read_once(
    monkeypatch: pytest.MonkeyPatch, states: Path, replies: list[Completion], tmp_path: Path
) -> None:
    """Fails if what stands in a file before a question is taken for the question."""
    (tmp_path / "x").write_text(LONG)
    chat(monkeypatch, f"/read {tmp_path / 'x'}", "Who is it about?", "/undo", "Where?")
    chat(monkeypatch, f"/read {tmp_path / 'x'}", '" Why?')
    assert len(list(states.glob("*.state"))) == 1
    assert replies[0].stats.reused_tokens == 0
    assert all(reply.stats.reused_tokens > reply.prompt_tokens - 20 for reply in replies[1:])


def test_a_session_without_its_state_begins_with_the_text_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, states: Path, replies: list[Completion]
) -> None:
    chat(monkeypatch, "Who are you?", options=("-s", LONG, "--session", "a"))
    (states.parent / "a.state").unlink()
    chat(monkeypatch, "Why?", options=("--session", "a"))
    assert replies[1].stats.reused_tokens > 400


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (("-s", LONG, "--no-keep-prefixes"), ("Why?",)),
        (("-s", LONG, "--no-history"), ("Why?",)),
        (("-s", "Be brief."), ("Why?",)),
        ((), (LONG, "Why?", "/think max", "Why?")),
    ],
    ids=["off", "no history", "short", "only talk"],
)
def test_nothing_else_is_kept(
    monkeypatch: pytest.MonkeyPatch, states: Path, options: tuple[str, ...], lines: tuple[str, ...]
) -> None:
    """Fails if a conversation, or anything of one who wants no history, is left on the disk."""
    chat(monkeypatch, *lines, options=options)
    assert not list(states.parent.parent.rglob("*.state"))
    assert not options or not states.parent.exists()


def test_a_disk_that_takes_nothing_is_said_once(
    monkeypatch: pytest.MonkeyPatch, states: Path, replies: list[Completion], capsys: Any
) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise ResourceError("the disk is full")

    monkeypatch.setattr("localmoe.sessions.SessionStore.save_prefix", full)
    chat(monkeypatch, "Why?", f"/system {LONG} Yes.", "Why?", options=("-s", LONG))
    assert capsys.readouterr().err.count("the disk is full") == 1
    assert len(replies) == 2


def test_a_folder_that_cannot_be_made_is_said_once(
    monkeypatch: pytest.MonkeyPatch, replies: list[Completion], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    chat(monkeypatch, "Why?", f"/system {LONG} Yes.", "Why?", options=("-s", LONG))
    assert capsys.readouterr().err.count("are not kept for other chats") == 1
    assert len(replies) == 2
