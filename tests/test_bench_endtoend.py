"""Whole-model rows: names, tokens and bytes; the session is where it should be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from localmoe.bench import endtoend, shapes
from localmoe.bench.endtoend import Trial, plan_trials, run, trace
from localmoe.bench.on_gpus import bytes_per_token
from localmoe.bench.subject import Computing, open_synthetic
from localmoe.engine import Engine
from localmoe.errors import GenerationError, UsageError
from localmoe.models.family import tensor_inventory
from tests.tiny_bench import tiny

__all__ = ["tiny"]
TORCH = Computing(torch.float32, None)


def silent(_doing: str) -> None:
    pass


def test_rows_are_named_as_llama_bench_names_them() -> None:
    names = [test.name for test in plan_trials([512, 0], [128], [0, 4096], 10_000)]
    assert names == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]


def test_nothing_to_measure_and_too_much_context_are_refused() -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        plan_trials([0], [0], [0], 100)
    with pytest.raises(UsageError, match=r"pp8 @ d96 needs a context of 104 tokens, the model has 100"):
        plan_trials([8], [1], [0, 96], 100)


@pytest.mark.parametrize(("name", "billions"), [("v4-flash", 13.27), ("v4-pro", 48.85)])
def test_a_token_reads_the_published_number_of_active_parameters(name: str, billions: float) -> None:
    """Fails if the limit would count all experts, or leave out the shared one; one byte for each parameter here."""
    config = shapes.published(name)
    held = {tensor: torch.Size(spec.shape).numel() for tensor, spec in tensor_inventory(config).items()}
    assert bytes_per_token(config, held) / 1e9 == pytest.approx(billions, abs=0.006)


def test_the_trace_is_the_same_every_time_and_in_range() -> None:
    """Fails if two runs of an A/B would route to different experts."""
    assert trace(100, 7) == trace(100, 7)
    assert set(trace(100, 7)) == set(range(7))
    assert trace(50, 7) == trace(100, 7)[:50]


def test_every_repetition_takes_the_same_tokens_from_the_same_place(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a repetition would run in the context that the one before left, or with other tokens."""
    subject = open_synthetic(tiny, shapes.published(tiny), TORCH, silent)
    steps: list[tuple[int, tuple[int, ...]]] = []
    advance = Engine.advance

    def record(engine: Engine, work: Any, **options: Any) -> Any:
        (session, chunk) = work[0]
        steps.append((session.length, tuple(chunk)))
        return advance(engine, work, **options)

    monkeypatch.setattr(Engine, "advance", record)
    rows = list(run(subject, [Trial(5, 0, 0), Trial(0, 2, 3)], 2, silent))
    ids = trace(5, TINY_VOCABULARY)
    prompt, context = (0, tuple(ids)), (0, tuple(ids[:3]))
    tokens = [(3, (ids[3],)), (4, (ids[4],))]
    assert steps == [prompt] * 3 + [context] + tokens * 3
    assert [len(row["samples_tokens_per_s"]) for row in rows] == [2, 2]


TINY_VOCABULARY = 160


def test_a_generation_row_has_the_limit_of_memory_and_a_prompt_row_has_not(tiny: str) -> None:
    subject = open_synthetic(tiny, shapes.published(tiny), TORCH, silent)
    prompt, generation = run(subject, [Trial(2, 0, 0), Trial(0, 2, 0)], 1, silent)
    assert prompt["percent_of_read"] is None and prompt["weight_bytes_per_token"] is None
    assert 0 < generation["weight_bytes_per_token"] < subject.nbytes
    rate, pace = generation["tokens_per_s"], generation["read_bytes_per_s"]
    if pace is not None:
        expected = 100 * rate * generation["weight_bytes_per_token"] / pace
        assert generation["percent_of_read"] == pytest.approx(expected)
    assert prompt.keys() == generation.keys()


def test_a_model_that_gives_nan_is_not_measured(tiny: str) -> None:
    """Fails if the speed of computing NaN would be published."""
    subject = open_synthetic(tiny, shapes.published(tiny), TORCH, silent)
    subject.engine.model.norm.fill_(1)
    subject.engine.model.embed.fill_(float("nan"))
    with pytest.raises(GenerationError, match="not finite"):
        list(run(subject, [Trial(2, 0, 0)], 1, silent))


def test_memory_is_read_from_another_place_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the same weights would be read again and again, from the cache."""
    monkeypatch.setattr(endtoend, "_READ_BYTES", 20)
    seen: list[list[int]] = []
    reader: Any = SimpleNamespace(bytes_per_s=lambda tensors: float(not seen.append([int(t[0]) for t in tensors])))
    pace = endtoend._Pace([torch.full((10,), i, dtype=torch.uint8) for i in range(3)], reader)
    for _ in range(3):
        pace.sample()
    assert seen == [[0, 1], [2, 0], [1, 2]]
