"""The VRAM tier over a device that is not there: experts are in one place each, and the faster way is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe.experts.file import File
from localmoe.experts.flow import STREAMED_TOKENS
from localmoe.experts.layout import Layout
from localmoe.experts.paged import PagedExperts
from localmoe.experts.policies import POLICIES
from localmoe.experts.policy import PolicyName
from localmoe.experts.ram import RamTier
from localmoe.experts.residency import Asked, Residency
from localmoe.experts.resident import Expert, ResidentExperts
from localmoe.experts.slots import TorchSlots
from localmoe.experts.split import RECHECK
from localmoe.experts.vram import MOST_COPIES, SPARE, VramTier, only
from localmoe.loader import load_model
from localmoe.memory import SlotMemory
from tests.fake_accelerator import FakeAccelerator
from tests.tiny_v4 import PUBLISHED_DIMS, random_state, tiny_config, write_published

CONFIG = tiny_config(**PUBLISHED_DIMS | {"n_routed_experts": 9, "num_experts_per_tok": 3})
LAYERS, EXPERTS, LIMIT = 6, 9, 10.0


class CountedSlots(TorchSlots):
    """The CPU: a virtual second for each expert that it computes."""

    now = 0.0

    def add(self, layer: int, experts: list[int], *rest: Tensor) -> None:  # type: ignore[override]
        super().add(layer, experts, *rest)
        self.now += len(experts)


class Machine:
    """A pager over a model's files, with slots in RAM and in an accelerator."""

    def __init__(self, path: Path, ram: int, vram: int, policy: PolicyName = "lru", copy_seconds: float = 1.0) -> None:
        loaded = load_model(path, torch.float32, experts="paged")
        assert loaded.layout is not None
        layout: Layout = loaded.layout
        memory = SlotMemory(ram + 2, layout.slot_bytes)
        self.cpu = CountedSlots(memory, layout.kinds, LIMIT, torch.float32)

        def table(slots: int) -> Residency:
            return Residency(slots, LAYERS, EXPERTS, POLICIES[policy](LAYERS * EXPERTS))

        def open_file(number: int) -> File:
            return File(layout.files[number], *loaded.files[layout.files[number]])

        self.accelerator = FakeAccelerator(vram + SPARE, layout, memory, LIMIT, seconds=0.1, copy_seconds=copy_seconds)
        self.vram = VramTier(self.accelerator, table(vram), lambda: self.cpu.now)
        self.pager = PagedExperts(
            RamTier(layout, memory, table(ram), self.cpu, open_file),
            self.cpu,
            vram=dict.fromkeys(range(LAYERS), self.vram),
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("model"), CONFIG, random_state(CONFIG), shards=2)


def steps(count: int, seed: int = 0, tokens: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    """hidden, ids and weights of steps; what the experts are asked by every layer."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:3] for _ in range(tokens)])
        hidden = torch.randn(tokens, PUBLISHED_DIMS["hidden_size"], generator=draw)
        found.append((hidden, ids, torch.rand(tokens, 3, generator=draw)))
    return found


def run(pager: PagedExperts, work: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    found = []
    for hidden, ids, weights in work:
        pager.prepare(len(ids))
        found += [pager.apply(layer, hidden, ids, weights) for layer in range(LAYERS)]
        pager.check()
    return found


@settings(max_examples=12, deadline=None)
@given(
    ram=st.integers(2, 40),
    vram=st.integers(1, 30),
    copy_seconds=st.sampled_from([0.01, 1.0, 100.0]),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_results_do_not_depend_on_where_experts_are(
    model: Path, ram: int, vram: int, copy_seconds: float, policy: PolicyName
) -> None:
    """Fails if an expert is computed twice or not at all, or one tier computes from bytes of another's expert."""
    machine, plain = Machine(model, ram, vram, policy, copy_seconds), Machine(model, LAYERS * EXPERTS, 1)
    work = steps(12)
    for found, expected in zip(run(machine.pager, work), run(plain.pager, work), strict=True):
        # The two devices add up apart from each other, so in another order.
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    stats = machine.pager.stats
    assert stats.hits + stats.misses + stats.vram_hits == sum(len(ids.unique()) for _, ids, _ in work) * LAYERS
    assert sorted([*machine.vram._spare, *machine.vram._slot.values()]) == list(range(vram + SPARE))
    machine.pager.close()
    plain.pager.close()


def test_it_is_the_published_experts_that_are_computed(model: Path) -> None:
    """The same experts in memory, by the code that needs no tiers. Fails if both machines above are wrong alike."""
    machine = Machine(model, 10, 10)
    loaded = load_model(model, torch.float32, experts="resident")
    layer = [
        Expert(*(loaded.weights.get(f"layers.1.ffn.experts.{e}.{w}.weight") for w in ("w1", "w2", "w3")), LIMIT)
        for e in range(EXPERTS)
    ]
    for hidden, ids, weights in steps(9):
        found = machine.pager.apply(1, hidden, ids, weights)
        expected = ResidentExperts([layer]).apply(0, hidden, ids, weights)
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert machine.pager.stats.vram_hits
    machine.pager.close()


def test_experts_in_vram_need_no_ram(model: Path) -> None:
    """30 and 24 slots hold all 54 experts. Fails if an expert takes a slot of both tiers, or falls between them."""
    machine = Machine(model, 30, 24)
    run(machine.pager, steps(60, tokens=5))
    before = machine.pager.stats
    run(machine.pager, steps(40, seed=1, tokens=5))
    after = machine.pager.stats - before
    assert (after.misses, after.bytes_read) == (0, 0)
    assert after.vram_hits > 0
    machine.pager.close()


@pytest.mark.parametrize(("copy_seconds", "more"), [(0.01, "accelerator"), (100.0, "cpu")])
def test_the_faster_way_is_taken(model: Path, copy_seconds: float, more: str) -> None:
    """Fails if copies are made though the CPU is faster, or not made though they are cheap."""
    machine = Machine(model, LAYERS * EXPERTS, 4, copy_seconds=copy_seconds)
    run(machine.pager, steps(40, tokens=1))
    before, cpu = machine.pager.stats, machine.cpu.now
    run(machine.pager, steps(40, seed=1, tokens=1))
    copies, by_cpu = (machine.pager.stats - before).copies, machine.cpu.now - cpu
    if more == "accelerator":
        assert copies > by_cpu
    else:
        # Those that are made in order to measure again what a copy costs.
        assert copies <= 40 * LAYERS / RECHECK + 1
    machine.pager.close()


def test_a_change_of_speed_is_noticed(model: Path) -> None:
    """Fails if what was measured once decides for ever."""
    machine = Machine(model, LAYERS * EXPERTS, 4, copy_seconds=100.0)
    run(machine.pager, steps(40, tokens=1))
    machine.accelerator.copy_seconds = 0.01
    before = machine.pager.stats
    run(machine.pager, steps(500, seed=1, tokens=1))
    assert (machine.pager.stats - before).copies > 500
    machine.pager.close()


def test_a_copy_costs_what_it_took_itself(model: Path) -> None:
    """All copies take 2 s. Fails if those of experts that move up between layers are counted with a layer's own."""
    machine = Machine(model, LAYERS * EXPERTS, 4, policy="aged", copy_seconds=2.0)
    run(machine.pager, steps(60, tokens=1))
    assert machine.pager.stats.copies
    assert machine.vram.costs.seconds("copy", 1) == 2.0
    machine.pager.close()


def test_what_is_used_most_ends_up_in_vram(model: Path) -> None:
    """Copies never pay here. Fails if VRAM then stays empty, or is filled with what is hardly used."""
    machine = Machine(model, LAYERS * EXPERTS, 2 * LAYERS, policy="aged", copy_seconds=100.0)
    draw = torch.Generator().manual_seed(3)
    work = []
    for hidden, _ids, weights in steps(60, tokens=1):
        ids = torch.tensor([[0, 1, int(torch.randint(2, EXPERTS, (1,), generator=draw))]])
        work.append((hidden, ids, weights))
    run(machine.pager, work)
    held = [key for key in range(LAYERS * EXPERTS) if machine.vram.holds(key)]
    assert held == sorted(layer * EXPERTS + expert for layer in range(LAYERS) for expert in (0, 1))
    machine.pager.close()


def test_an_error_leaves_the_tiers_as_they_were(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an interrupted layer keeps its pins or spare slots, so that VRAM freezes bit by bit."""
    machine = Machine(model, 12, 6, copy_seconds=0.01)
    run(machine.pager, steps(10))
    add = machine.cpu.add
    for hidden, ids, weights in steps(30, seed=5):
        monkeypatch.setattr(machine.cpu, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            for layer in range(LAYERS):
                machine.pager.apply(layer, hidden, ids, weights)
        monkeypatch.setattr(machine.cpu, "add", add)
        machine.pager.check()
    assert not machine.vram._table._pins
    assert len(machine.vram._spare) + len(machine.vram._slot) == 6 + SPARE
    plain = Machine(model, LAYERS * EXPERTS, 1)
    for found, expected in zip(run(machine.pager, steps(5)), run(plain.pager, steps(5)), strict=True):
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    machine.pager.close()
    plain.pager.close()


def test_an_expert_that_is_not_to_stay_gives_its_slot_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot, whose expert is in use. Fails if each copy beside it takes a spare slot for ever."""
    machine = Machine(model, LAYERS * EXPERTS, 1)
    monkeypatch.setattr(machine.vram.costs, "copies", lambda *_: 9)
    hidden, _, weights = steps(1, tokens=1)[0]
    for _ in range(9):
        before = machine.vram.copies
        machine.pager.apply(0, hidden, torch.tensor([[0, 3, 5]]), weights)
        assert len(machine.vram._spare) == SPARE
    assert machine.vram.copies - before == 2
    machine.pager.close()


def test_few_are_copied_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the slots for what is on its way are all taken by one layer."""
    machine = Machine(model, LAYERS * EXPERTS, 1)
    monkeypatch.setattr(machine.vram.costs, "copies", lambda *_: 9)
    machine.pager.apply(0, *steps(1, tokens=9)[0])
    # All have been read by now.
    before = machine.vram.copies
    machine.pager.apply(0, *steps(1, tokens=9)[0])
    assert machine.vram.copies - before == MOST_COPIES
    machine.pager.close()


def test_the_policy_of_vram_learns_of_every_use(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one that follows the better of others never hears how they do."""
    machine = Machine(model, 30, 10)
    learnt: list[Asked] = []
    monkeypatch.setattr(machine.vram._table._policy, "learn", lambda _table, use: learnt.append(use))
    work = [*steps(2), *steps(1, tokens=STREAMED_TOKENS)]
    run(machine.pager, work)
    assert [use.layer for use in learnt] == [*range(LAYERS)] * 3
    assert [use.experts for use in learnt] == [ids.unique().tolist() for _, ids, _ in work for _ in range(LAYERS)]
    machine.pager.close()


def test_others_are_masked() -> None:
    ids = torch.tensor([[0, 5, 8], [-1, 2, 5]])
    assert only(ids, [5, 2], 9).tolist() == [[-1, 5, -1], [-1, 2, 5]]


def test_memory_is_given_back_with_the_experts_worth_least(model: Path) -> None:
    """Fails if an expert that stays is looked for where it was, one that goes is still asked for, or more slots are
    used than are left."""
    machine, work = Machine(model, ram=3, vram=7), steps(12)
    reference = run(Machine(model, ram=3, vram=7).pager, work)
    found = run(machine.pager, work[:6])
    held = [key for key in range(LAYERS * EXPERTS) if machine.vram.holds(key)]
    assert len(held) == 7
    for left in (5, 3, 1):
        assert machine.pager.give_back()
        machine.pager.check()
        kept = [key for key in held if machine.vram.holds(key)]
        assert len(kept) == left and machine.accelerator.slots == left + SPARE
        assert all(slot < machine.accelerator.slots for slot in machine.vram.slots(kept).values())
        held = kept
        # As after an interruption.
        machine.pager._torn = True
        machine.pager.check()
        assert machine.vram._table.capacity == left
    # An expert and what is on its way are the least.
    assert not machine.pager.give_back()
    found += run(machine.pager, work[6:])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, reference, strict=True))
    assert machine.accelerator.slots == 1 + SPARE
    machine.pager.close()
