"""What each policy gives up first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.experts.policies import POLICIES
from localmoe.experts.policy import Aged, Lru, PolicyName, S3Fifo

KEYS = 12


def nobody(key: int) -> bool:
    return False


def test_lru_gives_up_what_was_used_longest_ago() -> None:
    """Fails if admission order decides, or a spared key is taken."""
    lru = Lru(KEYS)
    for key in (3, 1, 2):
        lru.admit(key)
    lru.touch(3, 1, 0)
    assert lru.victim(nobody) == 1
    assert lru.victim({1}.__contains__) == 2
    assert lru.victim({1, 2, 3}.__contains__) is None


def test_aged_keeps_what_was_used_often_and_forgets_it_in_time() -> None:
    """Fails if uses before admission are not counted, tokens are not weighed, or counts do not age."""
    aged = Aged(KEYS)
    aged.touch(0, 9, 0)
    aged.touch(1, 1, 1)
    for key in (0, 1):
        aged.admit(key)
    assert aged.victim(nobody) == 1
    for now in range(2, 4000):
        aged.touch(1, 1, now)
    assert aged.victim(nobody) == 0


def test_aged_survives_any_number_of_tokens() -> None:
    """Fails if counts overflow after days, or are lost when they are scaled back."""
    aged = Aged(KEYS)
    aged.admit(0)
    aged.admit(1)
    for now in range(0, 10_000_000, 9973):
        aged.touch(now % 2, 1 + now % 2, now)
        assert aged.victim(nobody) in (0, 1)
    aged.touch(0, 50, 10_000_000)
    assert aged.victim(nobody) == 1


def test_s3fifo_lets_newcomers_pass_through() -> None:
    """Fails if a key used once pushes out one that is used again and again."""
    fifo = S3Fifo(KEYS)
    for key in (0, 1, 2):
        fifo.admit(key)
    fifo.touch(0, 1, 0)
    assert fifo.victim(nobody) == 1
    fifo.drop(1)
    assert fifo.victim(nobody) == 2


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(POLICIES)),
    moves=st.lists(st.tuples(st.sampled_from("tadv"), st.integers(0, KEYS - 1), st.integers(0, 3)), max_size=80),
)
def test_a_victim_is_always_resident_and_not_spared(name: PolicyName, moves: list[tuple[str, int, int]]) -> None:
    """Fails if a key that has gone is found again, or one that may go is not found."""
    policy, resident = POLICIES[name](KEYS), set[int]()
    for now, (move, key, spared) in enumerate(moves):
        if move == "t":
            policy.touch(key, 1 + spared, now)
        elif move == "a" and key not in resident:
            policy.touch(key, 1, now)
            policy.admit(key)
            resident.add(key)
        elif move == "d" and key in resident:
            policy.drop(key)
            resident.remove(key)
        elif move == "v":
            may_go = {k for k in resident if k % 4 != spared}
            found = policy.victim(lambda k, s=spared: k % 4 == s)  # type: ignore[misc]
            assert (found in may_go) if may_go else found is None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_start_empty(name: PolicyName) -> None:
    assert POLICIES[name](KEYS).victim(nobody) is None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_an_expert_may_come_and_go_any_number_of_times(name: PolicyName) -> None:
    """Fails if something of an earlier stay is left behind: a place in a queue, or a count of residents."""
    policy = POLICIES[name](KEYS)
    for now in range(63):
        policy.touch(7, 1, now)
        policy.admit(7)
        assert policy.victim(nobody) == 7
        policy.drop(7)
        assert policy.victim(nobody) is None


def test_aged_weighs_how_many_tokens_chose_an_expert() -> None:
    """Fails if a step of several tokens counts as one use."""
    aged = Aged(KEYS)
    aged.admit(3)
    aged.admit(5)
    aged.touch(3, 7, 3.5)
    aged.touch(5, 1, 3.5)
    assert aged.victim(nobody) == 5


def test_aged_survives_a_layer_far_behind_the_others() -> None:
    """Fails if time runs backwards, where 2 ** (how far) overflows and the victim is whatever NaN compares to."""
    aged = Aged(KEYS)
    for key in (3, 5):
        aged.admit(key)
    aged.touch(3, 1, 100_000)
    aged.touch(5, 1, 63)
    with np.errstate(all="raise", under="ignore"):
        assert aged.victim(nobody) == 5


def test_s3fifo_remembers_who_left_too_early() -> None:
    """Fails if an expert that comes back soon has to pass through the small queue again."""
    fifo = S3Fifo(KEYS)
    for key in (0, 1, 2):
        fifo.admit(key)
    assert fifo.victim(nobody) == 0
    fifo.drop(0)
    fifo.admit(0)
    assert [fifo.victim(nobody), fifo.victim({1, 2}.__contains__)] == [1, 0]
    fifo.drop(1)
    assert fifo.victim(nobody) == 2


def test_s3fifo_finds_one_that_moves_to_a_queue_already_looked_at() -> None:
    """Fails if None is said although the small queue's only expert, just moved to the main one, may go."""
    fifo = S3Fifo(KEYS)
    for key in range(11):
        fifo.admit(key)
        fifo.touch(key, 1, key)
    assert fifo.victim(nobody) == 0
    fifo.admit(11)
    fifo.touch(11, 1, 11)
    assert fifo.victim(lambda key: key != 11) == 11


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_after_an_interruption_the_residents_are_those_that_are_said(name: PolicyName) -> None:
    """Fails if what was admitted or dropped by halves is given up later, or never."""
    policy = POLICIES[name](9)
    for key in (3, 1, 4, 5, 6):
        policy.touch(key, 1, 0.0)
        policy.admit(key)
    policy.keep([4, 7, 1])
    given_up = []
    while (key := policy.victim(lambda key: False)) is not None:
        policy.drop(key)
        given_up.append(key)
    assert sorted(given_up) == [1, 4, 7]
    policy.admit(3)
    assert policy.victim(lambda key: False) == 3


def test_after_an_interruption_the_order_is_as_it_was() -> None:
    """Fails if what has been used least lately is not given up first any more, or what was used again is."""
    lru, fifo = POLICIES["lru"](9), POLICIES["s3fifo"](9)
    for policy in (lru, fifo):
        for key in (3, 1, 4):
            policy.admit(key)
        policy.touch(3, 1, 1.0)
        policy.keep({1, 3, 4})
    assert lru.victim(lambda key: False) == 1 and lru.victim(lambda key: key == 1) == 4
    assert fifo.victim(lambda key: False) == 1 and fifo.victim(lambda key: key in (1, 4)) == 3
