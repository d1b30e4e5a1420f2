"""Traces are read back as they were written, and replayed as they were run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from localmoe.cli.main import main
from localmoe.errors import UsageError
from localmoe.experts.policies import POLICIES
from localmoe.experts.policy import Lru
from localmoe.experts.residency import WINDOW
from localmoe.experts.simulate import belady, replay
from localmoe.experts.trace import Counted, Entry, Header, Recorder, Resized, TracedStep, Use, read_trace

HEADER = Header("tiny", 2, 8, 2, 0, 4096, 3, "lru")


def steps(count: int, seed: int = 0) -> list[TracedStep]:
    draw = random.Random(seed)
    return [TracedStep(1, [Use(sorted(draw.sample(range(8), 2)), [1, 1]) for _ in range(2)]) for _ in range(count)]


def write(path: Path, entries: list[Entry]) -> Path:
    recorder = Recorder(path, HEADER)
    for entry in entries:
        if isinstance(entry, Resized):
            recorder.resized(entry.capacity)
        elif isinstance(entry, TracedStep):
            for layer, use in enumerate(entry.uses):
                recorder.layer(layer, entry.tokens, use)
    recorder.close(Counted(1, 2))
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_trace_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    """Fails if steps of several tokens lose their counts, or events their place."""
    entries = [*steps(3), Resized(2), TracedStep(5, [Use([1, 3], [4, 1]), Use([0], [5])])]
    header, found = read_trace(write(tmp_path / name, entries))
    assert header == HEADER
    assert list(found) == [*entries, Counted(1, 2)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '{"localmoe_trace":2}',
        '{"localmoe_trace":1,"model":"m"}',
        '{"localmoe_trace":1,"model":"m","num_layers":0,"num_experts":8,"top_k":2,"num_hash_layers":0,"expert_bytes":1}',
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    """Fails if a stranger's file ends in a traceback."""
    path = tmp_path / "t"
    path.write_text(content)
    with pytest.raises(UsageError):
        list(read_trace(path)[1])


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"tokens":1,"layers":[[9],[0]]}', '{"tokens":1,"layers":[[1]]}'])
def test_a_line_that_does_not_fit_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    """Fails if an expert outside the model is replayed, or the reader does not say where the fault lies."""
    path = write(tmp_path / "t", [*steps(1)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match="line 4"):
        list(read_trace(path)[1])


def test_nobody_beats_the_one_who_knows_the_future() -> None:
    """Fails if Belady's choice is not the furthest use, or the replay counts otherwise."""
    for seed in range(8):
        entries = steps(60, seed)
        for capacity in (4, 6, 9, 16):
            best = belady(HEADER, entries, capacity)
            for name, policy in POLICIES.items():
                counts = replay(HEADER, entries, capacity, policy(16))
                assert counts.hits <= best.hits, (name, capacity)
                assert counts.hits + counts.misses == best.hits + best.misses == 60 * 4
                assert counts.first == best.first


def test_belady_by_hand() -> None:
    """0 1 2 0 1 with two slots: 2 takes the place of 1, so 0 hits and 1 misses once more."""
    header = Header("tiny", 1, 8, 1, 0, 1)
    counts = belady(header, [TracedStep(1, [Use([e], [1])]) for e in (0, 1, 2, 0, 1)], 2)
    assert (counts.hits, counts.misses, counts.first) == (1, 4, 3)


def test_a_recorded_change_of_slots_is_replayed() -> None:
    """Fails if a run under memory pressure cannot be repeated."""
    entries: list[Entry] = [*steps(20), Resized(2), *steps(20, 1)]
    shrunk = replay(HEADER, entries, 8, POLICIES["lru"](16), resize=True)
    assert shrunk.hits < replay(HEADER, entries, 8, POLICIES["lru"](16)).hits


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a policy is left out, or a wrong file does not give exit code 2."""
    path = write(tmp_path / "t", [*steps(30)])
    assert main(["simulate", str(path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*POLICIES, "Belady"))
    assert main(["simulate", str(tmp_path / "missing")]) == 2


def test_first_uses_are_misses_however_many_slots_there_are() -> None:
    """Fails if the misses that no cache can avoid are not told apart, or an expert of another layer is taken for it."""
    uses = [TracedStep(1, [Use([3], [1]), Use([3], [1])]), TracedStep(2, [Use([3, 5], [2, 1]), Use([3], [2])])]
    for counts in (belady(HEADER, uses, 16), *(replay(HEADER, uses, 16, make(16)) for make in POLICIES.values())):
        assert (counts.hits, counts.misses, counts.first) == (2, 3, 3)


def test_hash_layers_are_begun_before_the_first_layer_is_computed() -> None:
    """Fails if the replay reads in another order than the pager: of each hash layer a window at once, then the rest."""
    admitted = list[int]()

    class Recording(Lru):
        def admit(self, key: int) -> None:
            admitted.append(key)
            super().admit(key)

    first = [*range(WINDOW + 1)]
    step = TracedStep(1, [Use(first, [1] * len(first)), Use([1], [1]), Use([0], [1])])
    for hash_layers, expected in [(0, [*first, 101]), (1, [*first, 101]), (2, [*first[:-1], 101, first[-1]])]:
        admitted.clear()
        replay(Header("wide", 3, 100, 17, hash_layers, 1), [step], 50, Recording(300))
        assert admitted == [*expected, 200]


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_layers_that_are_begun_together_all_complete(capacity: int) -> None:
    """Fails if hash layers hold each other's slots where there are hardly any."""
    for hash_layers in range(3):
        counts = replay(replace(HEADER, num_hash_layers=hash_layers), steps(7), capacity, Lru(16))
        assert counts.hits + counts.misses == 28


def test_slots_that_come_back_are_those_that_were_taken() -> None:
    """Fails if more slots are replayed than the run began with, or fewer after memory was short."""
    short: list[Entry] = [*steps(20), Resized(2), Resized(5), *steps(20)]
    never: list[Entry] = [*steps(20), Resized(16), *steps(20)]
    lru = POLICIES["lru"]
    plain = replay(HEADER, [*steps(20), *steps(20)], 5, lru(16))
    assert replay(HEADER, never, 5, lru(16), resize=True) == plain
    assert (
        replay(HEADER, short, 5, lru(16), resize=True).hits
        > replay(HEADER, [*steps(20), Resized(2), *steps(20)], 5, lru(16), resize=True).hits
    )
