"""Tools in a batch: what is offered, what is refused, and calls in replies as OpenAI writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localmoe.batch.request import Reading, Request, parse
from localmoe.batch.tools import calls_of
from localmoe.errors import UsageError
from localmoe.prompt import render_chat
from localmoe.sampler import SamplingParams
from tests.batch_files import batch, rows, write
from tests.test_batch import template_model

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the weather of a city.", "parameters": CITY},
}


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": ASK, "tools": [TOOL], "temperature": 0, "max_tokens": 120} | fields


def parsed(**fields: Any) -> Request:
    return parse(json.dumps(ask(**fields)).encode(), 1, Reading(), lambda: render_chat)


def function(**fields: Any) -> dict[str, Any]:
    return TOOL | {"function": TOOL["function"] | fields}


@pytest.mark.usefixtures("one_load")
def test_a_call_is_in_the_reply_under_an_id_of_its_own(tmp_path: Path) -> None:
    """At two batch sizes, after an interruption, and cut. Fails if an id is drawn anew, or is there twice."""
    lines = [ask(custom_id="a"), ask(custom_id="b"), ask(custom_id="cut", max_tokens=30), ask(n=3, temperature=0.5)]
    source, out = write(tmp_path / "in", [line | {"seed": 3} for line in lines]), tmp_path / "out"
    assert batch(source, out, "--batch-size", "4") == 0
    assert batch(source, tmp_path / "other", "--batch-size", "1") == 0
    whole = out.read_bytes()
    assert (tmp_path / "other").read_bytes() == whole
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert batch(source, out) == 0 and out.read_bytes() == whole
    choices = [choice for row in rows(out) for choice in row["response"]["body"]["choices"]]
    for choice, reason in zip(choices, ("tool_calls", "tool_calls", "length"), strict=False):
        [call] = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == reason and choice["message"]["content"] == ""
        assert call.keys() == {"id", "type", "function"} and call["type"] == "function"
        assert call["function"].keys() == {"name", "arguments"}
    json.loads(choices[0]["message"]["tool_calls"][0]["function"]["arguments"])
    ids = [call["id"] for choice in choices for call in choice["message"].get("tool_calls", [])]
    assert len(ids) > 4 and len(set(ids)) == len(ids)


def test_calls_of_a_reply_have_ids_of_their_place() -> None:
    call = {"index": 0, "id": "drawn", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    one, two = calls_of([call, call], "a")
    assert one["id"] != two["id"] and "drawn" not in (one["id"], two["id"])
    assert [one, two] == list(calls_of([call, call], "a")) != list(calls_of([call, call], "b"))


@pytest.mark.usefixtures("one_load")
def test_a_call_and_its_result_go_on(tmp_path: Path) -> None:
    """Fails if what a reply holds is not taken back as a message of the next request."""
    source, out = write(tmp_path / "in", [ask()]), tmp_path / "out"
    assert batch(source, out) == 0
    message = rows(out)[0]["response"]["body"]["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "It is sunny."}
    for called in (message, message | {"content": None}):
        write(source, [ask(messages=[*ASK, called, result])])
        assert batch(source, out, "--restart") == 0
        body = rows(out)[0]["response"]["body"]
        assert body["choices"][0]["message"]["content"] and body["choices"][0]["finish_reason"] == "stop"
        rendered = parsed(messages=[*ASK, called, result]).rendered(render_chat, None)
        assert "<tool_result>It is sunny.</tool_result>" in rendered.text and '"name": "get_weather"' in rendered.text


def test_with_none_the_model_is_told_of_no_tool() -> None:
    """Fails if it could call one, or if `auto`, which says nothing, were another request."""
    none = parsed(tool_choice="none").rendered(render_chat, None)
    assert none == render_chat(ASK) and not none.tools
    params = SamplingParams()
    bare = parse(json.dumps({name: value for name, value in ask().items() if name != "tools"}).encode(), 1, Reading())
    assert parsed(tool_choice="none").digest(params, {}) == bare.digest(params, {})
    assert parsed(tool_choice="auto").digest(params, {}) == parsed().digest(params, {}) != bare.digest(params, {})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tools": "get_weather"}, "tools is get_weather, expected a list"),
        ({"tools": []}, "expected a list of 1 to 128"),
        ({"tools": [TOOL] * 129}, "expected a list of 1 to 128"),
        ({"tools": [5]}, r"tools\[0\] is of type 5"),
        ({"tools": [TOOL, {"type": "web_search"}]}, r"tools\[1\] is of type web_search"),
        ({"tools": [TOOL | {"cache": 1}]}, r"tools\[0\] has cache"),
        ({"tools": [TOOL | {"function": "f"}]}, r"tools\[0\] is of type function, expected"),
        ({"tools": [function(returns=1)]}, r"tools\[0\] has returns"),
        ({"tools": [function(name="get weather")]}, r"the name of tools\[0\] is get weather"),
        ({"tools": [function(name=7)]}, r"the name of tools\[0\] is 7"),
        ({"tools": [function(description=7)]}, r"the description of tools\[0\] is 7"),
        ({"tools": [function(parameters=[])]}, r"parameters of tools\[0\] are a list"),
        ({"tools": [function(parameters={"type": "array"})]}, "Invalid schema for function"),
        ({"tools": [function(strict=True)]}, "not held to a schema"),
        ({"tools": [TOOL, TOOL]}, "two tools have the name get_weather"),
        ({"tools": [function(description="\ud83d")]}, "lone surrogate"),
        ({"tool_choice": "required"}, "tool_choice is required, expected auto or none"),
        ({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, "expected auto or none"),
        ({"tools": None, "tool_choice": "auto"}, "without tools"),
        ({"response_format": {"type": "json_object"}}, "held to a form and call tools"),
        ({"messages": [*ASK, {"role": "assistant", "content": "", "tool_calls": 5}]}, "cannot be rendered"),
        ({"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "r"}]}, "tool_calls"),
        ({"messages": None, "prompt": "a", "url": "/v1/completions"}, "of /v1/chat/completions"),
    ],
)
def test_what_is_no_tool_is_refused(fields: dict[str, Any], problem: str) -> None:
    """Before anything is loaded. Fails if a part of a tool would be left out without a word."""
    with pytest.raises(UsageError, match=problem) as caught:
        parsed(**fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_model_whose_calls_are_not_parsed_is_offered_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = template_model(tmp_path / "tiny", "hello")
    source = write(tmp_path / "in", [ask(tool_choice="none", max_tokens=2), ask()])
    assert batch(source, tmp_path / "out", "-m", str(model)) == 2
    said = capsys.readouterr().err
    assert "line 2: tools are given" in said and "line 1" not in said
