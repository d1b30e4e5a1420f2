"""One reply from logits to text: when it ends, what is shown, what is kept. The logits are written by the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from localmoe.errors import UsageError
from localmoe.events import Event, Progress, Text
from localmoe.reply import ReplyParser
from localmoe.reply_request import ReplyRequest
from localmoe.sampler import SamplingParams
from localmoe.step import Fault
from tests.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = [0, 40, 41]
EOS = 1


class FakeSession:
    """A session that computes nothing and remembers what it was told."""

    def __init__(self, length: int = 0) -> None:
        self.length, self.marks, self.is_torn, self.turn = length, list[int](), False, 0

    def begin(self, ids: Sequence[int]) -> int:
        return self.length

    def mark(self) -> None:
        self.marks.append(self.length)

    def torn(self) -> None:
        self.is_torn = True


def new_request(params: SamplingParams | None = None, **options: Any) -> ReplyRequest:
    defaults: dict[str, Any] = {"context": 100, "end_ids": frozenset([EOS]), "parser": None, "session": FakeSession()}
    options = defaults | options
    session: Any = options.pop("session")
    return ReplyRequest(
        session, options.pop("prompt", PROMPT), params or SamplingParams(temperature=0), TOKENIZER, **options
    )


def logits_of(token: int) -> torch.Tensor:
    logits = torch.zeros(TOKENIZER.vocab_size)
    logits[token] = 9.0
    return logits


def feed(request: ReplyRequest, tokens: Sequence[int]) -> list[Event]:
    """Run the whole prompt, then let the model say these tokens until the reply ends."""
    events: list[Event] = []
    session: Any = request.session
    for token in tokens:
        session.length += len(request.next_chunk(100))
        events += request.accept(logits_of(token), None)
        if request.finish_reason:
            break
    return events


def shown(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def say(text: str, params: SamplingParams | None = None, end: bool = True, **options: Any) -> tuple[ReplyRequest, str]:
    """A finished (or still open) reply of this text, and what was shown of it."""
    request = new_request(params, **options)
    events = feed(request, [*TOKENIZER.encode(text), *([EOS] if end else [])])
    return request, shown(events)


def test_a_reply_ends_with_the_end_token_and_does_not_show_it() -> None:
    """Fails if the end token's spelling reaches the user, or is missing from the count."""
    request, text = say("a brave frog")
    done = request.completion()
    assert (text, done.text, done.finish_reason, done.error) == ("a brave frog", "a brave frog", "stop", None)
    assert done.token_ids == (*TOKENIZER.encode("a brave frog"), EOS)
    assert done.message == {"role": "assistant", "content": "a brave frog"}
    assert done.logprobs is None


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("frog", "a brave "), ("e fr", "a brav"), ("a", ""), ("og", "a brave fr"), ("x", "a brave frog")],
)
def test_a_stop_string_ends_it_across_token_borders(stop: str, expected: str) -> None:
    """Fails if any part of the stop string is shown, or text before it is lost."""
    request, text = say("a brave frog", SamplingParams(temperature=0, stop=(stop,)))
    assert (text, request.completion().text, request.completion().finish_reason) == (expected, expected, "stop")


def test_what_might_have_been_a_stop_string_is_shown_at_the_end() -> None:
    """Fails if text held back for a stop string that never came is swallowed."""
    count = len(TOKENIZER.encode("a brave fr"))
    request, text = say("a brave fr", SamplingParams(temperature=0, stop=("frog",), max_tokens=count), end=False)
    assert (text, request.completion().finish_reason) == ("a brave fr", "length")


def test_max_tokens_ends_it_unless_the_last_of_them_is_the_end() -> None:
    """Fails by one, or if the limit is looked at before the end token."""
    tokens = len(TOKENIZER.encode("a brave frog"))
    for limit, reason in ((3, "length"), (tokens, "length"), (tokens + 1, "stop")):
        done = say("a brave frog", SamplingParams(temperature=0, max_tokens=limit))[0].completion()
        assert (len(done.token_ids), done.finish_reason, done.stats.generated_tokens) == (limit, reason, limit)


def test_the_context_ends_it() -> None:
    """Fails if a reply without a limit of its own runs past the context."""
    request, _ = say("a brave frog " * 20, context=len(PROMPT) + 5)
    assert (len(request.completion().token_ids), request.completion().finish_reason) == (5, "length")


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "context", "numbers"),
    [
        (PROMPT, None, 3, r"3 tokens, together 4; the context holds 3"),
        (PROMPT, 8, 10, r"3 tokens and 8 were asked for, together 11; the context holds 10"),
        ([], None, 10, r"the prompt is empty"),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(
    prompt: list[int], max_tokens: int | None, context: int, numbers: str
) -> None:
    """Fails by one, or if the session is touched before the sizes are checked."""
    if prompt:
        new_request(SamplingParams(max_tokens=max_tokens), prompt=prompt, context=context + 1)
    session = FakeSession()
    with pytest.raises(UsageError, match=numbers):
        new_request(SamplingParams(max_tokens=max_tokens), prompt=prompt, context=context, session=session)
    assert session.length == 0


def test_bytes_of_one_character_are_shown_together() -> None:
    """Fails if the tokens of a cat are shown as three broken characters."""
    request = new_request()
    events = feed(request, [*TOKENIZER.encode("é🐱"), EOS])
    texts = [event.text for event in events if isinstance(event, Text)]
    assert "".join(texts) == "é🐱"
    assert all("�" not in text for text in texts)


def test_a_character_cut_by_the_limit_is_shown_as_unknown() -> None:
    tokens = TOKENIZER.encode("a☃")
    request, text = say("a☃", SamplingParams(temperature=0, max_tokens=len(tokens) - 1), end=False)
    assert text == "a�"
    assert request.completion().finish_reason == "length"


def test_cancelling_keeps_the_text() -> None:
    """Fails if Ctrl-C loses what was said, held-back text included."""
    request, before = say("a brave fr", SamplingParams(temperature=0, stop=("frog",)), end=False)
    after = shown(request.cancel())
    assert before + after == "a brave fr"
    assert (request.completion().text, request.completion().finish_reason) == ("a brave fr", "cancelled")


def test_cancelling_before_the_first_token_gives_an_empty_reply() -> None:
    request = new_request()
    assert request.cancel() == []
    done = request.completion()
    assert (done.text, done.token_ids, done.finish_reason) == ("", (), "cancelled")
    assert done.stats.first_token_seconds == 0


def test_progress_counts_the_prompt_with_what_was_reused() -> None:
    """Fails if a long prompt is announced done too early, or sampled from before its end."""
    session = FakeSession(length=2)
    request = new_request(prompt=list(range(9)), session=session)
    events: list[Event] = []
    while request.prefilling:
        session.length += len(request.next_chunk(3))
        events += request.accept(logits_of(40), None)
    assert [e for e in events if isinstance(e, Progress)] == [Progress(5, 9), Progress(8, 9), Progress(9, 9)]
    assert request.next_chunk(3) == [40]
    assert session.marks == [9]
    request.cancel()
    stats = request.completion().stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (9, 2, 1)


def test_the_prompt_is_cut_where_later_turns_will_differ() -> None:
    """Fails if the mark is made a token late, where the session already holds what the next prompt lacks."""
    request, chunks = new_request(prompt=list(range(9)), marks_at=[7]), []
    session: Any = request.session
    while request.prefilling:
        chunks.append(request.next_chunk(4))
        session.length += len(chunks[-1])
        request.accept(logits_of(40), None)
    assert chunks == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    assert session.marks == [7]


def test_a_mark_within_the_prompt_is_worth_its_step() -> None:
    """Fails if a turn is cut into steps of a few tokens, which cost as much as many."""
    for reused, expected in ((0, [40, 79]), (8, [40, 79]), (9, [79])):
        session: Any = FakeSession(length=reused)
        request = new_request(prompt=list(range(80)), marks_at=[40, 79], session=session)
        while request.prefilling:
            session.length += len(request.next_chunk(100))
            request.accept(logits_of(40), None)
        assert session.marks == expected


def test_a_fault_ends_the_reply_and_names_its_place() -> None:
    """Fails if a session whose state holds NaN could go on."""
    request, before = say("a brave", end=False)
    events = request.accept(logits_of(40), Fault(3, "expert 7"))
    done = request.completion()
    assert (done.finish_reason, done.text) == ("error", before + shown(events))
    assert done.error == ("the model's values stopped being finite in layer 3, expert 7; the weights may be damaged")
    session: Any = request.session
    assert session.is_torn


def test_unusable_logits_end_the_reply() -> None:
    """Fails with a traceback, or with a token drawn from NaN."""
    request, _ = say("a brave", end=False)
    request.accept(torch.full((TOKENIZER.vocab_size,), float("nan")), None)
    done = request.completion()
    assert (done.finish_reason, done.text) == ("error", "a brave")
    assert "NaN" in (done.error or "")


def test_logprobs_cover_every_token_of_the_reply() -> None:
    """Fails if the end token, which is not shown, has none."""
    request, _ = say("a brave frog", SamplingParams(temperature=0, logprobs=2))
    done = request.completion()
    assert done.logprobs is not None
    assert tuple(sample.id for sample in done.logprobs) == done.token_ids
    assert all(sample.top[0] == (sample.id, sample.logprob) and len(sample.top) == 2 for sample in done.logprobs)


def test_text_events_carry_the_tokens_drawn_since_the_last_one() -> None:
    """Fails if a token is reported twice, or one whose text was held back is never reported."""
    events = feed(request := new_request(), [*TOKENIZER.encode("a brave 🐱 frog"), EOS])
    told = [token for event in events if isinstance(event, Text) for token in event.token_ids]
    assert tuple(told) == request.completion().token_ids[:-1]


def test_a_repetition_penalty_sees_the_prompt_and_the_reply() -> None:
    """Fails if either is left out of the history: both favourites are punished."""
    request = new_request(SamplingParams(temperature=0, repetition_penalty=5.0))
    session: Any = request.session
    logits = torch.zeros(TOKENIZER.vocab_size)
    logits[[40, 50, 60]] = torch.tensor([9.0, 8.0, 7.0])
    for _ in range(2):
        session.length += len(request.next_chunk(100))
        request.accept(logits, None)
    request.cancel()
    assert request.completion().token_ids == (50, 60)


def test_reasoning_and_answer_are_told_apart() -> None:
    """Fails if </think> is shown, or the reasoning is taken for the answer."""
    request = new_request(parser=ReplyParser("reasoning"))
    close = TOKENIZER.token_id("</think>")
    assert close is not None
    events = feed(request, [*TOKENIZER.encode("hm a"), close, *TOKENIZER.encode("yes"), EOS])
    done = request.completion()
    kinds = [event.kind for event in events if isinstance(event, Text)]
    assert kinds == sorted(kinds, reverse=True)
    assert shown(events) == "hm ayes"
    assert (done.reasoning, done.text, done.tool_calls) == ("hm a", "yes", ())
    assert done.message == {"role": "assistant", "content": "yes", "reasoning_content": "hm a"}
