"""The table of slots: nobody shares one, nothing in use is given away, and the order is the layer's."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.experts.policies import POLICIES
from localmoe.experts.policy import Lru, PolicyName
from localmoe.experts.residency import WINDOW, Residency

LAYERS, EXPERTS = 3, 40


def residency(capacity: int, policy: PolicyName = "lru") -> Residency:
    return Residency(capacity, LAYERS, EXPERTS, POLICIES[policy](LAYERS * EXPERTS))


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 30),
    policy=st.sampled_from(sorted(POLICIES)),
    needs=st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=1, max_size=9),
)
def test_every_pass_completes_with_any_number_of_slots(
    capacity: int, policy: PolicyName, needs: list[set[int]]
) -> None:
    """Fails if a pass gets stuck, a slot is shared, or an expert that waits loses its slot."""
    table = residency(capacity, policy)
    uses = 0
    for number, need in enumerate(needs):
        experts = sorted(need)
        uses += len(experts)
        now = table.begin(number % LAYERS, experts, [1] * len(experts), 1)
        now.advance()
        while not now.done:
            held = [table.slot_of(key) for key in now.waiting]
            assert held, "at least one expert can always be computed"
            assert None not in held
            assert len(set(held)) == len(held) <= min(capacity, WINDOW)
            now.release()
        slots = [table.slot_of(key) for key in list(table.keys())]
        assert len(set(slots)) == len(slots) <= table.capacity == capacity
    assert table.counts.hits + table.counts.misses == uses


def test_what_the_layer_needs_next_is_given_up_last() -> None:
    """Fails if a miss pushes out an expert that the same layer is about to use."""
    table = residency(3)
    for expert in (5, 9, 1):
        now = table.begin(0, [expert], [1], 1)
        now.advance()
        now.release()
    now = table.begin(0, [2, 5, 9], [1, 1, 1], 1)
    found = now.advance()
    assert [one.hit for one in found] == [False, True, True]
    assert found[0].evicted == 1


def test_slots_are_taken_and_given_back() -> None:
    """Fails if shrinking takes a slot in use, or the last one, or growing forgets one."""
    table = Residency(3, LAYERS, EXPERTS, Lru(LAYERS * EXPERTS))
    now = table.begin(0, [0, 1, 2], [1, 1, 1], 1)
    now.advance()
    assert table.shrink() is None
    now.abandon()
    taken = [table.shrink(), table.shrink()]
    assert None not in taken
    assert (table.shrink(), table.capacity) == (None, 1)
    table.grow(taken[0] or 0)
    assert table.capacity == 2


def compute(table: Residency, layer: int, *experts: int) -> list[bool]:
    """A layer's whole pass; for each expert, whether it was a hit."""
    now = table.begin(layer, experts, [1] * len(experts), 1)
    found = now.advance()
    while not now.done:
        found += now.release()
    return [one.hit for one in found]


def test_uses_are_counted_by_where_they_were_found() -> None:
    """Fails if a miss of an expert that was there before counts as its first."""
    table = residency(1)
    assert compute(table, 0, 3, 5) == [False, False]
    assert compute(table, 0, 5) == [True]
    assert compute(table, 1, 5) == [False]
    assert compute(table, 0, 5) == [False]
    assert (table.counts.hits, table.counts.misses, table.counts.first) == (1, 4, 3)


def test_an_expert_in_use_is_never_given_up() -> None:
    """Fails if another layer's pass, begun early, takes the slot of one that is being read or computed."""
    table = residency(3)
    first = table.begin(0, [1, 7], [1, 1], 1)
    first.advance()
    second = table.begin(1, [2, 3], [1, 1], 1)
    assert [one.key for one in second.advance()] == [EXPERTS + 2]
    assert second.advance() == []
    (one,) = first.release() or second.advance()
    assert (one.key, one.evicted) == (EXPERTS + 3, 1)
    assert table.slot_of(7) is not None


def test_of_what_is_needed_next_the_last_goes_first() -> None:
    """Fails if a layer that needs more than there is throws out what it uses a moment later."""
    table = residency(3)
    compute(table, 0, 5, 7, 9)
    now = table.begin(0, [1, 5, 7, 9], [1] * 4, 1)
    assert [(one.key, one.evicted) for one in now.advance()] == [(1, 9), (5, None), (7, None)]


def test_a_pass_looks_no_further_ahead_than_its_window() -> None:
    """Fails if a long prompt, which needs every expert, would hold every slot at once."""
    table = residency(100)
    now = table.begin(0, range(EXPERTS), [1] * EXPERTS, 1)
    assert len(now.advance()) == len(now.waiting) == WINDOW
    assert [one.key for one in now.release()] == [WINDOW]
    assert now.waiting == list(range(1, WINDOW + 1))


def test_an_abandoned_pass_lets_everything_go() -> None:
    """Fails if an interrupted step keeps experts for ever, or one is released twice."""
    table = residency(3)
    now = table.begin(0, [1, 2, 3, 4], [1] * 4, 1)
    now.advance()
    now.release()
    now.abandon()
    now.abandon()
    assert now.done and now.waiting == []
    assert table.shrink() is not None and table.shrink() is not None


def test_a_pin_holds_until_everybody_let_go() -> None:
    """Fails if the first of two releases gives the expert free."""
    table = residency(1)
    for _ in range(2):
        assert table.acquire(3, []) is not None
    table.release(3)
    assert table.acquire(4, []) is None
    table.release(3)
    found = table.acquire(4, [])
    assert found is not None and found.evicted == 3


def test_a_forgotten_expert_is_read_again() -> None:
    """Fails if one whose bytes could not be read would be taken for resident, or its slot is lost."""
    table = residency(2)
    compute(table, 0, 1, 2)
    table.forget(1)
    assert (table.slot_of(1), table.keys(), table.capacity) == (None, [2], 2)
    assert compute(table, 0, 1, 2) == [False, True]


def test_no_layer_starves() -> None:
    """Fails if a layer that is used rarely loses all its experts to the others."""
    table = residency(12)
    compute(table, 2, 0, 1, 2)
    for expert in range(EXPERTS):
        compute(table, 0, expert)
        compute(table, 1, expert)
    assert [key // EXPERTS for key in list(table.keys())].count(2) == 2


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 7),
    policy=st.sampled_from(sorted(POLICIES)),
    moves=st.lists(st.tuples(st.sampled_from("bbbrrrxsgf"), st.integers(0, 63)), max_size=63),
)
def test_slots_are_never_shared_whatever_happens(
    capacity: int, policy: PolicyName, moves: list[tuple[str, int]]
) -> None:
    """Fails if passes that overlap or are abandoned, and slots that go and come, put two experts in a slot."""
    table, passes, taken = residency(capacity, policy), [], list[int]()
    for move, number in moves:
        one = passes[number % len(passes)] if passes else None
        if move == "b":
            experts = sorted({number % 7, number % 11, number % 13})
            passes.append(table.begin(number % LAYERS, experts, [1] * len(experts), 1))
            passes[-1].advance()
        elif move == "r" and one is not None and one.waiting:
            one.release()
        elif move == "x" and one is not None:
            one.abandon()
        elif move == "s" and (slot := table.shrink()) is not None:
            taken.append(slot)
        elif move == "g" and taken:
            table.grow(taken.pop())
        waiting = {key for each in passes for key in each.waiting}
        idle = sorted(set(table.keys()) - waiting)
        if move == "f" and idle:
            table.forget(idle[number % len(idle)])
        slots = [table.slot_of(key) for key in list(table.keys())]
        assert waiting <= set(table.keys())
        assert len({*slots, *taken}) == len(slots) + len(taken) <= capacity
        assert table.capacity == capacity - len(taken) >= 1


def test_after_an_interruption_nothing_is_in_use_and_every_slot_is_there() -> None:
    """Fails if a slot is lost, shared or in use for ever, or a layer is thought to have more than it has."""
    table = residency(4)
    table.begin(0, [1, 2, 3], [1] * 3, 1).advance()
    one, two = table.slot_of(1), table.slot_of(2)
    table._free.clear()
    table.mend({1, 2, 7}, range(5))
    assert (table.slot_of(1), table.slot_of(2), table.slot_of(3), table.slot_of(7)) == (one, two, None, None)
    assert table.capacity == 5 and not table._pins and table._of_layer == [2, 0, 0]
    now = table.begin(1, [0, 1, 2, 3, 4], [1] * 5, 1)
    assert len({found.slot for found in now.advance()}) == 5
