"""localmoe.tokenizer.StopMatcher: no part of a stop string is shown, wherever the tokens end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import UsageError
from localmoe.tokenizer import StopMatcher
from tests.hostile import splits


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The oracle: read one character at a time until some stop string ends there; the longest such one is cut off."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_no_part_of_a_stop_string_is_shown_however_it_is_split(data: st.DataObject) -> None:
    """Three letters make overlaps and near misses common. Fails if a beginning of the match was let out too early,
    or if the result depends on where the tokens end."""
    stops = data.draw(st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
    text = data.draw(st.text("abc", max_size=14))
    shown, hit = first_stop(text, stops)
    matcher = StopMatcher(stops)
    so_far = ""
    for part in data.draw(splits(text)):
        emitted, found = matcher.push(part)
        so_far += emitted
        assert shown.startswith(so_far)
        assert found is None or found == hit
    assert (so_far + matcher.flush(), found) == (shown, hit)


def test_a_stop_string_over_many_tokens() -> None:
    """The cases to read: held back, let go, hit, and silence afterwards."""
    matcher = StopMatcher(["</stop>", "sto"])
    assert matcher.push("a <") == ("a ", None)
    assert matcher.push("b </s") == ("<b ", None)
    assert matcher.push("t") == ("", None)
    assert matcher.push("op> more") == ("</", "sto")
    assert matcher.push("more") == ("", "sto")
    assert matcher.flush() == ""
    assert StopMatcher([]).push("anything") == ("anything", None)
    with pytest.raises(UsageError, match="empty"):
        StopMatcher(["a", ""])
