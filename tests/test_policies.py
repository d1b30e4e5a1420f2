"""The default policy does as the better of two others does, without being told which that is."""

from __future__ import annotations

import random

import pytest

from localmoe.experts.policies import POLICIES, Best
from localmoe.experts.policy import PolicyName
from localmoe.experts.simulate import replay
from localmoe.experts.trace import Entry, Header, Resized, TracedStep, Use

HEADER = Header("one layer", 1, 40, 4, 0, 1)


def steps(picks: list[set[int]]) -> list[Entry]:
    return [TracedStep(1, [Use(sorted(some), [1] * len(some))]) for some in picks]


def misses(name: PolicyName, entries: list[Entry], slots: int = 8) -> int:
    return replay(HEADER, entries, slots, POLICIES[name](40), resize=True).misses


def often(count: int, seed: int = 1) -> list[Entry]:
    """Two experts in every other step, between ever other ones: what is used often is worth keeping."""
    draw = random.Random(seed)
    return steps([{0, 1, 2} if i % 3 == 0 else set(draw.sample(range(3, 40), 4)) for i in range(count)])


def lately(count: int, seed: int = 2) -> list[Entry]:
    """Small sets that are used for ten steps and then never again: what was used lately is worth keeping."""
    draw = random.Random(seed)
    found: list[set[int]] = []
    while len(found) < count:
        near = draw.sample(range(40), 8)
        found += [set(draw.sample(near, 4)) for _ in range(6)]
    return steps(found)


def test_the_patterns_differ_in_what_is_best() -> None:
    """Fails if the tests below would pass with a policy that never changes its mind."""
    assert misses("aged", often(600)) < 0.95 * misses("lru", often(600))
    assert misses("lru", lately(600)) < 0.99 * misses("aged", lately(600))


def test_it_follows_the_better_one() -> None:
    """Fails if the leader is not chosen by what the shadows miss."""
    assert misses("best", lately(600)) == misses("lru", lately(600))
    few = misses("aged", often(600))
    assert misses("best", often(600)) - few < 0.25 * (misses("lru", often(600)) - few)


def test_it_changes_with_the_text() -> None:
    """Fails if the first leader stays, or what was long ago decides for ever."""
    text = [*often(900), *lately(900), *often(900)]
    assert misses("best", text) < min(misses("lru", text), misses("aged", text))


def test_chance_is_not_taken_for_a_lead() -> None:
    """Fails if it runs back and forth where both miss the same, and so misses more than either."""
    draw = random.Random(4)
    even = steps([set(draw.sample(range(40), 4)) for _ in range(2000)])
    assert misses("best", even) <= 1.003 * misses("lru", even)


def test_nothing_piles_up() -> None:
    """Fails if a week of tokens fills memory with what the shadows were told."""
    policy = Best(40)
    replay(HEADER, often(300), 8, policy)
    assert [len(shadow._finished) for shadow in policy._shadows] == [0, 0]


@pytest.mark.parametrize("slots", [2, 5, 12])
def test_shadows_are_as_large_as_the_table(slots: int) -> None:
    """Fails if slots that the governor takes or returns are not taken from the shadows too."""
    changing: list[Entry] = [*often(200), Resized(3), *often(200, 5), Resized(slots), *often(200, 6)]
    assert misses("best", changing, slots) <= 1.03 * misses("lru", changing, slots)
