"""The accelerator over the Triton kernels: the VRAM tier's own tests, with kernels that a GPU would run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from localmoe.errors import ResourceError
from localmoe.experts.file import File
from localmoe.experts.layout import Layout
from localmoe.experts.paged import PagedExperts
from localmoe.experts.policies import POLICIES
from localmoe.experts.ram import RamTier
from localmoe.experts.residency import Residency
from localmoe.experts.resident import Expert, ResidentExperts
from localmoe.experts.slots import TorchSlots
from localmoe.experts.vram import SPARE, VramTier
from localmoe.loader import load_model
from localmoe.memory import SlotMemory
from localmoe.models.family import expert_names
from localmoe.quantize import convert
from localmoe.quantize.recipe import KEEP, simple
from tests.late_queues import LateQueues
from tests.tiny_v4 import PUBLISHED_DIMS, random_state, tiny_config, write_published
from tests.triton_kernels import DEVICE, HAS_GPU

# isort: split
from localmoe.experts import accelerator, queues
from localmoe.experts.accelerator import TritonAccelerator

CONFIG = tiny_config(**PUBLISHED_DIMS | {"n_routed_experts": 5, "num_experts_per_tok": 2})
LAYERS, EXPERTS, LIMIT = 6, 5, 10.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    state = random_state(CONFIG)
    found = {
        "fp4": write_published(folder / "fp4", CONFIG, state, shards=2),
        "f32": write_published(folder / "f32", CONFIG, state, quantized=False, shards=1),
    }
    for name in ("int8", "int4", "nf4", "int2"):
        found[name] = folder / name
        convert.convert(found["fp4"], found[name], simple(name, KEEP, 32))
    return found


def pager_of(path: Path, ram: int, vram: int) -> tuple[PagedExperts, VramTier]:
    loaded = load_model(path, torch.float32, experts="paged")
    assert loaded.layout is not None
    layout: Layout = loaded.layout
    memory = SlotMemory(ram, layout.slot_bytes)
    cpu = TorchSlots(memory, layout.kinds, LIMIT, torch.float32)

    def table(slots: int) -> Residency:
        return Residency(slots, LAYERS, EXPERTS, POLICIES["aged"](LAYERS * EXPERTS))

    def open_file(number: int) -> File:
        return File(layout.files[number], *loaded.files[layout.files[number]])

    device = TritonAccelerator(layout, memory, vram + SPARE, DEVICE, limit=LIMIT, exact=True)
    tier = VramTier(device, table(vram))
    return PagedExperts(
        RamTier(layout, memory, table(ram), cpu, open_file), cpu, vram=dict.fromkeys(range(LAYERS), tier)
    ), tier


def layout_of(path: Path) -> Layout:
    layout = load_model(path, torch.float32, experts="paged").layout
    assert layout is not None
    return layout


class Current:
    """Stands in for torch.cuda.device and torch.cuda.Event: what was done while which device was the current one."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.done: list[tuple[str, torch.device | None]] = []

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    def event(self, **_: bool) -> SimpleNamespace:
        return SimpleNamespace(record=lambda: self.note("event"))

    def note(self, what: str) -> None:
        self.done.append((what, self.device))


def experts_of(path: Path, layer: int) -> list[Expert]:
    model = load_model(path, torch.float32, experts="resident")
    names = (expert_names(model.config, layer, expert) for expert in range(EXPERTS))
    return [Expert(*map(model.weights.get, each), LIMIT) for each in names]


@pytest.mark.parametrize("name", ["fp4", "f32", "int8", "int4", "nf4"])
def test_experts_are_computed_from_their_slots(name: str, models: dict[str, Path]) -> None:
    """Fails if a matrix or its scales are looked for at another place of a slot, or after it moved."""
    pager, tier = pager_of(models[name], 7, 6)
    draw = torch.Generator().manual_seed(1)
    layers = {layer: ResidentExperts([experts_of(models[name], layer)]) for layer in (0, 3)}
    for _ in range(14):
        ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:2] for _ in range(3)])
        hidden, weights = (
            torch.randn(3, PUBLISHED_DIMS["hidden_size"], generator=draw),
            torch.rand(3, 2, generator=draw),
        )
        for layer, plain in layers.items():
            found: Tensor = pager.apply(layer, hidden, ids, weights)
            expected = plain.apply(0, hidden, ids, weights)
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
        pager.check()
    assert pager.stats.vram_hits > 10
    assert tier.costs.seconds("accelerator", 1) or tier.costs.seconds("accelerator", 2)
    pager.close()


@pytest.mark.parametrize("name", ["fp4", "f32"])
def test_experts_lie_in_the_pieces_that_are_left(name: str, models: dict[str, Path]) -> None:
    """Slots in three allocations, of which one is given back. Fails if an expert is looked for in another, or what it
    held has not been moved."""
    pager, tier = pager_of(models[name], 12, 12)
    draw = torch.Generator().manual_seed(1)
    layers = {layer: ResidentExperts([experts_of(models[name], layer)]) for layer in range(3)}
    last = list[int]()

    def go(steps: int) -> None:
        for _ in range(steps):
            ids, x = torch.randperm(EXPERTS, generator=draw)[None, :2], torch.randn(1, 128, generator=draw)
            for layer, plain in layers.items():
                found, expected = (source.apply(at, x, ids, torch.ones(1, 2)) for source, at in
                                   ((pager, layer), (plain, 0)))  # fmt: skip
                assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
        held = [key for key in range(LAYERS * EXPERTS) if tier.holds(key)]
        last[:] = tier.slots(held).values()

    assert tier.accelerator.slots == 20 and tier.accelerator.part == 4
    go(14)
    assert max(last) >= 16
    assert pager.give_back() and tier.accelerator.slots == 16
    hits = pager.stats.vram_hits
    go(5)
    assert max(last) < 16 and pager.stats.vram_hits > hits
    pager.check()
    # What is left is for what is on its way.
    assert not pager.give_back()
    pager.close()


@pytest.mark.skipif(HAS_GPU, reason="a GPU has queues of its own")
@pytest.mark.parametrize("name", ["fp4", "f32"])
def test_experts_pass_through_late(name: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices that are not meant, tokens without any, and more tokens than are computed at once. Fails if one is
    computed for another, or from bytes that are not there yet."""
    monkeypatch.setattr(accelerator, "_ROWS", 3)
    layout, layer, plain = layout_of(models[name]), 3, ResidentExperts([experts_of(models[name], 3)])
    memory = SlotMemory(EXPERTS, layout.slot_bytes)
    files = load_model(models[name], torch.float32, experts="paged").files
    for expert in range(EXPERTS):
        for part in layout.place(layer, expert).ranges:
            file = File(layout.files[part.file], *files[layout.files[part.file]])
            file.read(memory.view(expert)[part.at : part.at + part.nbytes], part.offset, part.needed)
    draw = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:2] for _ in range(7)])
    hidden = torch.randn(7, PUBLISHED_DIMS["hidden_size"], generator=draw)
    weights = torch.rand(7, 2, generator=draw)
    meant = ids.clone()
    meant[::2, 1] = -1
    meant[4] = -1
    expected = plain.apply(0, hidden, ids, weights * (meant >= 0))
    for seed in range(3):
        device = TritonAccelerator(layout, memory, 4, DEVICE, limit=LIMIT, exact=True)
        monkeypatch.setattr(device, "_queues", LateQueues(seed))
        device.load(0, 3)
        passing = device.stream(layer, [2, 0, 1], hidden, meant, weights)
        passing.held({0: 3})
        for expert in range(1, EXPERTS):
            passing.put(expert, expert)
        found = passing.wait()
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max() and not found[4].any()


def test_launches_and_events_are_on_the_device_that_has_the_slots(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two GPUs that are not there. Fails if a kernel or an event goes to the current one."""
    layout, second, current = layout_of(models["f32"]), torch.device("cuda", 1), Current()
    device = TritonAccelerator(layout, SlotMemory(1, layout.slot_bytes), 1, torch.device("cpu"), limit=LIMIT)

    def launch(_table: object, x: Tensor, *_rest: Tensor, exact: bool) -> Tensor:
        current.note("experts")
        return torch.zeros_like(x)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device", current.on)
        patch.setattr(torch.cuda, "Event", current.event)
        patch.setattr(device._queues, "bring", lambda tensor: tensor)
        patch.setattr(accelerator, "experts", launch)
        patch.setattr(device, "_device", second)
        device.load(0, 0)
        device.begin(0, {0: 0}, torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    assert current.done == [(what, second) for what in ("event", "event", "event", "experts", "event")]
    assert current.device is None


@pytest.mark.skipif(HAS_GPU, reason="a GPU has a clock of its own")
def test_a_copy_is_timed_alone(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is 1 s later. Fails if a copy that no layer asked for is part of a layer's time."""
    pager, tier = pager_of(models["f32"], 7, 6)
    monkeypatch.setattr(queues, "time", SimpleNamespace(perf_counter=count().__next__))
    draw = torch.Generator().manual_seed(2)
    for step in range(40):
        ids = torch.randperm(EXPERTS, generator=draw)[None, :2]
        pager.apply(step % 2, torch.randn(1, PUBLISHED_DIMS["hidden_size"], generator=draw), ids, torch.ones(1, 2))
    assert pager.stats.copies
    assert tier.costs.seconds("copy", 1) == 1.0
    pager.close()


def test_formats_without_a_kernel_are_refused_at_once(models: dict[str, Path]) -> None:
    """Fails if the first step does, after a load of minutes."""
    layout = layout_of(models["int2"])
    with pytest.raises(ResourceError, match="book2, which is computed on the CPU only"):
        TritonAccelerator(layout, SlotMemory(1, layout.slot_bytes), 1, DEVICE, limit=LIMIT)
