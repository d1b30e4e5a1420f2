"""Layers of many tokens, whose experts pass through an accelerator: each once, and what the CPU does is as it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import ReadError
from localmoe.experts import passage
from localmoe.experts.flow import STREAMED_TOKENS
from localmoe.experts.policies import POLICIES
from localmoe.experts.policy import PolicyName
from localmoe.experts.split import load_of
from localmoe.experts.vram import SPARE
from tests.late_queues import LateQueues
from tests.test_vram import CONFIG, EXPERTS, LAYERS, Machine, run, steps
from tests.tiny_v4 import random_state, write_published

MANY = STREAMED_TOKENS
LOAD = load_of(MANY * 3, EXPERTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("model"), CONFIG, random_state(CONFIG), shards=2)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


def know(machine: Machine, cpu: float, passing: float, accelerator: float, stage: float) -> None:
    """Costs as if they had been measured often."""
    for work, seconds in (("cpu", cpu), ("pass", passing), ("accelerator", accelerator), ("stage", stage)):
        machine.vram.costs.note(work, LOAD, 1, seconds)  # type: ignore[arg-type]


@settings(max_examples=12, deadline=None)
@given(
    ram=st.integers(2, 40),
    vram=st.integers(1, 30),
    copy_seconds=st.sampled_from([0.01, 1.0, 100.0]),
    policy=st.sampled_from(sorted(POLICIES)),
    tokens=st.sampled_from([1, MANY - 1, MANY, 3 * MANY]),
)
def test_results_do_not_depend_on_where_experts_are(
    model: Path, ram: int, vram: int, copy_seconds: float, policy: PolicyName, tokens: int
) -> None:
    """Prompts and single tokens in turn. Fails if an expert is computed twice, not at all, or from other bytes."""
    machine, plain = Machine(model, ram, vram, policy, copy_seconds), Machine(model, LAYERS * EXPERTS, 1)
    work = [*steps(2, tokens=tokens), *steps(2, seed=1), *steps(2, seed=2, tokens=tokens), *steps(2, seed=3)]
    for layers, expected in zip(run(machine.pager, work), run(plain.pager, work), strict=True):
        assert close(layers, expected)
    stats = machine.pager.stats
    assert stats.hits + stats.misses + stats.vram_hits == sum(len(ids.unique()) for _, ids, _ in work) * LAYERS
    machine.pager.close()
    plain.pager.close()


@pytest.mark.parametrize(("ram", "vram"), [(2, 1), (5, 6), (LAYERS * EXPERTS, 20), (30, 24)])
def test_each_expert_crosses_once_for_a_step(model: Path, ram: int, vram: int) -> None:
    """Fails if one crosses again for other tokens, or one that is there crosses too, or the CPU computes it as well."""
    machine = Machine(model, ram, vram)
    for work in steps(6, tokens=2 * MANY):
        machine.accelerator.passed.clear()
        by_cpu, before = machine.cpu.now, machine.pager.stats
        run(machine.pager, [work])
        computed, cpu = Counter(machine.accelerator.passed), machine.cpu.now - by_cpu
        assert set(computed.values()) <= {1}
        assert len(computed) + cpu == LAYERS * EXPERTS
        stats = machine.pager.stats - before
        assert len(computed) == stats.copies + stats.vram_hits
    machine.pager.close()


def test_the_first_time_most_pass_and_everything_is_measured(model: Path) -> None:
    """Fails if costs are never known, because the CPU, or the accelerator, is given nothing."""
    machine = Machine(model, LAYERS * EXPERTS, 1)
    run(machine.pager, steps(1, tokens=MANY))
    costs = machine.vram.costs
    assert [costs.seconds(work, LOAD) for work in ("cpu", "pass", "stage")] == [1.0, 1.0, 0.0]  # type: ignore[arg-type]
    # What lay there was computed there.
    assert costs.seconds("accelerator", LOAD) == pytest.approx(0.1)
    machine.pager.close()


@pytest.mark.parametrize(("passing", "by_cpu"), [(0.001, 0), (1.0, 5), (100.0, 9)])
def test_both_end_together(model: Path, passing: float, by_cpu: int) -> None:
    """The CPU takes 1 s. Fails if one is left waiting while the other has more than it should."""
    machine = Machine(model, LAYERS * EXPERTS, 1, copy_seconds=passing)
    know(machine, 1.0, passing, 0.1, 0.0)
    hidden, ids, weights = steps(1, tokens=MANY)[0]
    machine.pager.apply(0, hidden, ids, weights)
    assert machine.cpu.now == by_cpu
    machine.pager.close()


@pytest.mark.parametrize("passing", [0, 1, 3, EXPERTS])
def test_odd_numbers(model: Path, passing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None pass, fewer than there are slots, all. Fails if so many do not."""
    machine, plain = Machine(model, LAYERS * EXPERTS, 20), Machine(model, LAYERS * EXPERTS, 1)
    work = steps(1, tokens=MANY)
    monkeypatch.setattr(machine.vram.costs, "through", lambda *_: passing)
    for found, expected in zip(run(machine.pager, work), run(plain.pager, work), strict=True):
        assert close(found, expected)
    assert machine.pager.stats.copies == passing * LAYERS
    machine.pager.close()
    plain.pager.close()


@pytest.mark.parametrize(("passing", "slots", "which"), [(3, 3, [2, 5, 8]), (2, 2, [4, 8]), (9, SPARE, list(range(9)))])
def test_those_that_pass_are_spread_over_all_the_slots_there_are(
    model: Path, passing: int, slots: int, which: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one waits for another's slot while others are empty, or the CPU has nothing to do at one end."""
    machine = Machine(model, LAYERS * EXPERTS, 1)
    lent, stream = list[int](), machine.accelerator.stream

    def noted(layer: int, ring: list[int], *rest: torch.Tensor) -> passage.Passage:
        lent.append(len(ring))
        return stream(layer, ring, *rest)

    monkeypatch.setattr(machine.vram.costs, "through", lambda *_: passing)
    monkeypatch.setattr(machine.accelerator, "stream", noted)
    machine.pager.apply(0, *steps(1, tokens=MANY)[0])
    assert lent == [slots] and [expert for _, expert in machine.accelerator.passed] == which
    machine.pager.close()


def test_what_it_took_is_shared_by_all_that_it_was_for(model: Path) -> None:
    """The device takes 0.1 s for each, there or passing. Fails if times of some are taken for those of others."""
    machine = Machine(model, LAYERS * EXPERTS, 20, copy_seconds=2.0)
    run(machine.pager, steps(9, tokens=MANY))
    costs = machine.vram.costs
    known = {work: seconds for (work, load), seconds in costs._seconds.items() if load == LOAD}
    assert len(known) == len(costs._seconds)
    assert known == pytest.approx({"cpu": 1.0, "pass": 2.0, "stage": 0.0, "accelerator": 0.1})
    machine.pager.close()


def test_nothing_passes_where_all_are_there(model: Path) -> None:
    """All fit in VRAM. Fails if what is used does not get there, or is copied although it is there."""
    machine = Machine(model, LAYERS * EXPERTS, LAYERS * EXPERTS)
    run(machine.pager, steps(8, tokens=MANY))
    before, cpu = machine.pager.stats, machine.cpu.now
    plain = Machine(model, LAYERS * EXPERTS, 1)
    work = steps(1, seed=4, tokens=MANY)
    for found, expected in zip(run(machine.pager, work), run(plain.pager, work), strict=True):
        assert close(found, expected)
    stats = machine.pager.stats - before
    assert (stats.copies, stats.vram_hits, machine.cpu.now - cpu) == (0, LAYERS * EXPERTS, 0)
    machine.pager.close()
    plain.pager.close()


@pytest.mark.parametrize("where", ["cpu", "stage", "device", "held"])
def test_an_error_leaves_the_tiers_as_they_were(model: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an interrupted layer keeps pins or slots, or the device still writes to what is another's by then."""
    machine = Machine(model, 12, 6, policy="aged", copy_seconds=0.01)
    run(machine.pager, [*steps(4, tokens=MANY), *steps(6)])

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    broken = {
        "cpu": (machine.cpu, "add"),
        "stage": (machine.accelerator, "place"),
        "device": (LateQueues, "copy"),
        "held": (passage.Passage, "held"),
    }
    for hidden, ids, weights in steps(12, seed=5, tokens=MANY):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*broken[where], fail)
            patch.setattr(machine.vram.costs, "through", lambda _load, _held, others: others // 2)
            for layer in range(LAYERS):
                machine.pager.apply(layer, hidden, ids, weights)
        machine.pager.check()
        # Where nothing has been sent yet, there is nothing to wait for.
        assert where == "held" or not machine.accelerator.queues.step()
        assert not machine.vram._table._pins
        assert not machine.pager._ram.residency._pins
        assert sorted([*machine.vram._spare, *machine.vram._slot.values()]) == list(range(6 + SPARE))
    plain, work = Machine(model, LAYERS * EXPERTS, 1), [*steps(3, tokens=MANY), *steps(3)]
    for found, expected in zip(run(machine.pager, work), run(plain.pager, work), strict=True):
        assert close(found, expected)
    machine.pager.close()
    plain.pager.close()


def test_an_expert_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a layer. Fails if it is not read again."""
    machine, plain = Machine(model, 4, 2), Machine(model, LAYERS * EXPERTS, 1)
    work, wait, asked = steps(1, tokens=MANY), machine.pager._ram.reader.wait, []

    def torn(job: object) -> None:
        wait(job)  # type: ignore[arg-type]
        asked.append(job)
        if len(asked) == 5:
            raise ReadError("torn")

    with monkeypatch.context() as patch:
        patch.setattr(machine.pager._ram.reader, "wait", torn)
        with pytest.raises(ReadError, match="torn"):
            run(machine.pager, work)
    machine.pager.check()
    for found, expected in zip(run(machine.pager, work), run(plain.pager, work), strict=True):
        assert close(found, expected)
    machine.pager.close()
    plain.pager.close()


def test_vram_is_filled_by_prompts(model: Path) -> None:
    """Fails if it stays empty until something is decoded, or one layer takes all of it."""
    machine = Machine(model, LAYERS * EXPERTS, 4 * LAYERS)
    run(machine.pager, steps(6, tokens=MANY))
    held = [key // EXPERTS for key in range(LAYERS * EXPERTS) if machine.vram.holds(key)]
    assert len(held) == 4 * LAYERS and set(held) == set(range(LAYERS))
    machine.pager.close()
