"""cli/sanitize.py: nothing a terminal would obey, reorder or hide gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.cli.sanitize import VISIBLE, sanitize, sanitize_line
from tests.hostile import dangerous

# Includes lone surrogates, which a JSON request can hold.
ANY_TEXT = st.text(st.characters(codec=None, categories=None))


def test_no_dangerous_character_is_shown_as_it_is() -> None:
    """Goes over all code points. Fails if a range is off by one."""
    assert not [code for code in range(0x110000) if dangerous(chr(code)) and chr(code) in sanitize(chr(code))]


@given(ANY_TEXT)
def test_no_dangerous_character_survives_in_a_text(text: str) -> None:
    shown = sanitize(text)
    assert not any(map(dangerous, shown))
    shown.encode()


@given(ANY_TEXT)
def test_it_is_idempotent_and_blind_to_where_text_is_cut(text: str) -> None:
    """Fails if state is kept between characters: a sequence split over two tokens would get through."""
    shown = sanitize(text)
    assert sanitize(shown) == shown
    assert "".join(map(sanitize, text)) == shown


@given(ANY_TEXT)
def test_all_other_characters_stay(text: str) -> None:
    plain = "".join(c for c in text if ord(c) not in VISIBLE)
    assert sanitize(plain) == plain


@given(ANY_TEXT)
def test_one_line_stays_one_line(text: str) -> None:
    """splitlines knows more line breaks than the newline."""
    assert len(sanitize_line(text).splitlines()) <= 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]52;c;aGk=\x07", "␛]52;c;aGk=␇"),
        ("\x1b[2J", "␛[2J"),
        ("paid\rfree", "paid␍free"),
        ("\x9b31m", "<U+009B>31m"),
        ("abc\u202etxt.exe", "abc<U+202E>txt.exe"),
        ("héllo 你好 👩‍🚀 שלום\n\tok", "héllo 你好 👩‍🚀 שלום\n\tok"),
    ],
)
def test_examples(text: str, shown: str) -> None:
    assert sanitize(text) == shown
