"""The batch bench: rows for every number of replies, and what of the experts a token costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe.bench import batch, paging, shapes
from localmoe.bench.subject import Computing
from localmoe.cli.main import main
from localmoe.experts.paging import Paging
from tests.test_bench_paging import EXPERTS, LAYERS, silent, small
from tests.tiny_bench import tiny

__all__ = ["small", "tiny"]


@pytest.mark.usefixtures("tiny")
def test_one_read_of_an_expert_serves_all_that_chose_it(tmp_path: Path) -> None:
    """Fails if bytes a token would not fall with company: few experts, so that replies must share them."""
    config = shapes.cut("tiny", LAYERS, EXPERTS, 64)
    paged = paging.Paged(
        "tiny", config, tmp_path, Computing(torch.float32, None), Paging(slots=2), silent, skewed=False
    )
    subject = batch.Batched("tiny", paged.engine, None, lambda: paged.experts.stats)
    try:
        one, many = batch.run(subject, [1, 16], 4, 1, silent)
    finally:
        paged.experts.close()
    assert (one["replies"], many["replies"], one["times_first"]) == (1, 16, 1)
    assert many["tokens_per_s"] == 16 / many["step_seconds"]
    assert 0 < 2 * many["disk_bytes_per_token"] < one["disk_bytes_per_token"]
    assert 0 < 2 * many["expert_bytes_per_token"] < one["expert_bytes_per_token"]


def test_the_embedded_model_is_measured_by_default(capsys: Any) -> None:
    assert main(["bench", "batch", "--batch", "1,3", "-n", "2", "--warm-up", "1", "-o", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["model"], row["replies"], row["steps"]) for row in rows] == [
        ("localmoe-mini", 1, 2),
        ("localmoe-mini", 3, 2),
    ]
    assert all(row["disk_bytes_per_token"] is None for row in rows)


@pytest.mark.parametrize(
    "arguments", [["--skewed"], ["--layers", "4"], ["--dir", "x"], ["--synthetic", "v4-flash", "--model", "x"]]
)
def test_options_that_would_have_no_effect_are_refused(arguments: list[str], capsys: Any) -> None:
    assert main(["bench", "batch", *arguments]) == 2
    assert "leave" in capsys.readouterr().err
