"""The step loop: who is in which step, and that company changes nothing about a reply."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from localmoe import scheduler
from localmoe.engine import Advanced, Engine
from localmoe.errors import UsageError
from localmoe.events import Completion, Event, Finished, Progress, Text
from localmoe.reply_request import ReplyRequest
from localmoe.sampler import SamplingParams
from localmoe.session import Session
from tests.tiny_engine import bind, token_ids
from tests.tiny_tokenizer import tiny_tokenizer
from tests.tiny_v4 import CSA, HCA, SLIDING, random_state, tiny_config

TOKENIZER = tiny_tokenizer()
CONFIG = tiny_config(layer_types=[SLIDING, CSA, HCA], num_hash_layers=1, vocab_size=TOKENIZER.vocab_size)
GREEDY = SamplingParams(temperature=0, max_tokens=6)


class Watched(Engine):
    """An engine that notes how many tokens each session had in each step."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__(bind(CONFIG, state))
        self.steps: list[list[int]] = []
        self.present: list[list[Session]] = []

    def advance(self, work: Sequence[tuple[Session, Sequence[int]]], *, all_logits: bool = False) -> Advanced:
        self.steps.append([len(chunk) for _, chunk in work])
        self.present.append([session for session, _ in work])
        return super().advance(work, all_logits=all_logits)


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    return random_state(CONFIG)


@pytest.fixture
def engine() -> Watched:
    return Watched(weights())


def start(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> Callable[[], ReplyRequest]:
    options: dict[str, Any] = {"context": 1024, "end_ids": frozenset([1]), "parser": None}
    return lambda: ReplyRequest(engine.new_session(), prompt, params, TOKENIZER, **options)


def prompt(length: int, seed: int = 0) -> list[int]:
    return token_ids(length, seed, vocab=TOKENIZER.vocab_size)


def finish(engine: Engine, starts: Sequence[Callable[[], ReplyRequest]], **options: Any) -> list[Completion]:
    """All replies, each from exactly one Finished."""
    done: dict[int, Completion] = {}
    for index, event in scheduler.run(engine, starts, **options):
        assert index not in done
        if isinstance(event, Finished):
            done[index] = event.completion
    return [done[i] for i in range(len(starts))]


def test_company_does_not_change_a_reply(engine: Watched) -> None:
    """Fails if a reply depends on its batch mates: greedy, sampled, and of different lengths."""
    params = [GREEDY, *(SamplingParams(seed=i, max_tokens=3 + i) for i in range(4))]
    starts = [start(engine, prompt(1 + 9 * i, i), p) for i, p in enumerate(params)]
    alone = [finish(engine, [one])[0] for one in starts]
    together = finish(engine, starts)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]


def test_a_finished_reply_leaves_the_steps(engine: Watched) -> None:
    """Fails if a step computes tokens nobody waits for."""
    short, long = (SamplingParams(temperature=0, max_tokens=n) for n in (2, 5))
    finish(engine, [start(engine, prompt(4), short), start(engine, prompt(7), long)])
    assert engine.steps == [[4, 7], [1, 1], [1], [1], [1]]


def test_a_long_prompt_is_computed_in_chunks_while_others_go_on(
    engine: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a prompt takes more than the budget at once, or makes decoding wait."""
    monkeypatch.setattr(engine, "prefill_tokens", 10)
    short, long = start(engine, prompt(3)), start(engine, prompt(25, 1))
    together = finish(engine, [short, long])
    assert engine.steps[:4] == [[3, 7], [1, 10], [1, 8], [1, 1]]
    monkeypatch.undo()
    assert [c.token_ids for c in together] == [finish(engine, [one])[0].token_ids for one in (short, long)]


def test_prompts_that_find_no_budget_left_wait_for_the_next_step(
    engine: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an empty chunk is put into a step, or a prompt is forgotten."""
    monkeypatch.setattr(engine, "prefill_tokens", 10)
    one = SamplingParams(temperature=0, max_tokens=1)
    finish(engine, [start(engine, prompt(10, i), one) for i in range(3)])
    assert engine.steps == [[10], [10], [10]]


def test_a_request_is_made_when_the_next_step_can_read_of_it(engine: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if it would be made earlier: it could not go on from what others have read by then."""
    monkeypatch.setattr(engine, "prefill_tokens", 10)
    steps_before: list[int] = []

    def noted(i: int) -> ReplyRequest:
        steps_before.append(len(engine.steps))
        return start(engine, prompt(10, i))()

    finish(engine, [functools.partial(noted, i) for i in range(3)])
    assert steps_before == [0, 1, 2]


def test_a_prompt_beyond_the_budget_reports_progress(engine: Watched) -> None:
    """600 tokens at the real budget of 512. Fails if the first token is drawn before the prompt's end."""
    events = [event for _, event in scheduler.run(engine, [start(engine, prompt(600))])]
    assert [e for e in events if isinstance(e, Progress)] == [Progress(512, 600), Progress(600, 600)]
    first_text = next(i for i, event in enumerate(events) if isinstance(event, Text))
    assert events.index(Progress(600, 600)) < first_text
    assert engine.steps == [[512], [88], [1], [1], [1], [1], [1]]


def test_no_more_sequences_run_than_allowed(engine: Watched) -> None:
    """Fails if requests are made, and memory taken, before there is room; or if one is never run."""
    made: list[int] = []

    def counted(i: int) -> Callable[[], ReplyRequest]:
        def begin() -> ReplyRequest:
            made.append(i)
            assert len(made) - len(finished) <= 2
            return start(engine, prompt(3 + i, i))()

        return begin

    finished: list[int] = []
    for index, event in scheduler.run(engine, [counted(i) for i in range(5)], max_sequences=2):
        if isinstance(event, Finished):
            finished.append(index)
    assert sorted(finished) == made == list(range(5))
    assert max(map(len, engine.present)) == 2


def test_replies_in_waves_are_the_same_as_at_once(engine: Watched) -> None:
    starts = [start(engine, prompt(3 + i, i)) for i in range(5)]
    waves = finish(engine, starts, max_sequences=2)
    assert [c.token_ids for c in waves] == [c.token_ids for c in finish(engine, starts)]


def stream(engine: Engine, steps: int) -> list[Event]:
    """One long greedy reply, cancelled before the step after `steps`."""
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > steps

    params = SamplingParams(temperature=0, max_tokens=50)
    return [event for _, event in scheduler.run(engine, [start(engine, prompt(9), params)], cancelled=cancelled)]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_cancelled_reply_keeps_what_was_said(engine: Watched, steps: int) -> None:
    """Fails if cancelling is felt late, or the text of the reply is not the text that was shown."""
    *events, last = stream(engine, steps)
    assert isinstance(last, Finished)
    assert not any(isinstance(event, Finished) for event in events)
    assert last.completion.finish_reason == "cancelled"
    assert len(engine.steps) == len(last.completion.token_ids) == steps
    assert last.completion.text == "".join(event.text for event in events if isinstance(event, Text))
    assert last.completion.token_ids == finish(engine, [start(engine, prompt(9))])[0].token_ids[:steps]


def test_cancelling_ends_every_running_reply_and_starts_no_other(engine: Watched) -> None:
    """Fails if waiting requests are begun only to be cancelled."""
    calls = iter([False, False, True])
    events = list(
        scheduler.run(
            engine, [start(engine, prompt(3, i)) for i in range(4)], cancelled=lambda: next(calls), max_sequences=2
        )
    )
    done = [(index, event.completion.finish_reason) for index, event in events if isinstance(event, Finished)]
    assert done == [(0, "cancelled"), (1, "cancelled")]


def test_a_broken_expert_ends_only_the_replies_that_need_it() -> None:
    """Fails if one damaged expert stops the batch, or is not named."""
    state = dict(weights())
    name = "layers.1.ffn.experts.3.w1.weight"
    state[name] = torch.full_like(state[name], float("nan"))
    damaged, sound = Watched(state), Watched(weights())
    prompts = [prompt(1, seed) for seed in range(12)]
    one = SamplingParams(temperature=0, max_tokens=1)
    found = finish(damaged, [start(damaged, p, one) for p in prompts])
    expected = finish(sound, [start(sound, p, one) for p in prompts])
    failed = [c for c in found if c.finish_reason == "error"]
    assert 0 < len(failed) < len(found)
    assert all("layer 1, expert 3" in str(c.error) for c in failed)
    for mine, theirs in zip(found, expected, strict=True):
        if mine.finish_reason != "error":
            assert mine.token_ids == theirs.token_ids


def test_a_request_that_cannot_be_made_is_refused_before_any_step(engine: Watched) -> None:
    with pytest.raises(UsageError, match="empty"):
        finish(engine, [start(engine, prompt(3)), start(engine, [])])
    assert not engine.steps


def test_leaving_the_stream_early_leaves_the_session_in_step(engine: Watched) -> None:
    """Fails if a consumer that stops listening leaves tokens in the state that the session does not know."""
    request = start(engine, prompt(9))()
    for _, event in scheduler.run(engine, [lambda: request]):
        if isinstance(event, Text):
            break
    assert request.session.length == request.session.state.length
    assert request.session.ids[:9] == prompt(9)
