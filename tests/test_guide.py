"""Replies under a constraint: all of them keep to it, whatever the model would rather say, and whoever runs beside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from localmoe import LLM, Constraint, SamplingParams
from localmoe.errors import GenerationError, UsageError
from localmoe.events import Completion, Finished
from localmoe.guide import Guide, Guides
from localmoe.scheduler import run
from tests.tiny_tokenizer import tiny_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 7]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PATTERN = r"[a-f]{3,9}-\d{1,4}"
LIST = 'start: item ("," item){2}\nitem: "frog" | "cat" | NUMBER\nNUMBER: /[1-9][0-9]{0,2}/'
HELLO = [{"role": "user", "content": "Tell me of a frog."}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(kernels="strict")
    yield llm
    llm.close()


def is_person(text: str) -> bool:
    value = json.loads(text)
    tags = value["tags"]
    assert list(value) == ["name", "age", "tags"]
    assert type(value["age"]) is int and 0 <= value["age"] <= 99
    return 1 <= len(value["name"]) <= 12 and len(tags) <= 3 and all(tag in ("red", "green", 7) for tag in tags)


def params(constraint: Constraint | None, seed: int, **more: Any) -> SamplingParams:
    return replace(SamplingParams(seed=seed, max_tokens=200, constraint=constraint), **more)


def answer(llm: LLM, own: SamplingParams, **options: Any) -> Completion:
    completion = llm.chat(HELLO, own, **options)
    assert completion.error is None
    return completion


@pytest.mark.parametrize("seed", range(6))
def test_every_reply_keeps_to_the_schema(llm: LLM, seed: int) -> None:
    """Fails if a mask is late by one token, or the reply may end before the last brace or go on after it."""
    own = params(Constraint.of_schema(PERSON), seed, temperature=(0, 1, 1.7)[seed % 3])
    completion = answer(llm, own)
    assert completion.finish_reason == "stop" and is_person(completion.text)


@pytest.mark.parametrize("seed", range(6))
def test_a_regular_expression_matches_the_whole_reply(llm: LLM, seed: int) -> None:
    """With and without anchors, in chat and in a continued text."""
    own = params(Constraint("regex", PATTERN if seed % 2 else f"^{PATTERN}$"), seed)
    assert re.fullmatch(PATTERN, answer(llm, own).text)
    [continued] = llm.generate("Once", own)
    assert continued.finish_reason == "stop" and re.fullmatch(PATTERN, continued.text)


def test_a_grammar_is_kept_to(llm: LLM) -> None:
    for seed in range(4):
        items = answer(llm, params(Constraint("grammar", LIST), seed)).text.split(",")
        assert len(items) == 3 and all(re.fullmatch("frog|cat|[1-9][0-9]{0,2}", item) for item in items)


def test_json_of_any_kind_is_an_object_or_cut(llm: LLM) -> None:
    question = [{"role": "user", "content": "A frog in JSON, please."}]
    ended = [llm.chat(question, params(Constraint("json_object"), seed, max_tokens=60)) for seed in range(4)]
    texts = [completion.text for completion in ended if completion.finish_reason == "stop"]
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)


def test_reasoning_is_free_and_the_answer_is_not(llm: LLM) -> None:
    """Fails if the reasoning is JSON, if a reply ends in it, or if the answer after it is not held to the schema."""
    ended = 0
    for seed in range(3):
        completion = answer(llm, params(Constraint.of_schema(PERSON), seed, max_tokens=150), thinking="on")
        assert completion.reasoning and not completion.reasoning.startswith("{")
        if completion.finish_reason == "stop":
            ended += is_person(completion.text)
    assert ended


def test_what_is_cut_gets_no_closing_brace(llm: LLM) -> None:
    whole = answer(llm, params(Constraint.of_schema(PERSON), 0))
    for limit in (1, 4, len(whole.token_ids) - 1):
        cut = answer(llm, params(Constraint.of_schema(PERSON), 0, max_tokens=limit))
        assert cut.finish_reason == "length" and cut.token_ids == whole.token_ids[:limit]
        assert whole.text.startswith(cut.text) and cut.text != whole.text


def test_company_changes_no_token(llm: LLM) -> None:
    """Constrained and free replies in shared steps. Fails if a matcher is shared, or a mask reaches another row."""
    schema, pattern = Constraint.of_schema(PERSON), Constraint("regex", PATTERN)
    many = [params((schema, None, pattern)[seed % 3], seed, max_tokens=25) for seed in range(6)]
    alone = [answer(llm, own).token_ids for own in many]
    starts = [llm.request(llm.prepare_chat(HELLO, constraint=own.constraint), own) for own in many]
    together = {
        index: event.completion.token_ids
        for index, event in run(llm.engine, starts, max_sequences=4, whole_chunks=True)
        if isinstance(event, Finished)
    }
    assert [together[index] for index in range(6)] == alone


def test_a_schema_is_compiled_once() -> None:
    guides, ends = Guides(tiny_tokenizer(), tiny_tokenizer().vocab_size), [1]
    for _ in range(3):
        guides.start(Constraint.of_schema(PERSON))(ends)
        guides.start(Constraint("regex", "a+"))(ends)
    info = guides.compiled.cache_info()  # type: ignore[attr-defined]
    assert (info.misses, info.hits) == (2, 4)


def guide(constraint: Constraint, begins_in: Any = "answer", ends: tuple[int, ...] = (1,)) -> Guide:
    tokenizer = tiny_tokenizer()
    # Logits may be longer than the vocabulary.
    return Guides(tokenizer, tokenizer.vocab_size + 5).start(constraint, begins_in)(ends)


def test_the_reply_may_end_only_where_the_constraint_is_met() -> None:
    tokenizer, own = tiny_tokenizer(), guide(Constraint("regex", "aab?"))
    [a], [b] = tokenizer.encode("a"), tokenizer.encode("b")
    assert own.allowed()[a] and not own.allowed()[1] and not own.allowed()[b]
    own.take(a)
    assert not own.allowed()[1] and not own.complete
    own.take(a)
    assert own.allowed()[1] and own.allowed()[b] and not own.complete
    own.take(b)
    assert own.complete
    assert own.allowed().nonzero().flatten().tolist() == [1]


def test_no_unused_id_and_no_control_token_is_allowed() -> None:
    """Fails if "anything" lets the next question begin, or an id be drawn that the vocabulary leaves unused."""
    tokenizer, own = tiny_tokenizer(), guide(Constraint("regex", "(?s).*"))
    allowed = set(own.allowed().nonzero().flatten().tolist())
    assert allowed & tokenizer.control_ids == {1}
    assert max(allowed) < tokenizer.vocab_size


def test_a_model_that_may_think_first_is_asked_for_neither() -> None:
    """begins_in undecided: <think> or the answer; nothing ends the reply until the answer is there."""
    tokenizer = tiny_tokenizer()
    opens, closes = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    assert opens is not None and closes is not None
    [a] = tokenizer.encode("a")
    own = guide(Constraint("regex", "a"), "undecided")
    assert own.allowed()[opens] and own.allowed()[a]
    own.take(a)
    assert own.complete and not own.allowed()[opens]
    own = guide(Constraint("regex", "a"), "undecided")
    for token in (opens, *tokenizer.encode("zzz")):
        own.take(token)
        assert not own.allowed()[1] and own.allowed()[closes] and not own.complete
    own.take(closes)
    assert own.allowed().nonzero().flatten().tolist() == [a]


def test_a_grammar_cannot_ask_for_control_tokens() -> None:
    """Fails if a request could make the model begin a user's turn."""
    own = guide(Constraint("grammar", 'start: "a" <[0]>'))
    own.take(tiny_tokenizer().encode("a")[0])
    with pytest.raises(GenerationError, match="allows no token here"):
        own.allowed()


@pytest.mark.parametrize(
    ("constraint", "problem"),
    [
        (Constraint("json_schema", '{"type": "nope"}'), "the json schema is not accepted: Invalid type"),
        (Constraint("json_schema", "[]"), "the json schema is not accepted"),
        (Constraint("json_schema", '{"not": {}}'), "Unimplemented keys"),
        (Constraint("json_schema", '{"$ref": "http://localhost/x"}'), "does not fetch"),
        (Constraint("regex", "("), "unclosed group"),
        (Constraint("regex", r"[^\x00-\x{10FFFF}]"), "no text meets it"),
        (Constraint("grammar", "start: x"), "unknown name"),
    ],
)
def test_what_cannot_be_held_to_is_refused_before_it_runs(llm: LLM, constraint: Constraint, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        llm.stream_chat(HELLO, params(constraint, 0))


def test_a_lenient_schema_passes_over_what_it_cannot_enforce(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    own = params(Constraint.of_schema(schema | {"not": {}}, lenient=True), 0)
    assert json.loads(answer(llm, own).text) == {"a": 1}


def test_tools_and_begun_replies_are_refused(llm: LLM) -> None:
    own = params(Constraint("regex", "a"), 0)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(UsageError, match="with tools"):
        llm.stream_chat(HELLO, own, tools=[tool])
    with pytest.raises(UsageError, match="that the messages begin"):
        llm.stream_chat([*HELLO, {"role": "assistant", "content": "{", "prefix": True}], own)


def test_probabilities_are_the_model_s_own(llm: LLM) -> None:
    """Fails if a constraint changes what is reported as the model's opinion."""
    own = params(Constraint("regex", PATTERN), 3, logprobs=2)
    completion = answer(llm, own)
    assert completion.logprobs is not None
    ids = [*llm.chat_ids(HELLO), *completion.token_ids]
    expected = torch.log_softmax(llm.logits(ids[:-1]), 1)[-len(completion.token_ids) :]
    for sample, row in zip(completion.logprobs, expected, strict=True):
        assert sample.logprob == pytest.approx(float(row[sample.id]), abs=1e-3)
