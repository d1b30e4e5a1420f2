"""localmoe.prompt: control tokens only where the encoder puts them, whatever anyone writes in a conversation."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.api import EMBEDDED
from localmoe.errors import ModelError, UsageError
from localmoe.prompt import render_chat
from localmoe.tokenizer import Tokenizer
from tests.hostile import CORPUS, HUGE_LINE, NUL, SURROGATE, hostile_texts, hostile_texts_for_deepseek, real_tokenizer
from tests.tiny_tokenizer import CONTROL, tiny_description, tiny_tokenizer


@functools.cache
def embedded_tokenizer() -> Tokenizer:
    return Tokenizer.load(EMBEDDED)


def conversation(text: str) -> dict[str, Any]:
    """`text` in every place that a user, a tool, an earlier reply or a caller can write in."""
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": text, "arguments": json.dumps({text: text, "n": [text]})},
    }
    described = {"type": "object", "description": text, "properties": {text: {"type": "string"}}}
    schema = {"name": "x", "schema": {"type": "object", "description": text}}
    return {
        "messages": [
            {"role": "system", "content": text},
            {"role": "latest_reminder", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}]},
            {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": text},
            {"role": "assistant", "content": text, "reasoning_content": text},
            {"role": "user", "content": text},
        ],
        "tools": [{"type": "function", "function": {"name": "search", "description": text, "parameters": described}}],
        "response_format": {"type": "json_schema", "json_schema": schema},
    }


@functools.cache
def control_ids(tokenizer: Tokenizer, thinking: Any) -> list[int]:
    """The control tokens of that conversation when nobody tries anything."""
    ids = render_chat(**conversation("x"), thinking=thinking).ids(tokenizer)
    return [token for token in ids if token in tokenizer.control_ids]


def check_injection(tokenizer: Tokenizer, text: str, thinking: Any) -> None:
    # A letter in front, because an empty or blank text has its own form in some places.
    prompt = render_chat(**conversation("x" + text), thinking=thinking)
    ids = prompt.ids(tokenizer)
    assert [token for token in ids if token in tokenizer.control_ids] == control_ids(tokenizer, thinking)
    assert tokenizer.decode(ids) == prompt.text
    assert prompt.text.count("x" + text) >= 9


def check_user_text(tokenizer: Tokenizer, text: str) -> None:
    prompt = render_chat([{"role": "user", "content": text}])
    ids = prompt.ids(tokenizer)
    own = [tokenizer.token_id(t) for t in ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "</think>")]
    assert [token for token in ids if token in tokenizer.control_ids] == own
    assert tokenizer.decode(ids) == f"<｜begin▁of▁sentence｜><｜User｜>{text}<｜Assistant｜></think>"


@settings(max_examples=1000, deadline=None)
@given(hostile_texts(CONTROL))
def test_no_user_text_becomes_a_control_token(text: str) -> None:
    """Fails if a user can open a turn, or if the model would read other characters than the user wrote."""
    check_user_text(tiny_tokenizer(), text)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_no_user_text_becomes_a_control_token_of_deepseek(data: st.DataObject) -> None:
    """The same with the real vocabulary, and all of its 1,283 spellings."""
    check_user_text(real_tokenizer(), data.draw(hostile_texts_for_deepseek()))


@settings(max_examples=150, deadline=None)
@given(hostile_texts(CONTROL), st.sampled_from(["off", "on"]))
def test_no_text_in_a_conversation_becomes_a_control_token(text: str, thinking: Any) -> None:
    """Fails if a name, argument, result, description, reminder or earlier reply can open a turn or end thinking."""
    check_injection(tiny_tokenizer(), text, thinking)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_text_in_a_conversation_becomes_a_control_token_of_deepseek(data: st.DataObject) -> None:
    """The same with the real vocabulary."""
    check_injection(
        real_tokenizer(), data.draw(hostile_texts_for_deepseek()), data.draw(st.sampled_from(["off", "on"]))
    )


@pytest.mark.parametrize("text", [*CORPUS.values(), NUL], ids=[*CORPUS, "NUL"])
def test_no_hostile_text_becomes_a_control_token_of_the_embedded_model(text: str) -> None:
    """Fails if what a message, a file or a saved reply holds can open a turn, or is changed on its way."""
    check_injection(embedded_tokenizer(), text, "on")
    check_user_text(embedded_tokenizer(), text)


def test_a_line_of_a_megabyte_is_text() -> None:
    check_user_text(embedded_tokenizer(), HUGE_LINE)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(UsageError, match="surrogate"):
        render_chat([{"role": "user", "content": SURROGATE}]).ids(embedded_tokenizer())


@pytest.mark.parametrize("mark", ["ref", "box", "point", "polygon"])
def test_marks_of_places_in_pictures_are_text(mark: str) -> None:
    """Fails if they are control tokens in the text of an earlier reply, as the encoder has them."""
    prompt = render_chat(**conversation(f"x<｜{mark}｜>1<｜/{mark}｜>"))
    assert not [prompt.text[a:b] for a, b in prompt.special_ranges if mark in prompt.text[a:b]]


def test_a_missing_control_token_is_named() -> None:
    """A vocabulary without tool calls: fails if the mark is encoded as text, which the model was not trained on."""
    hello = [{"role": "user", "content": "hello"}]
    tool = {"type": "function", "function": {"name": "search"}}
    description = tiny_description()
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] != "｜DSML｜"]
    tokenizer = Tokenizer(description)
    render_chat(hello).ids(tokenizer)
    with pytest.raises(ModelError, match="no control token ｜DSML｜"):
        render_chat(hello, tools=[tool]).ids(tokenizer)
