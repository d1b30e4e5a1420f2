"""cli/chat_history.py: the file is the owner's, stays small, and never ends a chat."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from localmoe.cli import chat_history

pytest.importorskip("prompt_toolkit")


def test_a_file_that_others_could_read_becomes_the_owners(tmp_path: Path) -> None:
    file = tmp_path / "state" / "chat-history"
    chat_history.open_history(file)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    chat_history.open_history(file).append_string("a\nb")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(chat_history.open_history(file).load_history_strings()) == ["a\nb"]


def test_long_messages_and_no_text_are_not_kept(tmp_path: Path) -> None:
    """A lone surrogate is what a terminal makes of bytes that are not UTF-8."""
    file = tmp_path / "h"
    history = chat_history.open_history(file)
    for text in ("x" * (chat_history.MAX_MESSAGE_CHARACTERS + 1), "\udc80", "kept"):
        history.append_string(text)
    assert list(chat_history.open_history(file).load_history_strings()) == ["kept"]


def test_a_large_file_keeps_its_latest_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a message is cut in two."""
    file = tmp_path / "h"
    history = chat_history.open_history(file)
    for i in range(100):
        history.append_string(f"message {i}\nof two lines")
    monkeypatch.setattr(chat_history, "MAX_BYTES", 4000)
    monkeypatch.setattr(chat_history, "KEPT_BYTES", 2000)
    latest = list(chat_history.open_history(file).load_history_strings())
    assert file.stat().st_size <= 2000 and len(latest) > 10
    assert latest == [f"message {99 - i}\nof two lines" for i in range(len(latest))]


def test_a_link_or_a_folder_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for name in ("link", "."):
        chat_history.open_history(tmp_path / name).append_string("a")
    assert (tmp_path / "other").read_text() == "mine"
