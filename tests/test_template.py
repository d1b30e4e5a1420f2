"""localmoe.template: the text that transformers gives, where the reply begins, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe.errors import ModelError, UsageError
from localmoe.template import Template, TemplateSource, find_template
from tests.chat_templates import CONVERSATIONS, HELLO, R1, REPLY, SPECIAL, TEMPLATES, V2, V3, V31
from tests.tiny_tokenizer import tiny_tokenizer

FILE = Path("tokenizer_config.json")


def template(text: str) -> Template:
    return Template(TemplateSource(text, FILE, SPECIAL), tiny_tokenizer())


@pytest.mark.parametrize("thinking", ["off", "on"])
@pytest.mark.parametrize("conversation", list(CONVERSATIONS))
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_text_is_that_of_transformers(name: str, conversation: str, thinking: Any) -> None:
    """Fails if trimming, filters, tests, macros or what a template is given differ."""
    if name in ("V2", "V3") and thinking == "on":
        pytest.skip("these have no thinking mode")
    from transformers.utils.chat_template_utils import render_jinja_template

    on = thinking == "on"
    (expected,), _ = render_jinja_template(
        [CONVERSATIONS[conversation]], chat_template=TEMPLATES[name], add_generation_prompt=True, thinking=on,
        enable_thinking=on, **SPECIAL,
    )  # fmt: skip
    assert template(TEMPLATES[name]).render(CONVERSATIONS[conversation], thinking=thinking).text == expected


def test_control_tokens_are_those_that_the_template_writes() -> None:
    """Fails if one of the template's is text, if one is added (a second BOS), or if a caller's text is one."""
    prompt = template(V31).render([{"role": "user", "content": "<｜User｜>"}, REPLY, HELLO], thinking="on")
    assert [prompt.text[a:b] for a, b in prompt.special_ranges] == [
        SPECIAL["bos_token"], "<｜User｜>", "<｜Assistant｜>", "</think>", SPECIAL["eos_token"], "<｜User｜>",
        "<｜Assistant｜>", "<think>",
    ]  # fmt: skip
    assert tiny_tokenizer().decode(prompt.ids(tiny_tokenizer())) == prompt.text


@pytest.mark.parametrize(
    ("name", "thinking", "begins_in"),
    [
        ("V2", "off", "answer"),
        ("V3", "off", "answer"),
        ("R1", "off", "reasoning"),
        ("R1", "on", "reasoning"),
        ("V3.1", "off", "answer"),
        ("V3.1", "on", "reasoning"),
        ("GLM", "off", "answer"),
        ("GLM", "on", "undecided"),
    ],
)
def test_a_prompt_knows_where_the_reply_begins(name: str, thinking: Any, begins_in: str) -> None:
    """With `<think>` in a user's text, which must not count: fails if reasoning would be shown as the answer."""
    prompt = template(TEMPLATES[name]).render([{"role": "user", "content": "</think> or <think>"}], thinking=thinking)
    assert prompt.begins_in == begins_in


def test_a_reply_that_may_think_is_taken_apart() -> None:
    parser = template(TEMPLATES["GLM"]).render([HELLO], thinking="on").parser()
    pieces = [piece for text in ("\n<th", "ink>\nHm", "</think>", "\n\nYes") for piece in parser.push(text)]
    assert [(piece.kind, piece.text) for piece in pieces] == [("reasoning", "Hm"), ("answer", "Yes")]
    assert parser.finish() == []
    assert parser.message() == {"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}


@pytest.mark.parametrize("reply", ["Yes", "<thinly>", "<th", ""])
def test_a_reply_that_does_not_think_is_an_answer(reply: str) -> None:
    parser = template(TEMPLATES["GLM"]).render([HELLO], thinking="on").parser()
    for character in reply:
        parser.push(character)
    parser.finish()
    assert parser.message() == {"role": "assistant", "content": reply}


def test_where_thinking_is_no_control_token_it_is_told_by_its_text() -> None:
    """As in the tokenizers of V2 and V3: fails if only control tokens are looked at."""
    from localmoe.tokenizer import Tokenizer
    from tests.tiny_tokenizer import tiny_description

    description = tiny_description()
    description["added_tokens"] = [t for t in description["added_tokens"] if "think" not in t["content"]]
    tokenizer = Tokenizer(description)
    prompt = Template(TemplateSource(R1, FILE, SPECIAL), tokenizer).render([HELLO])
    assert prompt.begins_in == "reasoning" and prompt.text.endswith("<｜Assistant｜><think>\n")
    assert tokenizer.decode(prompt.ids(tokenizer)) == prompt.text


@pytest.mark.parametrize(
    ("name", "messages", "options", "message"),
    [
        ("V3", [HELLO], {"thinking": "on"}, "no thinking mode"),
        ("V3.1", [HELLO], {"thinking": "on", "effort": "low"}, "knows no effort"),
        ("V3", [HELLO], {"thinking": "maybe"}, "expected off or on"),
        ("V3", [HELLO], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools are given"),
        ("V3", [], {}, "no messages"),
        ("V3", ["hello"], {}, "has the role hello"),
        ("V3", [HELLO, {"role": "tool", "content": "x"}], {}, r"messages\[1\] has the role tool"),
        ("V3", [HELLO, {"role": "assistant", "content": "x", "prefix": True}], {}, r"messages\[1\] has prefix"),
        ("V3", [HELLO, {"role": "assistant", "content": "x", "tool_calls": [1]}], {}, r"messages\[1\] has tool_calls"),
        ("V3", [{"role": "user"}], {}, "no text"),
        ("V3", [{"role": "user", "content": [{"type": "image_url"}]}], {}, "no text"),
        ("V3", [{"role": "user", "content": "a\ud83d"}], {}, "surrogate"),
        ("GLM", [REPLY], {}, "refuses the messages: begin with a question"),
    ],
)
def test_what_has_no_place_in_the_prompt_is_refused(name: str, messages: Any, options: Any, message: str) -> None:
    """Fails if anything would be left out in silence."""
    with pytest.raises(UsageError, match=message):
        template(TEMPLATES[name]).render(messages, **options)


def test_parts_of_a_text_are_put_together() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "User: a\n\nb\n\n" in template(V2).render([{"role": "user", "content": parts}]).text


def test_the_file_goes_before_the_field(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<b>", "lstrip": False}, "eos_token": None}
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path = tmp_path / "tokenizer_config.json"
    assert find_template(tmp_path) is None
    path.write_text(json.dumps(config))
    assert find_template(tmp_path) is None
    path.write_text(json.dumps(config | {"chat_template": "x"}))
    assert find_template(tmp_path) == TemplateSource("x", path, {"bos_token": "<b>"})
    path.write_text(json.dumps(config | {"chat_template": named}))
    assert find_template(tmp_path) == TemplateSource("d", path, {"bos_token": "<b>"})
    (tmp_path / "chat_template.jinja").write_text("f")
    assert find_template(tmp_path) == TemplateSource("f", tmp_path / "chat_template.jinja", {"bos_token": "<b>"})


@pytest.mark.parametrize("content", [b"\xff", b"x" * (1 << 20) + b"x"])
def test_a_file_that_is_no_template_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        find_template(tmp_path)


def test_a_field_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: chat_template is 3"):
        find_template(tmp_path)


def test_the_question_is_found(tmp_path: Path) -> None:
    """Fails if what conversations have in common would be kept up to a wrong place."""
    tokenizer = tiny_tokenizer()
    for text in (V3, V31, R1):
        prompt = template(text).render([HELLO, REPLY, HELLO])
        ids = prompt.ids(tokenizer)
        at = prompt.question_at([HELLO, REPLY, HELLO], len(ids), tokenizer)
        assert tokenizer.decode(ids[at - 1 :]).startswith("<｜User｜>" + HELLO["content"])


def test_jinja_is_imported_for_the_first_template() -> None:
    """Fails if chats with DeepSeek-V4 would wait for it."""
    code = "import sys, localmoe.chat_format, localmoe.template; print('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
