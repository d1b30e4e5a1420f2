"""Several replies to a request, the probabilities of their tokens, the prompt before them, as OpenAI writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe import LLM
from localmoe.batch import logprobs
from localmoe.batch.answer import choice_seed
from localmoe.batch.shape import Shape, shape_of
from localmoe.cli.main import main
from localmoe.errors import UsageError
from localmoe.sampler import Sample
from localmoe.tokenizer import Tokenizer
from tests.batch_files import batch, rows, write
from tests.tiny_tokenizer import tiny_tokenizer


def answers(folder: Path, bodies: list[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    """The bodies of the responses. Bodies without messages are for /v1/completions."""
    url = {True: "/v1/chat/completions", False: "/v1/completions"}
    source, out = folder / "in", folder / "out"
    lines = [{"custom_id": str(i), "url": url["messages" in body], "body": body} for i, body in enumerate(bodies)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["batch", str(source), "-o", str(out), "--deterministic", "-q", "--restart", *more]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return [row["response"]["body"] for row in sorted(found, key=lambda row: int(row["custom_id"]))]


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "seed": 5, "max_tokens": 6} | fields


def test_n_replies_are_those_of_n_requests_with_their_seeds(tmp_path: Path) -> None:
    """At two batch sizes. Fails if a reply's random numbers depend on its company, or the prompt is counted n times."""
    alone = answers(tmp_path, [ask(seed=choice_seed(5, index)) for index in range(3)])
    for size in ("1", "4"):
        [together] = answers(tmp_path, [ask(n=3)], "--batch-size", size)
        assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
        texts = [choice["message"]["content"] for choice in together["choices"]]
        assert texts == [body["choices"][0]["message"]["content"] for body in alone]
        assert len(set(texts)) > 1
        usage = together["usage"]
        assert usage["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
        assert usage["completion_tokens"] == sum(body["usage"]["completion_tokens"] for body in alone)


def test_a_prompt_is_made_once_for_all_replies_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each reply tokenizes it."""
    made: list[str] = []
    real = Tokenizer.encode_special
    monkeypatch.setattr(
        Tokenizer, "encode_special", lambda self, text, ranges: made.append(text) or real(self, text, ranges)
    )
    answers(tmp_path, [ask(n=5, max_tokens=2)])
    assert len(made) == 1


def test_several_prompts_are_replied_to_as_if_each_stood_alone(tmp_path: Path) -> None:
    """Texts and token ids, echoed and scored, two replies to each; at two batch sizes. Fails if a choice has another's
    place, or if a prompt is not counted."""
    several = {"n": 2, "max_tokens": 4, "echo": True, "logprobs": 1, "temperature": 0.8}
    for prompts in (["Once upon a time", "The dog"], [[5, 6, 7, 8], [9, 10, 11]]):
        alone = answers(
            tmp_path,
            [several | {"prompt": prompts[at // 2], "n": 1, "seed": choice_seed(5, at)} for at in range(4)],
        )
        for size in ("1", "3"):
            [together] = answers(tmp_path, [several | {"prompt": prompts, "seed": 5}], "--batch-size", size)
            assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
            for choice, body in zip(together["choices"], alone, strict=True):
                [own] = body["choices"]
                assert choice["text"] == own["text"] and choice["finish_reason"] == own["finish_reason"]
                assert choice["logprobs"]["tokens"] == own["logprobs"]["tokens"]
                # Only the first of a prompt's replies begins where the prompt was scored.
                scores = choice["logprobs"]["token_logprobs"][1:]
                assert scores == pytest.approx(own["logprobs"]["token_logprobs"][1:], abs=1e-5)
            assert together["usage"]["prompt_tokens"] == sum(body["usage"]["prompt_tokens"] for body in alone) // 2
            assert together["usage"]["completion_tokens"] == 16


def test_one_prompt_that_does_not_fit_fails_the_request(tmp_path: Path) -> None:
    """Fails if the row holds the replies to the others, as if nothing had been asked but those."""
    lines = [{"prompt": ["a", "b" * 50_000], "max_tokens": 2}, {"prompt": ["a", "b"], "max_tokens": 2}]
    source = write(tmp_path / "in", [{"url": "/v1/completions", "body": body} for body in lines])
    assert batch(source, tmp_path / "out") == 3
    failed, done = rows(tmp_path / "out")
    assert failed["response"]["status_code"] == 400 and "the context holds" in failed["error"]["message"]
    assert len(done["response"]["body"]["choices"]) == 2


def test_an_echo_has_the_probability_of_each_token_of_the_prompt(tmp_path: Path) -> None:
    """Token ids, with and without a reply, and a text. Fails if the lists are shifted by one."""
    llm = LLM(kernels="strict")
    ids = llm.tokenizer.encode("Once upon a time there was a frog.")
    expected = torch.log_softmax(llm.logits(ids), 1)
    own = [float(expected[at, token]) for at, token in enumerate(ids[1:])]
    asked = {"prompt": ids, "echo": True, "logprobs": 2, "temperature": 0}
    silent, short, text = answers(
        tmp_path,
        [asked | {"max_tokens": 0}, asked | {"max_tokens": 1}, asked | {"prompt": "Once", "max_tokens": 1}],
    )
    found = silent["choices"][0]["logprobs"]
    assert silent["choices"][0]["text"] == "".join(found["tokens"]) == llm.tokenizer.decode(ids)
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(own, abs=1e-3)
    assert all(len(top) == 2 for top in found["top_logprobs"][1:])
    assert found["text_offset"] == [len(llm.tokenizer.decode(ids[:at])) for at in range(len(ids))]
    assert silent["usage"]["completion_tokens"] == 0
    longer = short["choices"][0]["logprobs"]
    assert longer["token_logprobs"][: len(ids)] == found["token_logprobs"]
    assert len(longer["tokens"]) == len(ids) + 1
    assert longer["token_logprobs"][-1] == pytest.approx(float(expected[-1].max()), abs=1e-3)
    bos = llm.prompt_ids("Once")
    first = torch.log_softmax(llm.logits(bos), 1)[0, bos[1]]
    assert text["choices"][0]["logprobs"]["token_logprobs"][0] == pytest.approx(float(first), abs=1e-3)
    assert text["choices"][0]["text"].startswith("Once")
    llm.close()


def test_tokens_of_a_chat_spell_its_text(tmp_path: Path) -> None:
    """Reasoning and answer told apart, marks and the end left out."""
    [plain, thought, free] = answers(
        tmp_path,
        [
            ask(logprobs=True, top_logprobs=3, max_tokens=80),
            ask(logprobs=True, thinking=True, max_tokens=150),
            ask(logprobs=False),
        ],
    )
    content = plain["choices"][0]["logprobs"]["content"]
    assert plain["choices"][0]["finish_reason"] == "stop"
    assert (
        bytes(byte for token in content for byte in token["bytes"]).decode()
        == (plain["choices"][0]["message"]["content"])
    )
    assert all(len(token["top_logprobs"]) == 3 for token in content)
    message, found = thought["choices"][0]["message"], thought["choices"][0]["logprobs"]
    for name in ("content", "reasoning_content"):
        assert "".join(token["token"] for token in found[name]).strip("\n") == message[name]
    assert message["reasoning_content"]
    assert free["choices"][0]["logprobs"] is None


def test_a_probability_of_zero_is_null_and_parts_of_a_character_keep_their_names() -> None:
    tokenizer = tiny_tokenizer()
    spelled = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    ids = [spelled[b"\xc3"], spelled[b"\xa9"]]
    sample = Sample(ids[0], -float("inf"), ((ids[0], -float("inf")), (ids[1], -1.0)))
    text = json.dumps([logprobs.of_text(tokenizer, [sample]), logprobs.of_chat(tokenizer, [sample], thinking=False)],
                      allow_nan=False)  # fmt: skip
    of_text, of_chat = json.loads(text)
    assert of_text["token_logprobs"] == [None]
    assert of_text["top_logprobs"] == [{"bytes:\\xc3": None, "bytes:\\xa9": -1.0}]
    assert of_chat["content"][0]["logprob"] is None and of_chat["content"][0]["bytes"] == [0xC3]


@pytest.mark.parametrize(
    ("body", "raw", "expected"),
    [
        ({}, False, (Shape(), {})),
        ({"n": 2, "logprobs": True}, False, (Shape(choices=2), {"logprobs": 0})),
        ({"logprobs": True, "top_logprobs": 20}, False, (Shape(), {"logprobs": 20})),
        ({"logprobs": 3, "echo": True}, True, (Shape(echo=True), {"logprobs": 3})),
        ({"echo": True, "max_tokens": 0}, True, (Shape(echo=True, silent=True), {"max_tokens": 1})),
    ],
)
def test_fields_become_a_shape(body: dict[str, Any], raw: bool, expected: Any) -> None:
    assert shape_of(body, raw) == expected


@pytest.mark.parametrize(
    ("body", "raw", "problem"),
    [
        ({"n": 129}, False, "n is 129"),
        ({"n": True}, False, "n is true"),
        ({"logprobs": 2}, False, "logprobs is 2"),
        ({"top_logprobs": 2}, False, "true beside top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, False, "top_logprobs is 21"),
        ({"logprobs": True}, True, "logprobs is true"),
        ({"logprobs": 2, "top_logprobs": 2}, True, "top_logprobs is of"),
        ({"echo": True}, False, "echo is true"),
        ({"echo": 1}, True, "echo is 1"),
    ],
)
def test_what_an_endpoint_does_not_have_is_refused(body: dict[str, Any], raw: bool, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        shape_of(body, raw)
