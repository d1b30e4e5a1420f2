"""`localmoe simulate`: the table, its numbers, and what is said about the run."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localmoe.cli.main import main
from localmoe.cli.simulate import gap_closed
from localmoe.experts.policies import POLICIES
from localmoe.experts.simulate import replay
from localmoe.experts.trace import Counted, Entry, Header, Recorder, Resized, TracedStep, Use

LAYERS, EXPERTS = 3, 20
GIB = 1 << 30


HEADER = Header("m", LAYERS, EXPERTS, top_k=3, num_hash_layers=1, expert_bytes=GIB // 4)


def steps(count: int = 40) -> list[Entry]:
    """Experts of low numbers are chosen more often."""
    draw = random.Random(7)
    return [
        TracedStep(1, [Use(sorted({int(EXPERTS * draw.random() ** 2) for _ in range(3)}), []) for _ in range(LAYERS)])
        for _ in range(count)
    ]


def record(path: Path, of: Header, entries: list[Entry], counted: Counted | None = None) -> str:
    recorder = Recorder(path, of)
    for entry in entries:
        if isinstance(entry, TracedStep):
            for layer, use in enumerate(entry.uses):
                recorder.layer(layer, entry.tokens, use)
        elif isinstance(entry, Resized):
            recorder.resized(entry.capacity)
    recorder.close(counted)
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return record(tmp_path / "trace.gz", HEADER, steps())


def rows(capsys: Any, *arguments: str) -> list[dict[str, Any]]:
    assert main(["simulate", *arguments, "-o", "jsonl"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def test_the_table_has_a_row_for_each_share(trace: str, capsys: Any) -> None:
    """Fails if a default size or a policy were left out, or a size in GiB were of other slots than the row's."""
    assert main(["simulate", trace]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    titles, _rule, *table = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines())
    assert titles[:3] == ["slots", "share %", "GiB"]
    assert titles[3:] == [*(f"{name} hit %" for name in POLICIES), "Belady hit %", "gap closed %"]
    assert [row[0] for row in table] == ["3", "6", "12", "18", "27", "42"]
    assert [row[2] for row in table] == ["0.75", "1.50", "3.00", "4.50", "6.75", "10.50"]


def test_the_numbers_agree_with_each_other(trace: str, capsys: Any) -> None:
    """Fails if a column shows another policy, or the gap is not what lies between lru and Belady."""
    found = rows(capsys, trace, "--slots", "7,31,60")
    assert [row["slots"] for row in found] == [7, 31, 60]
    assert len({row["uses"] for row in found}) == 1
    for row in found:
        most = row["belady_hit_percent"]
        assert all(0 <= row[f"{name}_hit_percent"] <= most < 100 for name in POLICIES)
        assert row["slots_bytes"] == row["slots"] * GIB // 4
    assert found[0]["gap_closed_percent"] == pytest.approx(
        100
        * (found[0]["best_hit_percent"] - found[0]["lru_hit_percent"])
        / (found[0]["belady_hit_percent"] - found[0]["lru_hit_percent"])
    )
    assert found[2]["gap_closed_percent"] is None
    assert found[2]["lru_hit_percent"] == found[2]["belady_hit_percent"]


def test_policies_can_be_chosen(trace: str, capsys: Any) -> None:
    """Fails if one that was not asked for is replayed, or the gap is computed from it."""
    (row,) = rows(capsys, trace, "--share", "30", "--policy", "s3fifo")
    assert [key for key in row if key.endswith("_hit_percent")] == ["s3fifo_hit_percent", "belady_hit_percent"]
    assert row["gap_closed_percent"] is None


def test_csv_has_a_line_for_each_size(trace: str, capsys: Any) -> None:
    assert main(["simulate", trace, "--slots", "5,5,9", "-o", "csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["slots"] for row in found] == ["5", "9"]


def test_the_share_of_a_small_model_is_at_least_a_slot(tmp_path: Path, capsys: Any) -> None:
    """Fails if 1 percent of 3 experts would be no slot, or the sizes that come out the same were shown twice."""
    small = replace(HEADER, num_layers=1, num_experts=3, num_hash_layers=0)
    path = record(tmp_path / "trace", small, [TracedStep(1, [Use([2], [1])])])
    assert [row["slots"] for row in rows(capsys, path, "--share", "1,2,100")] == [1, 3]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_run_is_replayed_as_it_was_recorded(policy: Any, tmp_path: Path, capsys: Any) -> None:
    """Fails if the recorded policy, capacity or its changes are not those of the replay, or a difference is hidden."""
    recorded = replace(HEADER, capacity=13, policy=policy)
    entries = [*steps(20), Resized(6), *steps(20), Resized(11), *steps(20)]
    counts = replay(recorded, entries_as_read(entries), 13, POLICIES[policy](LAYERS * EXPERTS), resize=True)
    line = f"as recorded: {counts.hits:,} hits, {counts.misses:,} misses; "
    for counted, said in [
        (Counted(counts.hits, counts.misses), "the run counted the same\n"),
        (Counted(counts.hits + 1, counts.misses), f"the run counted differently: {counts.hits + 1:,} hits, "),
        (None, "the run was cut short and counted nothing\n"),
    ]:
        path = record(tmp_path / "trace", recorded, entries, counted)
        assert main(["simulate", path, "--slots", "3"]) == 0
        err = capsys.readouterr().err
        assert err.startswith(line + said) and err.count("\n") == 1


def entries_as_read(entries: list[Entry]) -> list[Entry]:
    return [
        TracedStep(1, [Use(use.experts, [1] * len(use.experts)) for use in entry.uses])
        if isinstance(entry, TracedStep)
        else entry
        for entry in entries
    ]


def test_a_policy_of_another_version_is_no_error(tmp_path: Path, capsys: Any) -> None:
    """Fails if a trace could not be used any more once the policy it was recorded with is gone."""
    path = record(tmp_path / "trace", replace(HEADER, capacity=9, policy="lfu\x1b[31m"), steps(3))
    assert main(["simulate", path, "--slots", "3"]) == 0
    err = capsys.readouterr().err
    assert "recorded with the policy" in err and "\x1b" not in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--slots", "3", "--share", "5"], "--slots and --share both say how many slots"),
        (["--slots", "0"], "--slots is '0', expected numbers from 1"),
        (["--slots", "61"], "--slots is '61', expected at most 60"),
        (["--slots", "x"], "--slots is 'x', expected whole numbers"),
        (["--share", "101"], "--share is '101', expected percent of all experts, from 1 to 100"),
        (["--share", ""], "--share is '', expected whole numbers"),
        (["--policy", "lru,lfu"], "--policy does not know 'lfu', only best, aged, lru, s3fifo"),
        (["-o", "xml"], "Invalid value for '--output'"),
    ],
)
def test_wrong_options_are_refused_in_a_line(arguments: list[str], problem: str, trace: str, capsys: Any) -> None:
    """Fails if an option would be accepted without effect."""
    assert main(["simulate", trace, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert problem in err and err.count("\n") == 1


@pytest.mark.parametrize("entries", [[], [TracedStep(1, [Use([], [])] * LAYERS)]])
def test_a_trace_of_nothing_is_refused(entries: list[Entry], tmp_path: Path, capsys: Any) -> None:
    """Fails if shares of no uses are computed."""
    assert main(["simulate", record(tmp_path / "trace", HEADER, entries)]) == 2
    assert "holds no step in which an expert was used" in capsys.readouterr().err


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "trace"
    path.write_text("hello\n")
    for file in (path, tmp_path / "nowhere"):
        assert main(["simulate", str(file)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and str(file) in err


def test_the_gap_by_hand() -> None:
    """Fails if the gap is turned round, or divides by nothing."""
    assert gap_closed(30, 20, 60) == 25
    assert gap_closed(15, 20, 60) == -12.5
    assert gap_closed(None, 20, 60) is gap_closed(30, None, 60) is gap_closed(20, 20, 20) is None
