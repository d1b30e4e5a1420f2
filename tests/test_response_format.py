"""What a request may say about the form of its reply: read strictly, refused before a model is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe.batch.response_format import constraint_of
from localmoe.cli.main import main
from localmoe.constraint import Constraint
from localmoe.errors import UsageError

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["x", "y"]}},
          "required": ["b", "a"], "additionalProperties": False}  # fmt: skip


def wanted(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema} | more}


def write(path: Path, value: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in value) if isinstance(value, list) else value)
    return path


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {}),
        ({"response_format": {"type": "text"}}, {"constraint": None}),
        ({"response_format": {"type": "json_object"}}, {"constraint": Constraint("json_object")}),
        ({"response_format": wanted()}, {"constraint": Constraint("json_schema", json.dumps(SCHEMA))}),
        (
            {"response_format": wanted(strict=False)},
            {"constraint": Constraint("json_schema", json.dumps(SCHEMA), lenient=True)},
        ),
        ({"guided_regex": "a+"}, {"constraint": Constraint("regex", "a+")}),
        ({"grammar": 'start: "a"'}, {"constraint": Constraint("grammar", 'start: "a"')}),
    ],
)
def test_every_field_becomes_its_constraint(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert constraint_of(body) == expected


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"response_format": "json"}, "response_format is '?json"),
        ({"response_format": {"type": "xml"}}, "expected a type"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "expected a type"),
        ({"response_format": {"type": "json_schema"}}, "expected a type"),
        ({"response_format": wanted([])}, "expected an object of name"),
        ({"response_format": wanted(name="a b")}, "the name of json_schema"),
        ({"response_format": wanted(strict="yes")}, "strict is"),
        ({"response_format": wanted(strikt=True)}, "expected an object of name"),
        ({"response_format": wanted({"type": "nope"})}, "Invalid type"),
        ({"response_format": wanted({"enum": ["\ud83d"]})}, "surrogate"),
        ({"guided_regex": ""}, "expected a text"),
        ({"guided_regex": "("}, "unclosed group"),
        ({"grammar": 5}, "grammar is 5"),
        ({"grammar": "start: x"}, "unknown name"),
        ({"guided_regex": "a", "grammar": 'start: "a"'}, "grammar and guided_regex are given"),
    ],
)
def test_what_is_wrong_is_said(body: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        constraint_of(body)


def test_a_bad_schema_is_refused_with_its_line_and_no_model_is_loaded(
    tmp_path: Path, fake_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", [{"prompt": "ok"}, {"prompt": "a", "response_format": wanted({"type": "nope"})}])
    assert main(["batch", str(source), "-o", str(tmp_path / "out"), "-q"]) == 2
    assert "line 2: the json schema is not accepted" in capsys.readouterr().err.replace("\n", " ")
    schema = write(tmp_path / "schema", '{"type": "nope"}')
    assert main(["run", "Hello", "--json-schema", str(schema)]) == 2
    assert main(["batch", str(source), "-o", str(tmp_path / "out"), "--json-schema", str(schema)]) == 2
    assert not fake_model.made


def test_a_batch_holds_each_request_to_its_own_form(tmp_path: Path) -> None:
    """--json-schema is for those that say nothing. Fails if one request's form reaches another, by company or cache."""
    lines: list[dict[str, Any]] = [
        {"prompt": "Tell me.", "max_tokens": 40},
        {"prompt": "Tell me.", "max_tokens": 40, "guided_regex": "[0-9]{5}"},
        {"prompt": "Tell me.", "max_tokens": 8, "response_format": {"type": "text"}},
        {"url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 40, "grammar": 'start: "yes" | "no"'}},
        {"prompt": "Tell me.", "max_tokens": 3, "response_format": wanted()},
    ]
    source, schema = write(tmp_path / "in", lines), write(tmp_path / "schema", json.dumps(SCHEMA))
    outs = []
    for size in ("1", "4"):
        outs.append(tmp_path / size)
        assert main(["batch", str(source), "-o", str(outs[-1]), "--deterministic", "-q", "--batch-size", size,
                     "--json-schema", str(schema)]) == 0  # fmt: skip
    assert outs[0].read_bytes() == outs[1].read_bytes()
    choices = [json.loads(line)["response"]["body"]["choices"][0] for line in outs[0].read_text().splitlines()]
    first, digits, free, word, cut = [choice.get("text") or choice["message"]["content"] for choice in choices]
    assert list(json.loads(first)) == ["b", "a"]
    assert len(digits) == 5 and digits.isdecimal()
    assert word in ("yes", "no")
    assert not free.startswith("{")
    assert choices[4]["finish_reason"] == "length" and "}" not in cut


def test_run_answers_in_the_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    schema = write(tmp_path / "schema", json.dumps(SCHEMA))
    assert main(["run", "Tell me.", "--json-schema", str(schema), "-q", "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["a"] in ("x", "y")
