"""The paging bench: what it writes, what it counts, and the plan beside what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe.bench import measure, paging, rates, shapes
from localmoe.bench.subject import Computing
from localmoe.cli.main import main
from localmoe.errors import UsageError
from localmoe.experts.paging import Paging
from localmoe.plan import plan
from tests.tiny_bench import tiny

__all__ = ["tiny"]
LAYERS, EXPERTS, TOKENS = 4, 4, 3


def silent(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of small buffers and tensors: their values do not matter here."""
    monkeypatch.setattr(measure, "_SMALL", 1)
    monkeypatch.setattr(rates, "_ROWS", 64)
    monkeypatch.setattr(rates, "_COLS", 64)
    monkeypatch.setattr(rates, "_EXPERTS", EXPERTS)
    monkeypatch.setattr(rates, "_VOCABULARY", 64)


def measured(folder: Path, how: Paging, *, skewed: bool = False, ram: int | None = None) -> dict[str, Any]:
    config = shapes.cut("tiny", LAYERS, EXPERTS, 64)
    subject = paging.Paged("tiny", config, folder, Computing(torch.float32, None), how, silent, skewed=skewed)
    # Where the plan is to hear of another budget than the pager.
    subject.ram = ram or subject.ram
    try:
        (found,) = paging.run(subject, paging.Trial(TOKENS, 2, skewed), silent)
    finally:
        subject.experts.close()
    return found


@pytest.mark.usefixtures("tiny")
def test_everything_in_memory_hits_and_is_planned_so(tmp_path: Path) -> None:
    """Fails if a plan for the same budget would not see that all experts fit."""
    found = measured(tmp_path, Paging(ram=64 << 30))
    assert found["slots"] == found["planned_slots"] == LAYERS * EXPERTS
    assert found["planned_parts"]["disk"] == 0
    assert found["planned_tokens_per_s"] > 0
    assert len(found["samples_rss_bytes"]) == TOKENS + 1
    assert found["prompt_tokens_per_s"] is None
    assert found["peak_rss_bytes"] == max(found["samples_rss_bytes"])


@pytest.mark.usefixtures("tiny")
def test_few_slots_read_from_disk_and_are_not_planned(tmp_path: Path) -> None:
    """Fails if slots given by number would be compared with a plan of some budget in bytes."""
    found = measured(tmp_path, Paging(slots=2))
    assert found["slots"] == 2
    assert found["disk_bytes_per_token"] > 0
    assert found["planned_tokens_per_s"] is None


@pytest.mark.usefixtures("tiny")
def test_a_budget_that_plan_would_refuse_is_measured_all_the_same(tmp_path: Path) -> None:
    """Fails if the refusal, after the run, would lose what was measured."""
    found = measured(tmp_path, Paging(slots=2), ram=1 << 20)
    assert found["tokens_per_s"] > 0
    assert found["planned_tokens_per_s"] is None


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("skewed", [False, True])
def test_only_skewed_routing_tells_the_plan_its_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skewed: bool
) -> None:
    """Fails if the plan of even routing, meant to know nothing of the run, would be given its hit rate."""
    asked: list[object] = []

    def spy(*args: Any) -> object:
        asked.append(args[3])
        return plan(*args)

    monkeypatch.setattr(paging, "plan", spy)
    found = measured(tmp_path, Paging(ram=64 << 30), skewed=skewed)
    assert asked == [found["hit_percent"] / 100 if skewed else "uniform"]


@pytest.mark.usefixtures("tiny")
def test_the_command_keeps_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the record would miss the plan, or the experts be written again for another run."""
    args = ["bench", "paging", "--synthetic", "tiny", "--layers", "4", "--ram", "64GB", "--dir", str(tmp_path)]
    args += ["-n", "2", "--warm-up", "1", "-o", "jsonl", "--kernels", "reference"]
    assert main(args) == 0
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert main([*args, "--policy", "lru"]) == 0
    assert file.stat().st_mtime_ns == written
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["planned_tokens_per_s"] > 0 for row in rows] == [True, True]


@pytest.mark.usefixtures("tiny")
def test_a_smaller_vocabulary_changes_nothing_else() -> None:
    """Fails if --vocab would be ignored, or cut more than the embedding and the head."""
    whole, less = shapes.cut("tiny", LAYERS, EXPERTS), shapes.cut("tiny", LAYERS, EXPERTS, 64)
    assert less.vocab_size == 64
    assert replace(less, vocab_size=whole.vocab_size) == whole


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("size", [0, 161])
def test_a_vocabulary_that_is_no_cut_is_refused(size: int) -> None:
    """Fails if more tokens than published, or none, would be made up."""
    with pytest.raises(UsageError, match=f"{size} tokens.*expected 1 to 160"):
        shapes.cut("tiny", LAYERS, EXPERTS, size)
