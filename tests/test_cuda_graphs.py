"""In what order CUDA is told to record and to replay. CUDA itself is made up; on a GPU it is not."""

from __future__ import annotations

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

        def wait_stream(self, other: str) -> None:
            said.append(f"{self.device.index} waits for {other}")

    class Graph:
        def capture_begin(self, *, pool: str, capture_error_mode: str) -> None:
            said.append(f"begin in {pool}, {capture_error_mode}")
            if "refuse" in said:
                raise RuntimeError("refused")

        def capture_end(self) -> None:
            said.append("end")
            if "break" in said:
                raise RuntimeError("broken")

        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def within(what: Any) -> Iterator[None]:
        name = f"stream of {what.device.index}" if isinstance(what, Stream) else f"device {what.index}"
        said.append(f"enter {name}")
        yield
        said.append(f"leave {name}")

    pools = iter("ab")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device.index}")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {next(pools)}")
    return said


def recorded(recorder: CudaRecorder, device: torch.device, told: list[str]) -> list[str]:
    before = len(told)
    recorder.begin(device)
    told.append("work")
    recorder.end().replay()
    return told[before:]


def test_work_is_recorded_in_a_stream_of_its_own(told: list[str]) -> None:
    """Fails if something is recorded before what it depends on, a graph is replayed on another device, or the graphs
    of a device do not share their memory."""
    recorder = CudaRecorder()
    made = ["enter device 0", "leave device 0"]
    body = [
        "0 waits for current of 0", "enter stream of 0", "begin in pool a, thread_local", "work", "end",
        "leave stream of 0", "enter device 0", "replay", "leave device 0",
    ]  # fmt: skip
    assert recorded(recorder, ZERO, told) == made + body
    assert recorded(recorder, ZERO, told) == body
    assert "begin in pool b, thread_local" in recorded(recorder, ONE, told)


def test_what_cannot_be_recorded_leaves_nothing_open(told: list[str]) -> None:
    """Fails if the stream stays the current one, or a second error hides the first."""
    recorder = CudaRecorder()
    told.append("refuse")
    with pytest.raises(RuntimeError, match="refused"):
        recorder.begin(ZERO)
    recorder.give_up()
    assert told[-1] == "leave stream of 0" or told.count("enter stream of 0") == 1
    told[:] = ["break"]
    recorder.begin(ZERO)
    recorder.give_up()
    assert told[-2:] == ["end", "leave stream of 0"]
    told.clear()
    assert recorded(recorder, ZERO, told)[-2] == "replay"
