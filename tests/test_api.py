"""LLM, the class users meet, on a tiny random model directory with a real tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from localmoe.api import LLM
from localmoe.errors import UsageError
from localmoe.events import Completion, Event, Finished, Text
from localmoe.marks import MAX_MARKS
from localmoe.reply_request import WORTH_A_STEP
from localmoe.sampler import SamplingParams
from localmoe.scheduler import MAX_SEQUENCES
from tests.tiny_engine import write_tiny_model
from tests.tiny_v4 import CSA, HCA, SLIDING

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = ["a brave frog", "", "12345 times; 你好 🐱", "a story about a brave frog, a story about a frog"]
HELLO = [{"role": "user", "content": "a story about a brave frog"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = {"layer_types": [SLIDING, CSA, HCA], "num_hash_layers": 1}
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-v4", **layers)


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory)


def completion(events: Iterable[Event]) -> Completion:
    """What a stream ends with."""
    *_, last = events
    assert isinstance(last, Finished)
    return last.completion


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=7, max_tokens=8)], ids=["greedy", "sampled"])
def test_a_batch_gives_what_single_prompts_give(llm: LLM, params: SamplingParams) -> None:
    """Fails if prompts in one batch influence each other, or a seed does not count up by prompt."""
    batch = llm.generate(PROMPTS, params)
    for i, (text, together) in enumerate(zip(PROMPTS, batch, strict=True)):
        seed = None if params.seed is None else params.seed + i
        (alone,) = llm.generate(text, replace(params, seed=seed))
        assert together.token_ids == alone.token_ids
        assert together.text == alone.text


def test_more_prompts_than_sequences_are_all_answered_in_order(llm: LLM) -> None:
    prompts = [[0, i % 300] for i in range(MAX_SEQUENCES + 2)]
    one = SamplingParams(temperature=0, max_tokens=1)
    found = [c.token_ids for c in llm.generate(prompts, one)]
    assert len(found) == len(prompts)
    assert [found[-1], found[3]] == [llm.generate([prompts[i]], one)[0].token_ids for i in (-1, 3)]


def test_no_prompts_give_no_completions(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_text_gets_a_bos_and_token_ids_are_taken_as_they_are(llm: LLM) -> None:
    ids = llm.tokenizer.encode("frog")
    prompts: list[str | list[int]] = ["frog", [0, *ids], ids]
    text, with_bos, without = llm.generate(prompts, GREEDY)
    assert text.token_ids == with_bos.token_ids
    assert (text.prompt_tokens, without.prompt_tokens) == (1 + len(ids), len(ids))


@pytest.mark.parametrize(
    ("prompts", "message"), [([1, 2, 3], "wrap it in a list"), ([[0, 99999]], "outside 0 to 361"), ([[-1]], "outside")]
)
def test_ids_that_are_no_prompts_are_refused(llm: LLM, prompts: Any, message: str) -> None:
    """Fails if a negative id would index from the end of the embedding."""
    with pytest.raises(UsageError, match=message):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("kind", ["raw", "chat", "thinking"])
def test_a_stream_is_progress_then_text_then_one_finished(llm: LLM, kind: str) -> None:
    """Fails if the pieces shown are not the completion, or anything follows Finished."""
    if kind == "raw":
        events = list(llm.stream("a brave frog", GREEDY))
    else:
        events = list(llm.stream_chat(HELLO, GREEDY, thinking="on" if kind == "thinking" else "off"))
    names = [type(event).__name__ for event in events]
    assert names == sorted(names, key=["Progress", "Text", "Finished"].index)
    assert (names[0], names.count("Finished")) == ("Progress", 1)
    done = completion(events)
    by_kind = {"reasoning": "", "answer": ""}
    for event in events:
        if isinstance(event, Text):
            by_kind[event.kind] += event.text
    assert by_kind == {"reasoning": done.reasoning, "answer": done.text}
    assert bool(done.reasoning) == (kind == "thinking")


def test_chat_is_the_end_of_its_stream(llm: LLM) -> None:
    reply = llm.chat(HELLO, GREEDY)
    assert reply.message == completion(llm.stream_chat(HELLO, GREEDY)).message
    assert reply.message == {"role": "assistant", "content": reply.text}


def test_a_reply_says_why_it_ended(llm: LLM) -> None:
    """Fails if a stop string or token found in a known reply does not end it there."""
    (whole,) = llm.generate("a brave frog", replace(GREEDY, max_tokens=20))
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 20)
    stop = next(text for text in (whole.text[i : i + 3] for i in range(4, len(whole.text))) if "�" not in text)
    (cut,) = llm.generate("a brave frog", replace(GREEDY, max_tokens=20, stop=(stop,)))
    assert (cut.finish_reason, cut.text) == ("stop", whole.text[: whole.text.index(stop)])
    token = whole.token_ids[5]
    (cut,) = llm.generate("a brave frog", replace(GREEDY, max_tokens=20, stop_token_ids=(token,)))
    assert (cut.finish_reason, cut.token_ids[-1]) == ("stop", token)
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_cancelling_keeps_the_text_said_so_far(llm: LLM) -> None:
    calls = iter([False] * 5 + [True])
    done = completion(llm.stream("a brave frog", GREEDY, cancelled=lambda: next(calls)))
    assert done.finish_reason == "cancelled"
    assert done.token_ids == llm.generate("a brave frog", GREEDY)[0].token_ids[:5]


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(directory: Path) -> None:
    short = LLM(directory, context=10)
    with pytest.raises(UsageError, match="the prompt has 11 tokens, together 12; the context holds 10"):
        short.generate([[5] * 11])
    with pytest.raises(UsageError, match="5 tokens and 6 were asked for, together 11; the context holds 10"):
        short.generate([[5] * 5], SamplingParams(max_tokens=6))


@pytest.mark.parametrize("thinking", ["off", "on"])
def test_a_session_saves_the_work_of_earlier_turns_and_changes_nothing(
    llm: LLM, thinking: Literal["off", "on"]
) -> None:
    """Fails if a second turn starts over, or what was kept gives another reply.

    The random model says what tokens to text and back do not keep, so a turn begins at the mark before the last token
    of the prompt; with thinking always, for the next prompt lacks the reasoning and <think>."""
    session, messages = llm.session(), list[dict[str, Any]](HELLO)
    before = 0
    for question in ("and then?", "who was the frog?", "why"):
        kept = completion(llm.stream_chat(messages, GREEDY, thinking=thinking, session=session))
        fresh = llm.chat(messages, GREEDY, thinking=thinking)
        assert kept.token_ids == fresh.token_ids
        assert kept.message == fresh.message
        assert kept.stats.reused_tokens >= before - 1
        assert (kept.stats.reused_tokens > 0) == (before > 0)
        assert fresh.stats.reused_tokens == 0
        before = kept.prompt_tokens
        messages += [kept.message, {"role": "user", "content": question}]


@pytest.mark.parametrize("thinking", ["off", "on"])
def test_a_long_chat_goes_back_without_reading_again(thinking: Literal["off", "on"]) -> None:
    """50 turns. Fails if another question, or the same one, costs what was read before it; if marks are not bounded;
    or if going far back costs more than a share of the way."""
    model = LLM()
    params, session = SamplingParams(temperature=0, max_tokens=8), model.session()
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You tell stories about a kind frog. " * 5}]
    befores = list[list[dict[str, Any]]]()

    def reused(asked: list[dict[str, Any]]) -> int:
        return completion(model.stream_chat(asked, params, thinking=thinking, session=session)).stats.reused_tokens

    for number in range(50):
        befores.append(list(messages))
        messages.append({"role": "user", "content": f"Tell me story {number} about the frog."})
        done = completion(model.stream_chat(messages, params, thinking=thinking, session=session))
        assert reused(messages) == done.prompt_tokens - 1, "the same prompt again"
        messages.append(done.message)
    assert len(session.marks) <= MAX_MARKS
    longest = done.prompt_tokens
    for back in (1, 2, 3, 5, 10, 20, 40, 50):
        before = befores[-back]
        start = len(model.shared_prefix(before, thinking=thinking))
        kept = reused([*before, {"role": "user", "content": "What else?"}])
        # The reply's last token, which was drawn and never read, its end, and what begins a question. With thinking the
        # reply too, which is read without its reasoning; it is short here, so that there is no mark after it.
        least = 3 if thinking == "off" else WORTH_A_STEP
        assert start - kept <= (least if back <= 2 else max(least, (longest - start) * 0.6)), back


def test_a_session_follows_an_edited_conversation(llm: LLM) -> None:
    """Fails if the old wording shines through."""
    session = llm.session()
    completion(llm.stream_chat(HELLO, GREEDY, session=session))
    edited = [{"role": "user", "content": "a story about a brave cat"}]
    kept = completion(llm.stream_chat(edited, GREEDY, session=session))
    assert kept.token_ids == llm.chat(edited, GREEDY).token_ids


def test_a_cancelled_turn_leaves_the_session_usable(llm: LLM) -> None:
    session, calls = llm.session(), iter([False] * 3 + [True])
    cut = completion(llm.stream_chat(HELLO, GREEDY, session=session, cancelled=lambda: next(calls)))
    messages = [*HELLO, cut.message, {"role": "user", "content": "go on"}]
    kept = completion(llm.stream_chat(messages, GREEDY, session=session))
    assert kept.stats.reused_tokens >= cut.prompt_tokens
    assert kept.token_ids == llm.chat(messages, GREEDY).token_ids


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_logits_do_not_depend_on_the_chunk_size(llm: LLM, chunk: int) -> None:
    ids = list(range(40))
    whole = llm.logits(ids)
    assert (whole.shape, whole.dtype) == ((40, llm.config.vocab_size), torch.float32)
    assert (llm.logits(ids, chunk_size=chunk) - whole).abs().max() <= 2e-5


def test_logits_need_ids_and_a_chunk(llm: LLM) -> None:
    for ids, problem in (([], "no token ids"), ([362], "outside 0 to 361"), ([-1], "outside"), ([0.5], "whole")):
        with pytest.raises(UsageError, match=problem):
            llm.logits(ids)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="chunk_size is 0"):
        llm.logits([1], chunk_size=0)


def test_logprobs_are_those_of_the_models_own_distribution(llm: LLM) -> None:
    """Fails if temperature or a filter is reported as the model's opinion."""
    prompt = [0, 40, 41]
    (done,) = llm.generate([prompt], SamplingParams(temperature=0.5, top_k=5, seed=3, max_tokens=6, logprobs=4))
    assert done.logprobs is not None
    exact = llm.logits([*prompt, *done.token_ids]).log_softmax(-1)[len(prompt) - 1 : -1]
    for row, sample in zip(exact, done.logprobs, strict=True):
        assert sample.logprob == pytest.approx(float(row[sample.id]), abs=1e-4)
        assert [token for token, _ in sample.top] == row.topk(4).indices.tolist()


def test_a_stream_overtaken_on_its_session_is_refused(llm: LLM) -> None:
    """Fails if a reply goes on writing into a session that another reply has taken over."""
    session = llm.session()
    first = llm.stream("one two three", GREEDY, session=session)
    next(first)
    list(llm.stream("another text", GREEDY, session=session))
    with pytest.raises(UsageError, match="another reply has begun"):
        list(first)
