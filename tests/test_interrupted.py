"""Steps that are interrupted anywhere: what has been read stays, no slot is lost, and the next step is right."""

from __future__ import annotations

import linecache
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import localmoe.experts
from localmoe.experts.file import File
from localmoe.experts.flow import STREAMED_TOKENS
from localmoe.experts.policy import PolicyName
from localmoe.experts.vram import SPARE
from tests.test_reader import SECONDS, within
from tests.test_vram import CONFIG, EXPERTS, LAYERS, Machine, run, steps
from tests.tiny_v4 import random_state, write_published

MODULES = "paged", "ram", "vram", "flow", "passage", "guesses", "residency", "reader", "split", "policy", "policies"
FILES = {str(Path(localmoe.experts.__file__).parent / f"{name}.py") for name in MODULES}


class Interruption:
    """Ctrl-C at the nth line of the tiers' own code. Without n: counts them."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.lines, self.where = at, 0, ""

    def during(self, work: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in FILES else None

    def _line(self, frame: FrameType, event: str, _arg: Any) -> Any:
        file, line = frame.f_code.co_filename, frame.f_lineno
        # Python itself has no interruption between the body of a with statement and its end.
        if event == "line" and not linecache.getline(file, line).lstrip().startswith("with "):
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{file}:{line}"
                raise KeyboardInterrupt
        return self._line


def steps_of_a_model(machine: Machine, seed: int) -> None:
    """A prompt, then a token; as a model asks for its experts."""
    for hidden, ids, weights in [*steps(1, seed, STREAMED_TOKENS + 9), *steps(1, seed + 1)]:
        machine.pager.prepare(len(ids))
        for layer in range(LAYERS):
            if layer + 1 < LAYERS and machine.pager.wants_guess(layer + 1):
                machine.pager.guess(layer + 1, ids)
            machine.pager.announce(layer, ids)
            machine.pager.apply(layer, hidden, ids, weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("model"), CONFIG, random_state(CONFIG), shards=2)


def complete(machine: Machine, ram: int, vram: int) -> None:
    """Nothing is in use between steps, and every slot is somewhere."""
    tier, table, guesses = machine.pager._ram, machine.vram, machine.pager._ram.guesses
    assert not table._table._pins and not tier.residency._pins
    assert sorted([*table._spare, *table._slot.values()]) == list(range(vram + SPARE))
    assert set(table._slot) == set(table._table.keys())
    assert (tier.residency.capacity, table._table.capacity) == (ram, vram)
    assert sorted([*tier._at, *guesses._spare, *(at for at, _ in guesses._read.values())]) == list(range(ram + 2))


@pytest.mark.parametrize(
    ("ram", "vram", "policy"), [(12, 6, "best"), (3, 1, "s3fifo"), (40, 30, "aged"), (9, 4, "lru")]
)
def test_an_interruption_anywhere_costs_no_slot_and_changes_no_number(
    model: Path, ram: int, vram: int, policy: PolicyName
) -> None:
    """Fails if what is half done is taken for done: wrong numbers in the next step, or one that waits for ever."""
    plain, work = Machine(model, LAYERS * EXPERTS, 1), [*steps(1, 50, STREAMED_TOKENS), *steps(2, 51)]
    expected, draw = run(plain.pager, work), random.Random(ram)
    machine = Machine(model, ram, vram, policy, copy_seconds=0.01)
    run(machine.pager, [*steps(1, 0, STREAMED_TOKENS), *steps(2)])
    whole = Interruption()
    whole.during(lambda: steps_of_a_model(machine, 9))
    assert whole.lines > 1000
    for _ in range(12):
        cut = Interruption(draw.randrange(1, whole.lines))
        cut.during(lambda cut=cut: steps_of_a_model(machine, 9))
        found: list[torch.Tensor] = within(lambda: run(machine.pager, work))
        for each, right in zip(found, expected, strict=True):
            assert (each - right).abs().max() <= 2e-5 * right.abs().max(), cut.where
        complete(machine, ram, vram)
    machine.pager.close()
    plain.pager.close()


def test_what_has_been_read_is_not_read_again(model: Path) -> None:
    """Fails if an interruption empties the tiers."""
    machine = Machine(model, 30, 24)
    run(machine.pager, steps(60, tokens=5))
    before = machine.pager.stats
    hidden, ids, weights = steps(1, tokens=5)[0]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(machine.cpu, "add", fail)
        for layer in range(LAYERS):
            machine.pager.apply(layer, hidden, ids, weights)
    run(machine.pager, steps(20, seed=1, tokens=5))
    assert (machine.pager.stats - before).misses <= 1
    machine.pager.close()


def fail(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def chosen(*experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, _, weights = steps(1, tokens=1)[0]
    return hidden, torch.tensor([experts]), weights[:, : len(experts)]


def test_what_was_written_over_is_not_taken_for_whole_later(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two interruptions: other bytes come to lie where an expert was, then it is asked for. Fails if it is thought to
    be there still."""
    machine, plain = Machine(model, 2, 1), Machine(model, LAYERS * EXPERTS, 1)
    machine.pager.apply(0, *chosen(0, 1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(machine.cpu, "put", fail)
        machine.pager.apply(0, *chosen(2, 3))
    machine.pager.check()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(machine.pager._ram.reader, "submit", fail)
        machine.pager.apply(0, *chosen(0, 1))
    found, right = (each.pager.apply(0, *chosen(0, 1)) for each in (machine, plain))
    assert (found - right).abs().max() <= 2e-5 * right.abs().max()
    machine.pager.close()
    plain.pager.close()


def test_an_expert_that_has_just_moved_up_is_in_one_tier(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted when VRAM has it and RAM does not know. Fails if it takes room in both."""
    machine = Machine(model, 30, 9)
    monkeypatch.setattr(machine.pager._ram, "exchange", fail)
    with pytest.raises(KeyboardInterrupt):
        run(machine.pager, steps(9))
    machine.pager.check()
    assert sum(machine.vram.holds(key) for key in range(LAYERS * EXPERTS)) == 1
    machine.pager.close()


def test_a_place_is_not_used_while_it_is_still_written_to(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what was being read when the step was interrupted comes to lie over another expert."""
    machine, gate, read = Machine(model, 3, 1), threading.Event(), File.read

    def late(file: File, *part: Any) -> None:
        assert gate.wait(SECONDS)
        read(file, *part)

    monkeypatch.setattr(File, "read", late)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(machine.pager._ram.reader, "wait", fail)
        machine.pager.apply(0, *chosen(0, 1))
    while not machine.pager._ram.reader._reading:
        pass
    threading.Timer(0.2, gate.set).start()
    within(machine.pager.check)
    assert gate.is_set()
    machine.pager.close()


def test_memory_that_was_given_back_stays_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an interruption takes it again, or the slots can never come back."""
    machine, given = Machine(model, 12, 1), list[int]()
    ram = machine.pager._ram
    run(machine.pager, steps(3))
    ram.resize(5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(machine.cpu, "add", fail)
        run(machine.pager, steps(3))
    monkeypatch.setattr(ram._memory, "give_back", given.append)
    machine.pager.check()
    assert ram.residency.capacity == 5
    assert sorted(given) == sorted(ram._at[slot] for slot in ram._taken) and len(given) == 7
    ram.resize(12)
    run(machine.pager, steps(9))
    complete(machine, 12, 1)
    machine.pager.close()


def test_a_step_that_ends_well_mends_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if guesses, and what is read early, are thrown away each time."""
    machine = Machine(model, 12, 6)
    monkeypatch.setattr(machine.pager._ram, "mend", fail)
    steps_of_a_model(machine, 3)
    machine.pager.close()
