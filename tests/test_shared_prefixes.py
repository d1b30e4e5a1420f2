"""What prompts begin with in common is read once, and the replies are what they were without that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from localmoe import scheduler
from localmoe.engine import Advanced, Engine
from localmoe.events import Completion, Finished
from localmoe.models.family import build, config_of
from localmoe.reply_request import ReplyRequest
from localmoe.sampler import SamplingParams
from localmoe.session import Session
from localmoe.shared_prefixes import SharedPrefixes
from tests import tiny_mla, tiny_v4
from tests.tiny_engine import token_ids
from tests.tiny_tokenizer import tiny_tokenizer
from tests.tiny_v4 import CSA, HCA, SLIDING

TOKENIZER = tiny_tokenizer()
VOCAB = {"vocab_size": TOKENIZER.vocab_size}
V4 = tiny_v4.tiny_config(layer_types=[SLIDING, CSA, HCA], num_hash_layers=1, **VOCAB)
GREEDY = SamplingParams(temperature=0, max_tokens=5)
PREFIX = token_ids(150, 99, vocab=150)


class Counting(Engine):
    """Knows how many tokens of prompts and replies it has computed."""

    computed = 0

    def advance(self, work: Sequence[tuple[Session, Sequence[int]]], *, all_logits: bool = False) -> Advanced:
        self.computed += sum(len(chunk) for _, chunk in work)
        return super().advance(work, all_logits=all_logits)


@pytest.fixture(params=["v4", "v2-lite", "v3.2"])
def engine(request: pytest.FixtureRequest) -> Counting:
    """A state that is overwritten, and states that only grow."""
    if request.param == "v4":
        config, state = V4, tiny_v4.random_state(V4)
    else:
        config = tiny_mla.tiny_config(request.param, **VOCAB)
        state = tiny_mla.random_state(config)
    return Counting(build(config_of(config), state.__getitem__))


def replies(engine: Counting, prompts: Sequence[list[int]], *, share: bool, **options: Any) -> list[Completion]:
    shared = SharedPrefixes(engine)

    def start(ids: list[int]) -> Callable[[], ReplyRequest | None]:
        def make(session: Session, marks_at: Sequence[int] = ()) -> ReplyRequest:
            return ReplyRequest(
                session, ids, GREEDY, TOKENIZER, context=1024, end_ids=frozenset([1]), parser=None, marks_at=marks_at
            )

        return (lambda: shared.start(ids, make)) if share else (lambda: make(engine.new_session()))

    done = {}
    for index, event in scheduler.run(engine, [start(ids) for ids in prompts], **options):
        if isinstance(event, Finished):
            done[index] = event.completion
    return [done[i] for i in range(len(prompts))]


def asked(count: int, prefix: list[int] = PREFIX) -> list[list[int]]:
    return [[*prefix, *token_ids(5 + 7 * i, i, vocab=150)] for i in range(count)]


@pytest.mark.parametrize("together", [1, 3, 32])
def test_replies_are_the_same_and_the_beginning_is_read_at_most_twice(engine: Counting, together: int) -> None:
    """Fails if a copy is not what reading would have given, is written to by another, or is not used."""
    prompts = asked(6)
    alone = replies(engine, prompts, share=False)
    engine.computed = 0
    shared = replies(engine, prompts, share=True, max_sequences=together)
    assert [c.token_ids for c in shared] == [c.token_ids for c in alone]
    fresh = sum(len(p) for p in prompts) - 6 * len(PREFIX) + sum(len(c.token_ids) - 1 for c in shared)
    assert engine.computed <= 2 * len(PREFIX) + fresh


def test_those_that_start_together_wait_for_the_first(engine: Counting) -> None:
    """Fails if each of them reads the beginning, because nobody had yet when they started."""
    prompts = asked(6)
    shared = replies(engine, prompts, share=True)
    fresh = sum(len(p) for p in prompts) - 6 * len(PREFIX) + sum(len(c.token_ids) - 1 for c in shared)
    assert engine.computed == len(PREFIX) + fresh
    assert [c.stats.reused_tokens for c in shared] == [0] + 5 * [len(PREFIX)]


def test_beginnings_may_take_turns(engine: Counting) -> None:
    """The second of each may come too late to have its beginning marked in the first."""
    other = token_ids(120, 98, vocab=150)
    prompts = [ids for pair in zip(asked(4), asked(4, other), strict=True) for ids in pair]
    shared = replies(engine, prompts, share=True)
    assert [c.token_ids for c in shared] == [c.token_ids for c in replies(engine, prompts, share=False)]
    assert [c.stats.reused_tokens for c in shared][4:] == 2 * [len(PREFIX), len(other)]


def test_one_prompt_again_and_again(engine: Counting) -> None:
    """Fails if nothing is left to compute logits from."""
    prompts = [PREFIX] * 4
    one, *others = replies(engine, prompts, share=True)
    assert {c.token_ids for c in others} == {one.token_ids}
    assert one.token_ids == replies(engine, [PREFIX], share=False)[0].token_ids
    assert others[-1].stats.reused_tokens == len(PREFIX) - 1


def test_short_beginnings_are_not_worth_a_step(engine: Counting) -> None:
    shared = replies(engine, asked(3, PREFIX[:20]), share=True)
    assert [c.stats.reused_tokens for c in shared] == [0, 0, 0]


def test_a_copy_does_not_change_with_what_it_was_made_from(engine: Counting) -> None:
    """Fails if they share memory: the other goes back and reads something else before the copy goes on."""
    one, ids, end = engine.new_session(), PREFIX[:64], token_ids(9, 7, vocab=150)
    for part in (ids[:32], ids[32:]):
        engine.advance([(one, part)])
        one.mark()
    other, instead = one.fork(64), token_ids(20, 6, vocab=150)
    assert one.begin([*ids[:32], *instead]) == 32
    engine.advance([(one, instead)])
    fresh = engine.new_session()
    engine.advance([(fresh, ids)])
    (expected,), (found,) = (engine.advance([(session, end)]).logits for session in (fresh, other))
    assert (expected - found).abs().max() < 1e-5
