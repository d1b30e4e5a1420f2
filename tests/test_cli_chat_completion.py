"""cli/chat_completion.py: what Tab offers, and what it never shows."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("prompt_toolkit")

from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from localmoe.cli.chat_completion import CommandCompleter
from localmoe.cli.chat_terminal import in_fence


def offered(typed: str) -> list[str]:
    """The lines that Tab could make of one."""
    found = CommandCompleter().get_completions(Document(typed), CompleteEvent())
    return sorted(typed[: len(typed) + each.start_position] + each.text for each in found)


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("/re", ["/read", "/retry", "/rewind"]),
        ("/think h", ["/think high"]),
        ("/set rep", ["/set repetition_penalty"]),
        ("/clear ", []),
        ("hello", []),
        ("/re\nx", []),
        ("/nothing x", []),
    ],
)
def test_commands_and_what_may_follow_them_are_offered(typed: str, lines: list[str]) -> None:
    assert offered(typed) == lines


def test_files_are_offered_except_names_that_could_fool_a_terminal(tmp_path: Path) -> None:
    for name in ("a note", "a\x1b]0;x\x07", "a\u202etxt", "b"):
        (tmp_path / name).write_text("x")
    assert offered(f"/read {tmp_path}/a") == [f"/read {tmp_path}/a note"]


def test_a_fence_is_open_until_it_is_closed() -> None:
    assert [in_fence(text) for text in ('"""', '"""a', '"""a\nb', "a", '"""a"""', '"""""" ', '""')] == [
        True, True, True, False, False, False, False]  # fmt: skip
