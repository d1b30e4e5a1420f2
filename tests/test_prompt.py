"""localmoe.prompt: DeepSeek's own vectors, what it refuses, and where a reply begins."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from localmoe.errors import UsageError
from localmoe.prompt import RenderedPrompt, render_chat, turn_end_ids
from tests.conftest import shared_data
from tests.hostile import real_tokenizer
from tests.tiny_tokenizer import tiny_tokenizer

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "search", "description": "Look it up", "parameters": {"type": "object"}},
}


def render_body(body: dict[str, Any]) -> RenderedPrompt:
    """Our function on a request as the API takes it."""
    off = body.get("thinking", {}).get("type") == "disabled"
    return render_chat(
        body["messages"],
        thinking="off" if off else "on",
        effort=body.get("reasoning_effort"),
        tools=body.get("tools"),
        tool_choice=body.get("tool_choice"),
        response_format=body.get("response_format"),
        model_version="v4.1" if "V4.1" in body["model"] else "v4",
    )


def prompt_vectors() -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads(shared_data("dsv4_recipe_vectors/prompts.json").read_text())["vectors"]
    assert len(vectors) == 180
    return vectors


def test_prompts_equal_the_reference_vectors() -> None:
    """164 conversations, V4 and V4.1, at five settings of thinking: fails on any difference of a character."""
    vectors = [vector for vector in prompt_vectors() if "prompt" in vector]
    assert len(vectors) == 164
    wrong = [(v["name"], v["model"], v["mode"]) for v in vectors if render_body(v["body"]).text != v["prompt"]]
    assert wrong == []


def test_prompt_ids_equal_the_reference_vectors() -> None:
    """Fails if a control token of the prompt is encoded as text, or text of a user as a control token."""
    vectors = [vector for vector in prompt_vectors() if "ids" in vector]
    assert len(vectors) == 34
    wrong = [v["name"] for v in vectors if render_body(v["body"]).ids(real_tokenizer()) != v["ids"]]
    assert wrong == []


def test_conversations_the_encoder_refuses_are_usage_errors() -> None:
    """16 rows: fails if the encoder's exception escapes, or its reason is lost."""
    vectors = [vector for vector in prompt_vectors() if "error" in vector]
    assert len(vectors) == 16
    for vector in vectors:
        with pytest.raises(UsageError) as caught:
            render_body(vector["body"])
        assert vector["error"].removeprefix("ConversionError: ") in str(caught.value)


NO_DEVELOPER = pytest.mark.xfail(
    raises=UsageError, reason="deepseek-recipe has no `developer` role (DeepSeek-internal)"
)
NO_TASK = pytest.mark.xfail(raises=AssertionError, reason="deepseek-recipe does not write quick-task tokens (`task`)")


@pytest.mark.parametrize(
    ("case", "thinking", "reply"),
    [
        pytest.param(
            1, "on", "Got the weather data. Let me format a nice response.</think>The weather in ", id="tools"
        ),
        pytest.param(2, "on", "The user asks about the capital of France. It is Paris.</think>The", id="thinking"),
        pytest.param(3, "on", "现在开始组织回答。</think>请及时就医。", id="developer role", marks=NO_DEVELOPER),
        pytest.param(4, "off", "<｜action｜>Search<｜end▁of▁sentence｜>", id="latest reminder"),
        pytest.param(4, "off", "Search<｜end▁of▁sentence｜>", id="task token", marks=NO_TASK),
    ],
)
def test_prompts_equal_the_official_vectors_up_to_the_reply(case: int, thinking: Any, reply: str) -> None:
    """The launch encoder's own cases; its default effort is what deepseek-recipe calls low, which writes nothing.

    Fails if the two encoders differ in history, tools, results or the generation prompt."""
    folder = shared_data("dsv4_official/flash/encoding/tests")
    given_input = json.loads((folder / f"test_input_{case}.json").read_text())
    conversation = given_input if isinstance(given_input, dict) else {"messages": given_input}
    expected = (folder / f"test_output_{case}.txt").read_text()
    prompt = render_chat(
        conversation["messages"][:-1],
        thinking=thinking,
        effort="low" if thinking == "on" else None,
        tools=conversation.get("tools"),
    )
    assert expected.startswith(prompt.text)
    assert expected[len(prompt.text) :].startswith(reply)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "Empty input messages"),
        ([{"role": "developer", "content": "x"}], {}, "developer"),
        ([{"role": "user"}], {}, "missing field `content`"),
        (["hello"], {}, r"messages\[0\] is hello, expected an object"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            {},
            "part of type image_url",
        ),
        ([{"role": "user", "content": "a\ud83d"}], {}, "lone surrogate"),
        ([{"role": "tool", "tool_call_id": "z", "content": "r"}], {}, "tool"),
        (HELLO, {"effort": "low"}, "effort is low, thinking off"),
        (HELLO, {"effort": "huge", "thinking": "on"}, "effort is huge"),
        (HELLO, {"thinking": "maybe"}, "thinking is maybe"),
        (HELLO, {"model_version": "v5"}, "v5"),
        (HELLO, {"tools": [TOOL], "tool_choice": "sometimes"}, "expected one of `none`, `auto`, `required`"),
        (HELLO, {"tools": [{"type": "function", "function": {"name": object()}}]}, "cannot be rendered"),
        (HELLO, {"tools": [{"type": "function", "function": {"name": "</think>"}}]}, "does not match pattern"),
    ],
)
def test_what_cannot_be_rendered_is_refused(messages: Any, options: Any, message: str) -> None:
    """Fails if a part is silently left out (the encoder's way with images), or another exception escapes."""
    with pytest.raises(UsageError, match=message):
        render_chat(messages, **options)


def test_a_prompt_knows_where_the_reply_begins() -> None:
    """Fails if a reply to a continued or a forced turn would be taken apart at the wrong place."""
    begun = [*HELLO, {"role": "assistant", "content": "Once", "prefix": True}]
    thought = [*HELLO, {"role": "assistant", "content": "", "reasoning_content": "Hm", "prefix": True}]
    prompts = {
        "answer": render_chat(HELLO),
        "reasoning": render_chat(HELLO, thinking="on", effort="low"),
        "continued answer": render_chat(begun),
        "continued reasoning": render_chat(thought, thinking="on", effort="low"),
        "forced call": render_chat(HELLO, tools=[TOOL], tool_choice="required"),
    }
    assert {name: (p.begins_in, p.tools, p.continued) for name, p in prompts.items()} == {
        "answer": ("answer", False, False),
        "reasoning": ("reasoning", False, False),
        "continued answer": ("answer", False, False),
        "continued reasoning": ("reasoning", False, True),
        "forced call": ("tool_calls", True, False),
    }
    assert prompts["reasoning"].text.endswith("<think>") and prompts["answer"].text.endswith("</think>")
    with pytest.raises(UsageError, match=r"V4\.1"):
        render_chat(HELLO, model_version="v4.1").parser()


def test_any_token_of_another_turn_ends_the_reply() -> None:
    """Models that were cut short go on as the user: fails if only the end of sentence ends a turn."""
    spellings = [
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜latest_reminder｜>",
    ]
    assert turn_end_ids(tiny_tokenizer()) == {tiny_tokenizer().token_id(spelling) for spelling in spellings}
    assert turn_end_ids(real_tokenizer()) == {0, 1, 128803, 128804, 128805, 128828}


def test_importing_it_loads_no_library() -> None:
    """Fails if `localmoe --help` would pay for torch, tokenizers or deepseek-recipe."""
    code = "import sys, localmoe.prompt; print({'torch', 'tokenizers', 'deepseek_recipe'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
