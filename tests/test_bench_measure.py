"""Statistics, interleaved timing and the pace of memory."""

from __future__ import annotations

import pytest
import torch

from localmoe import device
from localmoe.bench.measure import MemoryReader, Spread, circumstances, interleaved, use_threads
from tests.native_kernels import library, needs_native, using


def test_mean_deviation_and_median() -> None:
    """Fails for the deviation of a population, which understates few repetitions."""
    spread = Spread((2.0, 4.0, 9.0))
    assert (spread.mean, spread.median) == (5.0, 4.0)
    assert spread.sd == pytest.approx(13**0.5)


def test_one_sample_has_no_deviation() -> None:
    assert Spread((3.0,)).sd == 0.0


def test_works_are_timed_in_turn_after_a_round_that_does_not_count() -> None:
    """Fails if one work would run in another's quiet time, or its first, slow call be counted."""
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repetitions=4, budget_s=9)
    assert "".join(calls) == "ab" * 5
    assert {name: len(spread.samples) for name, spread in times.items()} == {"a": 4, "b": 4}


def test_what_takes_long_is_repeated_three_times_first_round_included() -> None:
    """Fails if a call of minutes would be made twenty times."""
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a")}, repetitions=20, budget_s=0)
    assert len(calls) == len(times["a"].samples) == 3


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_native)])
def test_the_pace_counts_the_bytes_of_large_tensors(compiled: bool) -> None:
    """Fails if the start of a job for each small tensor would be counted as memory."""
    reader = MemoryReader(library() if compiled else None)
    large = torch.zeros(3, 1 << 20, dtype=torch.float8_e4m3fn)
    assert 1e7 < reader.bytes_per_s([large, torch.zeros(3)]) < 1e13
    assert reader.bytes_per_s([torch.zeros(3)]) == 0.0


@needs_native
def test_threads_are_set_for_torch_and_the_library() -> None:
    """Fails if the two sides of a comparison would have different numbers of threads."""
    before = torch.get_num_threads()
    with using() as lib:
        try:
            use_threads(2, lib)
            assert (torch.get_num_threads(), lib.threads) == (2, 2)
            assert circumstances(lib)["threads"] == 2
        finally:
            torch.set_num_threads(before)


def test_a_record_says_when_with_what_and_on_what() -> None:
    record = circumstances(None)
    assert set(record) == {"date", "torch", "isa", "threads", "cpu"}
    assert record["isa"] == "reference" and all(record.values())


def test_the_hub_cache_follows_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the free space of another disk would be shown."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    assert str(device.hub_cache()) == "/home/x/.cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert str(device.hub_cache()) == "/c/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/h")
    assert str(device.hub_cache()) == "/h/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/d")
    assert str(device.hub_cache()) == "/d"
    assert device.free_disk(device.hub_cache()) == device.free_disk(device.Path("/"))
