"""What a step looks up before its layers are computed, and how it comes to devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.family import config_of
from localmoe.models.inputs import Inputs, Kept
from localmoe.site import Site
from localmoe.step import Step
from tests import tiny_v4
from tests.simulated_devices import SIMULATED, simulated, watched
from tests.torch_ops import TorchOps

A, B = SIMULATED[:2]


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with simulated():
        yield


def some(tokens: int, first: int = 0) -> Inputs:
    """Tables of two dtypes, of which none ends where the next may begin."""
    numbers = torch.arange(first, first + tokens)
    tables = {
        "positions": numbers,
        "angles": numbers[:, None] * torch.ones(3),
        "others": numbers + 100,
        "last": -numbers,
    }
    return Inputs(numbers[:, None] * torch.ones(5), tables)


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_tables_come_to_a_device_as_they_were(tokens: int) -> None:
    """With one copy for each dtype. Fails if a table is cut out of what was joined at another place."""
    inputs = some(tokens)
    with watched() as seen:
        there = inputs.at(A)
    assert seen.launches == ["to device"] * 2 and not seen.waits
    assert there.keys() == inputs.tables.keys()
    for name, table in inputs.tables.items():
        assert there[name].device == A and there[name].dtype == table.dtype
        assert torch.equal(there[name].cpu(), table)
        assert there[name].storage_offset() % 4 == 0
    assert inputs.at(torch.device("cpu")) is inputs.tables


def test_what_is_kept_stays_where_it_is() -> None:
    """Fails if another step's numbers are written elsewhere, or to one device only."""
    kept = Kept(some(3), [A, B])
    before = kept.hidden, kept.at(A), kept.at(B)
    kept.fill(some(3, first=7))
    assert (kept.hidden, kept.at(A), kept.at(B)) == before
    assert torch.equal(kept.hidden.cpu(), some(3, first=7).hidden)
    for device in (A, B):
        for name, table in some(3, first=7).tables.items():
            assert torch.equal(kept.at(device)[name].cpu(), table)


def v4(*sites: Site) -> DeepseekV4:
    config = tiny_v4.tiny_config()
    built = config_of(config)
    return DeepseekV4(built, tiny_v4.random_state(config).__getitem__, sites=sites * built.num_layers)


@pytest.mark.parametrize("site", [Site(), Site(A, ops=TorchOps())])
@torch.inference_mode()
def test_experts_that_token_ids_choose_are_looked_up_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Announced as they are computed. Fails if a layer looks them up for itself, or a step that begins does not."""
    model, looked_up, announced = v4(site), list[int](), list[tuple[int, torch.Tensor]]()

    def look_up(table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        looked_up.extend(i for i, each in enumerate(tables) if each is table)
        return get(table, at)

    def announce(layer: int, ids: torch.Tensor, *, early: bool = False) -> None:
        if early:
            announced.append((layer, ids))

    get, tables = torch.Tensor.__getitem__, [block.moe.router.tid2eid for block in model.blocks]
    hashed = [i for i, table in enumerate(tables) if table is not None]
    monkeypatch.setattr(torch.Tensor, "__getitem__", look_up)
    monkeypatch.setattr(model.experts, "announce", announce)
    step = Step.of([(model.new_state(), [5])])
    inputs = model.begin(step)
    model.compute(step, inputs)
    assert looked_up == hashed and hashed
    assert all(ids is inputs.tables[f"chosen.{layer}"] for layer, ids in announced)
    assert [layer for layer, _ in announced] == hashed


@torch.inference_mode()
def test_what_only_devices_read_is_looked_up_for_devices() -> None:
    """Fails if a step on the CPU, or of a prompt, pays for it."""

    def names(ids: list[int], site: Site) -> set[str]:
        model = v4(site)
        return set(model.begin(Step.of([(model.new_state(), ids)])).tables)

    always = names([1], Site())
    assert "slots" not in always and not any(name.startswith("first") for name in always)
    assert names([1, 2], Site(A, ops=TorchOps())) == always
    assert names([1], Site(A, ops=TorchOps())) > always
