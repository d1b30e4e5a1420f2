"""A step: which rows belong to whom, and where a sequence first broke."""

from __future__ import annotations

import pytest
import torch

from localmoe.sequence import SequenceState
from localmoe.step import Fault, Step, note_faults


def states(*lengths: int) -> list[SequenceState]:
    found = [SequenceState([]) for _ in lengths]
    for state, length in zip(found, lengths, strict=True):
        state.length = length
    return found


def test_rows_follow_one_another_and_positions_go_on_from_each_length() -> None:
    """Fails if positions are those of the step instead of the sequence."""
    a, b = states(0, 100)
    step = Step.of([(a, [5, 6, 7]), (b, [8])])
    assert step.token_ids.tolist() == [5, 6, 7, 8]
    assert step.positions.tolist() == [0, 1, 2, 100]
    assert [(span.state is s, span.rows) for span, s in zip(step.spans, (a, b), strict=True)] == [
        (True, slice(0, 3)),
        (True, slice(3, 4)),
    ]
    assert step.logit_rows.tolist() == [2, 3]
    assert Step.of([(a, [5, 6, 7]), (b, [8])], all_logits=True).logit_rows.tolist() == [0, 1, 2, 3]


def test_parts_of_a_step_are_steps_of_their_own() -> None:
    """Fails if a row is left out or taken twice, or a piece is not where the one before it ended."""
    a, b, c = states(0, 100, 7)
    step = Step.of([(a, [1] * 5), (b, [2]), (c, [3] * 6)])
    found = [(rows, [(i, p.start, p.stop, p.position) for i, p in pieces]) for rows, pieces in step.parts(4)]
    assert found == [
        (slice(0, 4), [(0, 0, 4, 0)]),
        (slice(4, 8), [(0, 0, 1, 4), (1, 1, 2, 100), (2, 2, 4, 7)]),
        (slice(8, 12), [(2, 0, 4, 9)]),
    ]
    ((rows, pieces),) = step.parts(12)
    assert (rows, [piece for _i, piece in pieces]) == (slice(0, 12), list(step.spans))


def test_commit_advances_every_state() -> None:
    a, b = states(0, 100)
    step = Step.of([(a, [5, 6, 7]), (b, [8])])
    assert (a.length, b.length) == (0, 100)
    step.commit()
    assert (a.length, b.length) == (3, 101)


def test_an_empty_chunk_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="at least one token"):
        Step.of([(states(0)[0], [])])


def test_the_first_fault_of_each_sequence_is_kept() -> None:
    """Fails if a sound sequence is blamed, or a later layer overwrites the first."""
    a, b, c = states(0, 0, 0)
    step = Step.of([(a, [1, 2]), (b, [3]), (c, [4])])
    values = torch.zeros(4, 2, 3)
    with torch.no_grad():
        note_faults(step, 0, "attention", values)
        assert step.faults == {}
        values[1, 1, 2] = float("nan")
        note_faults(step, 1, "attention", values)
        values[3, 0, 0] = float("-inf")
        note_faults(step, 2, "mixture of experts", values)
    assert step.faults == {0: Fault(1, "attention"), 2: Fault(2, "mixture of experts")}
    assert str(step.faults[0]) == "layer 1, attention"
