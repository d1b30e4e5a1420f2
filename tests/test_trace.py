"""Routing traces: what is written comes back, and a file that is none is refused in a sentence."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmoe.errors import UsageError
from localmoe.experts.trace import Counted, Entry, Header, Recorder, Resized, TracedStep, Use, read_trace, use_of

HEADER = Header("odd one", 3, 7, 2, 1, 4099, 5, "aged")
FIRST = {
    "localmoe_trace": 1,
    "model": "m",
    "num_layers": 3,
    "num_experts": 7,
    "top_k": 2,
    "num_hash_layers": 1,
    "expert_bytes": 4099,
}


def lines(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def read(path: Path) -> tuple[Header, list[Entry]]:
    header, entries = read_trace(path)
    return header, list(entries)


def refusal(path: Path) -> str:
    """What a bad file's reader is told, which must be one sentence naming the file."""
    with pytest.raises(UsageError) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    return said


def uses(tokens: int) -> st.SearchStrategy[Use]:
    experts = st.sets(st.integers(0, 6)).map(sorted)
    if tokens == 1:
        return experts.map(lambda some: Use(some, [1] * len(some)))
    count = st.integers(1, tokens)
    return experts.flatmap(
        lambda some: st.lists(count, min_size=len(some), max_size=len(some)).map(lambda counts: Use(some, counts))
    )


STEPS = st.integers(1, 7).flatmap(lambda t: st.tuples(uses(t), uses(t), uses(t)).map(lambda u: TracedStep(t, list(u))))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(STEPS | st.builds(Resized, st.integers(1, 21)), max_size=7), packed=st.booleans())
def test_what_is_written_comes_back(tmp_path: Path, entries: list[Entry], packed: bool) -> None:
    """Fails if a layer, a count, a change of capacity or their order is lost, compressed or not."""
    path = tmp_path / ("trace.jsonl.gz" if packed else "trace.jsonl")
    recorder = Recorder(path, HEADER)
    for entry in entries:
        if isinstance(entry, TracedStep):
            for layer, use in enumerate(entry.uses):
                recorder.layer(layer, entry.tokens, use)
        elif isinstance(entry, Resized):
            recorder.resized(entry.capacity)
    recorder.close(Counted(100, 63))
    recorder.close(Counted(0, 0))
    assert path.read_bytes().startswith(b"\x1f\x8b" if packed else b"{")
    assert read(path) == (HEADER, [*entries, Counted(100, 63)])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[6, 0, 3]], Use([0, 3, 6], [1, 1, 1])),
        ([[5, 5]], Use([5], [1])),
        ([[6, 0], [0, 3], [0, 6]], Use([0, 3, 6], [3, 1, 2])),
    ],
)
def test_uses_are_counted_in_order_of_expert(ids: list[list[int]], expected: Use) -> None:
    """Fails if one token and several are counted by different rules, or experts do not ascend."""
    assert use_of(torch.tensor(ids)) == expected


def test_a_step_that_breaks_off_is_not_recorded(tmp_path: Path) -> None:
    """Fails if the layers of an interrupted step join those of the next, or a layer asked twice is written twice."""
    path = tmp_path / "trace"
    recorder = Recorder(path, HEADER)
    for layer, expert in ((0, 4), (1, 4), (0, 1), (0, 2), (1, 2), (1, 3), (2, 2)):
        recorder.layer(layer, 1, Use([expert], [1]))
    recorder.close()
    assert read(path)[1] == [TracedStep(1, [Use([2], [1])] * 3)]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Fails if a mistyped folder would end in a traceback, after the model has been loaded."""
    with pytest.raises(UsageError, match="cannot be written"):
        Recorder(tmp_path / "nowhere" / "trace", HEADER)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is no routing trace"),
        ("\n", "line 1 is not JSON"),
        ("hello\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is no entry"),
        (lines({"tokens": 1}), "is no routing trace of this version"),
        (lines(FIRST | {"localmoe_trace": 2}), "is no routing trace of this version"),
        (lines({"localmoe_trace": 1}), "malformed first line"),
        (lines(FIRST | {"more": 1}), "malformed first line"),
        (lines(FIRST | {"num_layers": 0}), "malformed first line"),
        (lines(FIRST | {"num_layers": 1.5}), "malformed first line"),
        (lines(FIRST | {"num_layers": 1 << 40}), "malformed first line"),
        (lines(FIRST | {"num_hash_layers": 4}), "malformed first line"),
        (lines(FIRST | {"num_hash_layers": -1}), "malformed first line"),
        (lines(FIRST | {"expert_bytes": "many"}), "malformed first line"),
        (lines(FIRST | {"capacity": 22}), "malformed first line"),
        (lines(FIRST | {"policy": ["lru"]}), "malformed first line"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    """Fails if a value of the header is believed that a replay would trip over, or run for ever on."""
    path = tmp_path / "trace"
    path.write_text(content)
    assert problem in refusal(path)


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"tokens": 1},
        {"tokens": 1, "layers": 3},
        {"tokens": 1, "layers": [[0], [1]]},
        {"tokens": 1, "layers": [[0], [1], [2], [3]]},
        {"tokens": 1, "layers": [[0], [1], [7]]},
        {"tokens": 1, "layers": [[0], [1], [-1]]},
        {"tokens": 1, "layers": [[0], [1], [True]]},
        {"tokens": 1, "layers": [[0], [1], [1, 1]]},
        {"tokens": 1, "layers": [[0], [1], [3, 2]]},
        {"tokens": 1, "layers": [[0], [1], {}]},
        {"tokens": 1, "layers": [[0], [1], ""]},
        {"tokens": 2, "layers": [[[0], [1]], [[0], [1]], [[0], []]]},
        {"tokens": 2, "layers": [[[0], [1]], [[0], [1]], [[0], ["1"]]]},
        {"tokens": 2, "layers": [[[0], [1]], [[0], [1]], [[0], [0]]]},
        {"tokens": 2, "layers": [[[0], [1]], [[0], [1]], [0]]},
        {"tokens": 0, "layers": [[], [], []]},
        {"tokens": 1.5, "layers": [[], [], []]},
        {"tokens": 1 << 2000, "layers": [[], [], []]},
        {"capacity": 0},
        {"capacity": 22},
        {"capacity": float("inf")},
        {"hits": 1},
        {"hits": 1, "misses": None},
    ],
)
def test_a_line_that_does_not_fit_is_refused_with_its_number(line: dict[str, Any], tmp_path: Path) -> None:
    """Fails if an expert outside the model, a missing layer or a number that is none would reach a replay."""
    path = tmp_path / "trace"
    path.write_text(lines(FIRST, {"tokens": 1, "layers": [[0], [1], [2]]}, line))
    assert "line 3 is no entry of this trace" in refusal(path)


def test_a_recording_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    """Fails if half a line, or half a compressed file, is read as if it were whole, or ends in a traceback."""
    path, packed = tmp_path / "trace", tmp_path / "trace.gz"
    whole = lines(FIRST, *[{"tokens": 1, "layers": [[0], [1], [2]]}] * 100)
    path.write_text(whole[:-9])
    assert "line 101 is not JSON" in refusal(path)
    packed.write_bytes(gzip.compress(whole.encode())[:-9])
    assert "cannot be read" in refusal(packed)


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    """Fails if an error of the decompressor is not among those expected: zlib's own is no OSError."""
    path = tmp_path / "trace.gz"
    noise = random.Random(0)
    whole = gzip.compress(lines(FIRST, *[{"hits": n, "misses": noise.randrange(10**9)} for n in range(100)]).encode())
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= noise.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            read(path)
        except UsageError as refused:
            assert "\n" not in str(refused)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "nowhere")
    assert "cannot be read" in refusal(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["tokens", "layers"]), inner),
    max_leaves=7,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=63)
    | st.dictionaries(st.sampled_from([*FIRST, "capacity", "policy"]), JSON).map(lambda e: lines(FIRST | e).encode())
    | st.dictionaries(st.sampled_from(["tokens", "layers", "capacity", "hits", "misses"]), JSON).map(
        lambda entry: lines(FIRST, entry).encode()
    ),
    name=st.sampled_from(["trace", "trace.gz"]),
)
def test_no_content_does_more_than_be_refused(tmp_path: Path, content: bytes, name: str) -> None:
    """Fails if some file, or some value in one, ends in anything but UsageError."""
    path = tmp_path / name
    path.write_bytes(content)
    try:
        read(path)
    except UsageError as refused:
        assert "\n" not in str(refused)
