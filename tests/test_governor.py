"""Slots come and go with the memory there is, and results do not change with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from localmoe import backend
from localmoe.engine import Engine
from localmoe.errors import ResourceError
from localmoe.experts import governor as module
from localmoe.experts.governor import Governor, Room
from localmoe.experts.paged import PagedExperts
from localmoe.experts.paging import Paging
from localmoe.pager import open_model
from tests.tiny_engine import run, token_ids
from tests.tiny_v4 import PUBLISHED_DIMS, random_state, tiny_config, write_published

SLOT = 1 << 20


class Machine:
    """What the governor is told of the memory. Time passes with every question."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, available: int | None, resident: int) -> None:
        self.available, self.resident, self.now = available, resident, 0.0
        monkeypatch.setattr(module, "available_memory", lambda: self.available)
        monkeypatch.setattr(module, "resident_memory", lambda: self.resident)
        monkeypatch.setattr(module, "total_memory", lambda: 1000 * SLOT)
        monkeypatch.setattr(module.time, "monotonic", self._tick)

    def _tick(self) -> float:
        self.now += 1.0
        return self.now


def work(tokens: int) -> int:
    return 5 * SLOT + tokens * SLOT // 10


def test_memory_is_given_back_when_others_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the machine would swap before a slot is given up, or slots come back without room for them."""
    machine = Machine(monkeypatch, 1000 * SLOT, 100 * SLOT)
    governor = Governor(Room(500 * SLOT, work(1)), SLOT, 50, work)
    assert governor.wish(50) == 50
    # Half of what is left to others: 128 MiB of the reserve of 256.
    machine.available = 120 * SLOT
    assert governor.wish(50) == 42
    assert governor.wish(42) == 34
    machine.available = 140 * SLOT
    assert governor.wish(34) == 39
    machine.available = 1000 * SLOT
    assert governor.wish(39) == 50


def test_the_budget_holds_whoever_took_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a KV cache that grows is not made room for."""
    machine = Machine(monkeypatch, None, 520 * SLOT)
    governor = Governor(Room(500 * SLOT, work(1)), SLOT, 50, work)
    assert governor.wish(50) == 22
    machine.resident = 5000 * SLOT
    assert governor.wish(22) == 1


def test_a_prompt_gets_its_memory_before_it_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if slots and the work of a long prompt are both in memory for a while, or slots return during it."""
    Machine(monkeypatch, 1000 * SLOT, 100 * SLOT)
    governor = Governor(Room(500 * SLOT, work(1)), SLOT, 50, work)
    governor.expect(101)
    assert governor.wish(50) == 40
    assert governor.wish(40) == 40
    governor.expect(1)
    assert governor.wish(40) == 50
    governor.expect(10**6)
    assert governor.wish(50) == 1


def test_a_prompt_gets_its_memory_from_fewer_slots_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if slots that a KV cache has taken already are thought to be free for the prompt."""
    machine = Machine(monkeypatch, None, 490 * SLOT)
    governor = Governor(Room(500 * SLOT, work(1)), SLOT, 50, work)
    governor.expect(101)
    # 500 less a 64th are left; 490 are taken, and the step takes 10 more.
    assert governor.wish(30) == 22
    machine.resident = 482 * SLOT
    assert governor.wish(22) == 22


def test_without_a_budget_a_prompt_takes_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, None, 100 * SLOT)
    governor = Governor(None, SLOT, 50, work)
    governor.expect(101)
    assert governor.wish(50) == 50


def test_too_little_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 1000 * SLOT, 100 * SLOT)
    # A 64th of the budget is taken by what the process does not see.
    assert Room(120 * SLOT, 10 * SLOT).slots(SLOT, 2) == 8
    with pytest.raises(ResourceError, match=r"2 experts need 0\.00 GiB, so 0\.01 GiB are missing; raise --ram"):
        Room(105 * SLOT, 10 * SLOT).slots(SLOT, 2)


def test_slots_that_come_and_go_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an expert is computed from memory that has been given back, or a chunk finds its slots pinned."""
    config = tiny_config(**PUBLISHED_DIMS | {"n_routed_experts": 9, "num_experts_per_tok": 3})
    path = write_published(tmp_path, config, random_state(config), shards=1)
    ids = token_ids(60)

    def logits(wishes: list[int] | None) -> tuple[torch.Tensor, list[int]]:
        engine = Engine(open_model(path, "tiny", Paging(slots=20), dtype=torch.float32, backend=backend.choose("auto")))
        paged = engine.model.experts
        assert isinstance(paged, PagedExperts)
        seen: list[int] = []
        if wishes is not None:
            governor = Governor(None, 1, 20, lambda tokens: tokens)

            def wish(capacity: int) -> int:
                seen.append(capacity)
                return wishes[len(seen) % len(wishes)]

            monkeypatch.setattr(governor, "wish", wish)
            monkeypatch.setattr(paged, "_governor", governor)
        session = engine.new_session()
        found = torch.cat([run(engine, ids[:40], chunk=20, session=session), run(engine, ids[40:], 1, session)])
        paged.check()
        paged.close()
        return found, seen

    expected, _ = logits(None)
    found, capacities = logits([20, 3, 11, 1, 20, 7])
    assert torch.equal(found, expected)
    assert {1, 20} <= set(capacities)
