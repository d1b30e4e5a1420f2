"""Experts that pass through a device: nothing is overwritten or read too early, whatever is done late."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.experts import queues
from localmoe.experts.passage import Passage
from localmoe.experts.queues import Queues
from tests.late_queues import LateQueues

DEVICE = torch.device("cpu")


class Machine:
    """Three places in RAM, used in turn, and slots; expert e is the number e. seen: (expert, what lay in its slot)."""

    def __init__(self, queues: Queues, slots: int, slab: torch.Tensor | None = None) -> None:
        self.ram, self.slab = torch.zeros(3, 1), torch.zeros(slots + 1, 1) if slab is None else slab
        self.seen: list[tuple[int, float]] = []
        self.groups: list[int] = []
        self.asked = 0
        pairs = [(slot, torch.zeros(1)) for slot in range(slots)]
        bytes_of = (self.ram.__getitem__, self.slab.__getitem__)
        self.passage = Passage(queues, pairs, bytes_of, self.compute, self.terms, clock=self.clock)

    def compute(self, slots: dict[int, int]) -> int:
        assert len(set(slots.values())) == len(slots)
        self.seen += [(expert, float(self.slab[slot])) for expert, slot in slots.items()]
        self.groups.append(len(slots))
        return len(slots)

    def terms(self) -> torch.Tensor:
        return torch.tensor([value for _, value in self.seen])

    def clock(self) -> float:
        self.asked += 1
        return float(self.asked)

    def put(self, expert: int) -> None:
        """The place is another's at once."""
        place = expert % 3
        self.ram[place] = expert
        self.passage.put(expert, place)
        self.ram[place] = -1


@settings(max_examples=150, deadline=None)
@given(experts=st.integers(0, 30), slots=st.integers(1, 9), seed=st.integers(0, 1000), held=st.booleans())
def test_every_expert_is_computed_once_from_its_own_bytes(experts: int, slots: int, seed: int, held: bool) -> None:
    """Fails if a slot is filled before it was computed, computed before it is full, or a buffer is filled before it was
    copied; or if an odd one is left at the end."""
    machine = Machine(LateQueues(seed), slots)
    if held:
        machine.slab[slots] = 99
        machine.passage.held({99: slots})
    for expert in range(1, experts + 1):
        machine.put(expert)
    terms = machine.passage.wait().tolist()
    assert terms == [99.0] * held + [float(expert) for expert in range(1, experts + 1)]
    assert [expert for expert, _ in machine.seen] == terms
    assert all(size <= max(-(-slots // 2), 1) for size in machine.groups)


def test_a_slot_that_was_read_before_is_not_overwritten() -> None:
    """Fails if the first copies do not wait for what the device was told before them, of another layer."""
    for seed in range(20):
        queues, found, slab = LateQueues(seed), list[float](), torch.ones(2, 1)
        queues.compute(functools.partial(lambda found, slab: found.append(float(slab[0])), found, slab), ())
        machine = Machine(queues, 1, slab)
        machine.put(5)
        machine.passage.wait()
        assert found == [1.0] and machine.seen == [(5, 5.0)]


def test_what_it_took_is_told() -> None:
    """A copy takes 3 s, computing 2 s; every look at the clock is 1 s later."""
    machine = Machine(LateQueues(0, (2.0, 3.0)), 4)
    for expert in range(1, 6):
        machine.put(expert)
    machine.passage.wait()
    assert (machine.passage.seconds, machine.passage.copying, machine.passage.staging) == (10.0, 15.0, 5.0)


def test_the_cpu_does_everything_at_once() -> None:
    """The twin of a GPU's queues that is part of the package."""
    machine = Machine(Queues(DEVICE), 4)
    for expert in range(1, 8):
        machine.put(expert)
    assert [expert for expert, _ in machine.seen] == [1, 2, 3, 4, 5, 6]
    assert machine.passage.wait().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert machine.passage.seconds >= 0 and machine.passage.copying > 0


@pytest.mark.parametrize("numbers", [5, 8, 9, 40, 41])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_brought_is_whole(numbers: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 4 numbers, of memory that is another's at once. Fails if a piece is missing, or a buffer is filled
    before it was copied; or if that happens to the next ones to be brought, which use the same buffers."""
    monkeypatch.setattr(queues, "PIECE", 16)
    late, found = LateQueues(seed), []
    for first in (0, 1000):
        x = torch.arange(first, first + 2 * numbers, dtype=torch.float32).view(2, numbers).t()
        found.append((late.bring(x), x.clone()))
        x.zero_()
    while late.step():
        pass
    assert all(y.equal(x) and y.shape == x.shape for y, x in found)


def test_small_things_are_brought_from_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the caller waits for all that the device was told before."""
    log: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: "copying")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (log.append("pinned"), x)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **how: (log.append((device, how)), x)[1])
    device = torch.device("cuda", 1)
    Queues(device).bring(torch.ones(3))
    assert log == ["pinned", (device, {"non_blocking": True})]


class Cuda:
    """Stands in for torch.cuda: who waits for whom, and in which stream."""

    def __init__(self) -> None:
        self.current, self.log = "computing", list[str]()
        self.events = 0

    def Stream(self, _device: torch.device) -> str:
        return "copying"

    def stream(self, stream: str) -> Cuda._In:
        return Cuda._In(self, stream)

    def device(self, _device: torch.device) -> Cuda._In:
        return Cuda._In(self, self.current)

    def Event(self, *, enable_timing: bool) -> Cuda._Event:
        self.events += 1
        return Cuda._Event(self, self.events)

    class _In:
        def __init__(self, cuda: Cuda, stream: str) -> None:
            self._cuda, self._stream, self._before = cuda, stream, cuda.current

        def __enter__(self) -> None:
            self._cuda.current = self._stream

        def __exit__(self, *_: object) -> None:
            self._cuda.current = self._before

    class _Event:
        def __init__(self, cuda: Cuda, number: int) -> None:
            self._cuda, self._number = cuda, number

        def record(self) -> None:
            self._cuda.log.append(f"{self._cuda.current} records {self._number}")

        def wait(self) -> None:
            self._cuda.log.append(f"{self._cuda.current} waits for {self._number}")

        def synchronize(self) -> None:
            self._cuda.log.append(f"the caller waits for {self._number}")


def test_a_gpu_is_told_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an event is recorded in, or waited for by, another stream than the one that it is about."""
    cuda = Cuda()
    for name in ("Stream", "stream", "device", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    queues = Queues(torch.device("cuda", 1))
    first = queues.compute(lambda: cuda.log.append("computes"), ())
    copied = queues.copy(torch.zeros(1), torch.ones(1), [first])
    queues.compute(lambda: cuda.log.append("computes more"), [copied])
    copied.wait()
    assert cuda.log == [
        "computing records 1", "computes", "computing records 2",
        "copying waits for 2", "copying records 3", "copying records 4",
        "computing waits for 4", "computing records 5", "computes more", "computing records 6",
        "the caller waits for 4",
    ]  # fmt: skip
