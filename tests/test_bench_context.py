"""`localmoe bench context`: a growing context's speed and memory beside the plan."""

from __future__ import annotations

import json

import pytest
import torch

from localmoe.bench import context, subject
from localmoe.bench.subject import Computing
from localmoe.cli.main import main
from localmoe.errors import UsageError


@pytest.mark.parametrize("lengths", [[0], [4], [64, 68], [64, 32], [3000]])
def test_lengths_without_room_or_beyond_the_model_are_refused(lengths: list[int]) -> None:
    with pytest.raises(UsageError, match="a context of"):
        context.check(lengths, 4, 2048)


def test_lengths_with_room_are_not() -> None:
    context.check([5, 10, 2048], 4, 2048)


def test_each_length_has_its_own_row() -> None:
    """Reads exactly up to each length: the state is that of so many tokens, and the plan's share grows with them."""
    mini = subject.open_directory(None, Computing(torch.float32, None), lambda doing: None)
    first, second = context.run(mini, [40, 700], 8, lambda doing: None)
    assert (first["context"], second["context"]) == (40, 700)
    whole = mini.engine.new_session()
    mini.engine.advance([(whole, list(range(300, 340)))])
    assert first["state_bytes"] == whole.state.nbytes < second["state_bytes"]
    assert first["planned_context_bytes"] < second["planned_context_bytes"]
    assert second["planned_process_bytes"] - second["planned_context_bytes"] > mini.nbytes
    assert first["prefill_tokens_per_s"] > 0 and second["decode_tokens_per_s"] > 0


def test_a_context_that_is_made_up_has_the_size_of_one_that_is_read() -> None:
    """Fails if a part of the state were left out, so that decoding would read less; mini has every kind of them."""
    mini = subject.open_directory(None, Computing(torch.float32, None), lambda doing: None)
    read = list(context.run(mini, [40, 6000], 8, lambda doing: None))
    made_up = list(context.run(mini, [40, 6000], 8, lambda doing: None, made_up=True))
    for one, other in zip(read, made_up, strict=True):
        assert one["prefill_tokens_per_s"] > 0 and other["prefill_tokens_per_s"] is None
        assert other["state_bytes"] == pytest.approx(one["state_bytes"], rel=1 / 16)


def test_a_context_that_was_decoded_can_be_made_up_further() -> None:
    """Fails if rows that decoding made room for cannot be written: the first window of 16 closes while it decodes."""
    mini = subject.open_directory(None, Computing(torch.float32, None), lambda doing: None)
    assert len(list(context.run(mini, [16, 48], 8, lambda doing: None, made_up=True))) == 2


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Also: where the system tells a peak, it is more than the weights and its share of the plan is right."""
    assert main(["bench", "context", "--lengths", "64,128", "-n", "4", "-o", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["context"] for row in rows] == [64, 128]
    for row in rows:
        if row["process_bytes"] is not None:
            assert row["process_bytes"] > row["model_bytes"]
            assert row["process_percent_of_plan"] == 100 * row["process_bytes"] / row["planned_process_bytes"]
