"""In what order CUDA is told to record and to replay. CUDA itself is made up; on a GPU it is not."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from localmoe.cuda_graphs import CudaRecorder

ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA has been told."""
    said: list[str] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            self.device = device

    class Graph:
        """As torch's: its pool must be new, or have another graph that is still alive."""

        pool: str | None = None

        def capture_begin(self, *, pool: str, capture_error_mode: str) -> None:
            said.append(f"begin in {pool}, {capture_error_mode}")
            if "refuse" in said:
                raise RuntimeError("refused")
            assert pool not in alive or len(alive[pool]), "use_count > 0"
            self.pool = pool

        def capture_end(self) -> None:
            said.append("end")
            if "break" in said or self.pool is None:
                raise RuntimeError("broken")
            alive.setdefault(self.pool, weakref.WeakSet()).add(self)

        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def within(stream: Any) -> Iterator[None]:
        said.append(f"enter stream of {stream.device.index}")
        try:
            yield
        finally:
            said.append(f"leave stream of {stream.device.index}")

    pools, alive = iter("abcdef"), dict[str, weakref.WeakSet[Graph]]()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {next(pools)}")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: said.append(f"no more of {pool}"))
    return said


def recorded(recorder: CudaRecorder, device: torch.device, told: list[str]) -> list[str]:
    before = len(told)
    recorder.begin(device)
    told.append("work")
    recorder.end().replay()
    return told[before:]


def test_work_is_recorded_in_a_stream_of_its_own(told: list[str]) -> None:
    """Fails if something is recorded in another, or it is the current one afterwards."""
    body = ["enter stream of 0", "begin in pool a, thread_local", "work", "end", "leave stream of 0", "replay"]
    assert recorded(CudaRecorder(), ZERO, told) == body


def test_graphs_of_a_device_share_their_memory(told: list[str]) -> None:
    """Also with those that are gone. Fails if memory of one recording is not that of the next, if devices share it, or
    if torch is given a pool that no graph has any more."""
    recorder = CudaRecorder()
    for _ in range(3):
        assert "begin in pool a, thread_local" in recorded(recorder, ZERO, told)
    assert "begin in pool b, thread_local" in recorded(recorder, ONE, told)
    recorder.forget()
    assert "begin in pool c, thread_local" in recorded(recorder, ZERO, told)


def test_what_cannot_be_recorded_leaves_nothing_open(told: list[str]) -> None:
    """At the beginning or the end. Fails if the stream stays the current one, torch goes on taking memory from the
    pool, or a second error hides the first."""
    recorder = CudaRecorder()
    recorded(recorder, ZERO, told)
    for wrong, error in (("refuse", "refused"), ("break", "broken")):
        told[:] = [wrong]
        with pytest.raises(RuntimeError, match=error):
            recorded(recorder, ZERO, told)
        recorder.give_up()
        assert told.count("enter stream of 0") == told.count("leave stream of 0") == 1
        assert any(what.startswith("no more of pool") for what in told)
        told.clear()
        assert recorded(recorder, ZERO, told)[-2:] == ["leave stream of 0", "replay"]


def test_what_is_broken_off_leaves_nothing_open(told: list[str]) -> None:
    """Fails if what was recorded so far is not ended, or the pool, which has no graph, is used again."""
    recorder = CudaRecorder()
    recorder.begin(ZERO)
    recorder.give_up()
    assert told[-2:] == ["end", "leave stream of 0"]
    recorder.give_up()
    assert told[-2:] == ["end", "leave stream of 0"]
    assert "begin in pool b, thread_local" in recorded(recorder, ZERO, told)
