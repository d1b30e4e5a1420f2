"""localmoe.template: control tokens only where a template puts them, whatever anyone writes in a conversation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment

from localmoe.template import Template, TemplateSource
from localmoe.tokenizer import Tokenizer
from tests.chat_templates import SPECIAL, TEMPLATES
from tests.hostile import CORPUS, HUGE_LINE, NUL, hostile_texts, hostile_texts_for_deepseek, real_tokenizer
from tests.test_template import FILE
from tests.tiny_tokenizer import CONTROL, tiny_description, tiny_tokenizer

# What the marks are made of, and what could be taken for one.
MARKS = ["\U0010ffff", "\U0010fffe", "\U0010fffe0", "\U0010fffe1", "<\U0010ffff", "<", ">", "｜"]
# A template that puts what is written between the parts of a control token.
BETWEEN = "{% for m in messages %}<｜{{ m.content }}｜>{{ m.content }}{{ m.content }}<{% endfor %}<｜Assistant｜>"
SPLITS = ["V2", "V3", "V3.1"]


@functools.cache
def template(text: str, tokenizer: Tokenizer) -> Template:
    return Template(TemplateSource(text, FILE, SPECIAL), tokenizer)


def conversation(text: str) -> list[dict[str, Any]]:
    """`text` in every place that a user, an earlier reply or a caller can write in."""
    return [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "reasoning_content": text},
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}]},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text},
    ]


@functools.cache
def control_ids(text: str, tokenizer: Tokenizer, thinking: Any) -> list[int]:
    """The control tokens of that conversation when nobody tries anything."""
    ids = template(text, tokenizer).render(conversation("x"), thinking=thinking).ids(tokenizer)
    return [token for token in ids if token in tokenizer.control_ids]


def check(name: str, tokenizer: Tokenizer, text: str) -> None:
    thinking: Any = "off" if name in ("V2", "V3") else "on"
    # Letters around it, because templates look whether a text is empty, and trim it.
    text = f"x{text}x"
    prompt = template(TEMPLATES[name], tokenizer).render(conversation(text), thinking=thinking)
    ids = prompt.ids(tokenizer)
    assert [token for token in ids if token in tokenizer.control_ids] == control_ids(
        TEMPLATES[name], tokenizer, thinking
    )
    assert tokenizer.decode(ids) == prompt.text
    assert prompt.text.count(text) >= 6


@settings(max_examples=300, deadline=None)
@given(hostile_texts([*CONTROL, *MARKS]), st.sampled_from(list(TEMPLATES)))
def test_no_text_in_a_conversation_becomes_a_control_token(text: str, name: str) -> None:
    """Fails if a text can open a turn, end thinking, or is changed on its way."""
    check(name, tiny_tokenizer(), text)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_text_in_a_conversation_becomes_a_control_token_of_deepseek(data: st.DataObject) -> None:
    """The same with a real vocabulary."""
    check(data.draw(st.sampled_from(list(TEMPLATES))), real_tokenizer(), data.draw(hostile_texts_for_deepseek()))


@pytest.mark.parametrize("text", [*CORPUS.values(), NUL], ids=[*CORPUS, "NUL"])
def test_no_hostile_text_becomes_a_control_token(text: str) -> None:
    check("V3.1", tiny_tokenizer(), text)


@settings(max_examples=300, deadline=None)
@given(hostile_texts([*CONTROL, *MARKS]), st.sampled_from(SPLITS))
def test_the_text_is_what_the_template_makes_of_the_text_as_it_is(text: str, name: str) -> None:
    """Fails if marks are left or the text's own are lost; at the texts' ends too, where nothing stands around them."""
    messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    plain = Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATES[name])
    expected = plain.render(messages=messages, add_generation_prompt=True, **SPECIAL)
    assert template(TEMPLATES[name], tiny_tokenizer()).render(messages).text == expected


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.sampled_from(["User", "U", "User｜>", "｜User", "think>", ">", "s"]), hostile_texts(CONTROL)))
def test_no_text_completes_a_control_token_that_a_template_begins(text: str) -> None:
    """Fails if only what begins in a text is looked at."""
    prompt = template(BETWEEN, tiny_tokenizer()).render([{"role": "user", "content": text}])
    assert [prompt.text[a:b] for a, b in prompt.special_ranges] == ["<｜Assistant｜>"] or not text


def test_an_end_of_thinking_in_a_reply_is_text() -> None:
    """As with DeepSeek-V4: R1's template drops what is before it, which is for callers who do not keep them apart.

    localmoe keeps reasoning in a field of its own. Fails if a reply that speaks of the mark loses its beginning."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It is </think>, see?"}]
    messages.append({"role": "user", "content": "x"})
    assert "It is </think>, see?" in template(TEMPLATES["R1"], tiny_tokenizer()).render(messages).text


def test_the_longest_of_several_control_tokens_is_taken() -> None:
    """As the tokenizers library does; and one of a single character is never made of a text."""
    description = tiny_description()
    size = len(description["model"]["vocab"])
    for text in ("<｜User｜>!", "☃"):
        description["added_tokens"].append({"id": size, "content": text, "special": True})
        size += 1
    tokenizer = Tokenizer(description)
    prompt = template("<｜User｜>!<｜User｜>☃{{ messages[0].content }}", tokenizer).render(
        [{"role": "user", "content": "☃<｜User｜>!☃"}]
    )
    assert prompt.text == "<｜User｜>!<｜User｜>☃☃<｜User｜>!☃"
    assert [prompt.text[a:b] for a, b in prompt.special_ranges] == ["<｜User｜>!", "<｜User｜>", "☃"]


@pytest.mark.parametrize("text", [HUGE_LINE, "<" * 1_000_000], ids=["a line", "beginnings"])
def test_a_megabyte_is_text(text: str) -> None:
    """Fails if a text full of beginnings is looked at for every control token at every place."""
    tokenizer = real_tokenizer()
    prompt = template(TEMPLATES["V3"], tokenizer).render([{"role": "user", "content": text}])
    assert prompt.text == f"{SPECIAL['bos_token']}<｜User｜>{text}<｜Assistant｜>"
