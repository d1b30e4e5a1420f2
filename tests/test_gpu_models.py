"""Model directories on GPUs: what fits where, and that results are those of the CPU. GPUs are simulated, or the Triton
kernels are interpreted on the CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from localmoe import LLM, SamplingParams, gpus, loader
from localmoe.cuda_graphs import CudaRecorder
from localmoe.device import budget_for
from localmoe.engine import Engine
from localmoe.errors import ResourceError, UsageError
from localmoe.experts import governor
from localmoe.experts.carried import CarriedExperts
from localmoe.experts.paged import PagedExperts
from localmoe.experts.paging import Paging
from localmoe.experts.vram import SPARE, staging_bytes
from localmoe.loader import load_model, read_config
from localmoe.pager import open_model
from localmoe.spread import CPU, GPU_BASE_BYTES, Gpu, LayerBytes, Share, devices_of, spread
from localmoe.step_size import prefill_tokens
from tests.fake_accelerator import FakeAccelerator
from tests.simulated_devices import SIMULATED, simulated
from tests.tiny_engine import run, token_ids
from tests.tiny_mla import write_published_mla
from tests.tiny_v4 import CSA, HCA, PUBLISHED_DIMS, SLIDING, random_state, tiny_config, write_published
from tests.triton_kernels import DEVICE, HAS_GPU

# isort: split
from localmoe.kernels.triton.ops import TritonOps

A, B, _ = SIMULATED
# The interpreter's GPU: a name of the CPU that is not the CPU's own.
INTERPRETED = DEVICE if HAS_GPU else torch.device("cpu", 0)
# A layer of each kind. Two iterations of Sinkhorn's, as each takes the interpreter long.
FEW = {"n_routed_experts": 24, "num_experts_per_tok": 2, "num_hash_layers": 1, "hc_sinkhorn_iters": 2}
KINDS = {"layer_types": [SLIDING, CSA, HCA]}
CONFIG = tiny_config(**PUBLISHED_DIMS | FEW | KINDS)
# So many that a few slots, which are large beside such experts, do not hold all of a layer.
MANY = tiny_config(**PUBLISHED_DIMS | FEW | KINDS | {"n_routed_experts": 40})
IDS = token_ids(24)
PLENTY = 1 << 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "v4": write_published(folder / "v4", CONFIG, random_state(CONFIG), shards=2),
        "v4-many": write_published(folder / "v4-many", MANY, random_state(MANY), shards=2),
        "v2-lite": write_published_mla(folder / "v2-lite", "v2-lite", n_routed_experts=24),
    }


def opened(path: Path, *on: Gpu, paging: Paging | None = None, **options: Any) -> Engine:
    return Engine(open_model(path, "tiny", paging or Paging(), dtype=torch.float32, gpus=on, **options))


def fake(layout: Any, host: Any, slots: int, _device: torch.device, *, limit: float) -> FakeAccelerator:
    return FakeAccelerator(slots, layout, host, limit, seconds=1e-7, copy_seconds=1e-7)


@functools.cache
def taken(path: Path) -> tuple[int, int, int]:
    """Bytes of a GPU that nothing can be put in, of all layers without their experts, and of a slot."""
    with simulated():
        loaded = load_model(path, torch.float32, gpus=[Gpu(A, PLENTY)])
    layout = load_model(path, torch.float32, experts="paged").layout
    assert layout is not None and loaded.layout is None and loaded.shares[0].whole
    config = loaded.config
    fixed = GPU_BASE_BYTES + config.work.of(min(prefill_tokens(config.expert_weights), config.max_position_embeddings))
    return fixed, PLENTY - loaded.shares[0].left - fixed, layout.slot_bytes


def pager_of(engine: Engine) -> PagedExperts:
    experts = engine.model.experts
    assert isinstance(experts, CarriedExperts) and isinstance(experts.source, PagedExperts)
    return experts.source


def agrees(engine: Engine, cpu: Engine, limit: float, ids: list[int] = IDS) -> bool:
    """The same prompt, then single tokens."""
    there, here = engine.new_session(), cpu.new_session()
    chunks = ids[:-2], *([token] for token in ids[-2:])
    found = [run(engine, chunk, session=there) - run(cpu, chunk, session=here) for chunk in chunks]
    return max(float(difference.abs().max()) for difference in found) <= limit


@pytest.mark.parametrize("name", ["v4", "v2-lite"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_fits_is_on_gpus_whole(models: dict[str, Path], name: str, count: int) -> None:
    """Fails if an expert stays in RAM, or is taken for another."""
    with simulated():
        engine = opened(models[name], *(Gpu(device, PLENTY) for device in SIMULATED[:count]))
        experts = engine.model.experts
        assert isinstance(experts, CarriedExperts) and experts.source is None
        layers = engine.model.config.num_layers
        assert [site.device for site in engine.model.sites].count(A) == round(layers / count)
        assert agrees(engine, opened(models[name]), 1e-5)


@pytest.mark.parametrize("name", ["v4-many", "v2-lite"])
def test_experts_that_do_not_fit_are_cached(models: dict[str, Path], name: str) -> None:
    """Two GPUs with a few slots each. Fails if a GPU caches another's experts, or a hit gives other numbers."""
    made: list[FakeAccelerator] = []

    def keep(*given: Any, limit: float) -> FakeAccelerator:
        made.append(fake(*given, limit=limit))
        return made[-1]

    _fixed, _need, slot = taken(models[name])
    with simulated():
        alone = load_model(models[name], torch.float32, gpus=[Gpu(A, PLENTY), Gpu(B, PLENTY)], context=512).shares
    first, second = (Gpu(share.gpu.device, PLENTY - share.left + (SPARE + 3) * slot) for share in alone)
    with simulated():
        engine = opened(models[name], first, second, accelerate=keep, context=512)
        assert [site.device for site in engine.model.sites].count(CPU) == 0
        cpu = opened(models[name])
        assert all(agrees(engine, cpu, 1e-4) for _ in range(3))
    pager, layers = pager_of(engine), engine.model.config.num_layers
    pager.check()
    assert pager.stats.vram_hits > 0 and len(made) == 2
    dense = layers - engine.model.config.num_moe_layers
    on_a = {layer for layer, site in enumerate(engine.model.sites) if site.device == A}
    assert {layer + dense in on_a for layer, _ in made[0].computed} == {True}
    assert {layer + dense in on_a for layer, _ in made[1].computed} == {False}
    pager.close()


def test_ram_has_room_for_what_experts_cross_from(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if page-locked buffers come on top of the RAM that is given, or are set apart where nothing crosses."""
    _fixed, _need, slot = taken(models["v4-many"])
    for module in (governor, loader):
        monkeypatch.setattr(module, "resident_memory", lambda: 0)
    with simulated():
        [alone] = load_model(models["v4-many"], torch.float32, gpus=[Gpu(A, PLENTY)], context=8).shares
    work = read_config(models["v4-many"]).work

    def capacity(on_gpu: int, ram: int) -> int:
        """Slots in RAM, of so many on the GPU and so many bytes beside the work and 40 slots."""
        gpu = Gpu(A, PLENTY - alone.left + on_gpu * slot)
        paging = Paging(ram=budget_for(work.of(1) + 40 * slot + ram), guess=False)
        with simulated():
            engine = opened(models["v4-many"], gpu, paging=paging, accelerate=fake, context=8)
        pager = pager_of(engine)
        pager.close()
        return pager.capacity

    buffers = staging_bytes(slot)
    assert (capacity(SPARE, 0), capacity(SPARE + 1, buffers), capacity(SPARE + 1, buffers - 1)) == (40, 40, 39)


def test_ram_has_slots_for_the_experts_that_are_on_no_gpu(models: dict[str, Path]) -> None:
    """One GPU with all experts of its layers, one with none. Fails if RAM has slots that nobody will ask for."""
    with simulated():
        alone = load_model(models["v4"], torch.float32, gpus=[Gpu(A, PLENTY), Gpu(B, PLENTY)]).shares
        layout = load_model(models["v4"], torch.float32, experts="paged").layout
        assert layout is not None
        experts = len(range(alone[0].first, alone[0].stop)) * 24 * layout.expert_bytes
        sizes = (PLENTY - share.left + more for share, more in zip(alone, (experts, 0), strict=True))
        engine = opened(models["v4"], *(Gpu(device, size) for device, size in zip((A, B), sizes, strict=True)))
        assert agrees(engine, opened(models["v4"]), 1e-5)
    there = engine.model.experts
    assert isinstance(there, CarriedExperts) and there.layers_here == alone[0].stop
    assert pager_of(engine).capacity == (engine.model.config.num_layers - alone[0].stop) * 24
    pager_of(engine).close()


def test_layers_without_room_are_the_cpus(models: dict[str, Path]) -> None:
    """Fails if the end of the model is elsewhere than its last layer, or experts of a GPU's layers have no place."""
    fixed, need, _slot = taken(models["v4"])
    with simulated():
        engine = opened(models["v4"], Gpu(A, fixed + need * 3 // 4))
        devices = [site.device for site in engine.model.sites]
        assert devices[0] == A and devices[-1] == CPU and engine.model.norm.device == CPU
        assert agrees(engine, opened(models["v4"]), 1e-5)
    pager_of(engine).close()


@pytest.mark.parametrize("name", ["v4", "v2-lite"])
def test_triton_kernels_compute_a_model(models: dict[str, Path], name: str) -> None:
    """The whole way by the kernels that a GPU runs. Fails if one is given what it does not expect."""
    engine = opened(models[name], Gpu(INTERPRETED, PLENTY), gpu_ops=TritonOps(exact=True))
    assert agrees(engine, opened(models[name]), 2e-4, ids=IDS if HAS_GPU else IDS[:6])


@pytest.mark.parametrize("paging", [Paging(slots=4), Paging(trace=Path("trace")), Paging(pack=Path("pack"))])
def test_options_for_experts_elsewhere_have_no_effect(models: dict[str, Path], paging: Paging) -> None:
    """Fails if an option is accepted without effect."""
    with simulated(), pytest.raises(UsageError, match="some layers have all of theirs on GPUs; leave it out, or lower"):
        open_model(models["v4"], "tiny", paging, dtype=torch.float32, gpus=[Gpu(A, PLENTY)])


LAYERS = [LayerBytes(10, 5, 100)] * 8


def shares(*sizes: int, layers: list[LayerBytes] = LAYERS, last: int = 20) -> list[tuple[int, int, int, bool]]:
    gpus = [Gpu(torch.device("cuda", i), GPU_BASE_BYTES + 7 + size) for i, size in enumerate(sizes)]
    return [(s.first, s.stop, s.left, s.whole) for s in spread(layers, last, 7, gpus)]


def rated(*gpus: tuple[int, float]) -> list[tuple[int, int, int, int, bool]]:
    """Of bytes and rates: the number of the GPU, then as of shares()."""
    given = [Gpu(torch.device("cuda", i), GPU_BASE_BYTES + 7 + size, rate=rate) for i, (size, rate) in enumerate(gpus)]
    return [(s.gpu.device.index, s.first, s.stop, s.left, s.whole) for s in spread(LAYERS, 20, 7, given)]


def test_layers_are_spread_by_memory() -> None:
    """Fails if a GPU gets what it has no room for, or the last layer without what follows it."""
    assert shares(940) == [(0, 8, 800, True)]
    assert shares(939) == [(0, 8, 799, False)]
    assert shares(140) == [(0, 8, 0, False)]
    assert shares(139) == [(0, 7, 34, False)]
    assert shares(60, 500) == [(0, 4, 0, False), (4, 8, 420, True)]
    assert shares(30, 30) == [(0, 2, 0, False), (2, 4, 0, False)]
    assert shares(14, 200) == [(0, 8, 60, False)]
    assert shares(700, layers=[LayerBytes(10, 5, 0)] * 3 + LAYERS[:5]) == [(0, 8, 560, True)]
    # What fits goes to the fastest first, in the order of the layers; else by memory, however fast.
    assert rated((400, 1.0), (940, 2.0)) == [(1, 0, 8, 800, True)]
    assert rated((400, 1.0), (680, 2.0)) == [(1, 0, 5, 605, True), (0, 5, 8, 335, True)]
    assert rated((400, 2.0), (680, 1.0)) == [(0, 0, 3, 355, True), (1, 3, 8, 585, True)]
    # By memory, the first would have four.
    assert rated((400, 2.0), (680, 2.0)) == [(0, 0, 3, 355, True), (1, 3, 8, 585, True)]
    assert [share[:3] for share in rated((340, 1.0), (500, 2.0))] == [(0, 0, 4), (1, 4, 8)]
    with pytest.raises(ResourceError, match=r"cuda:0 may use 0.50 GiB and one layer needs 0.50; raise --vram"):
        shares(14)


def test_devices_of_layers() -> None:
    gpu = Gpu(A, 1)
    assert devices_of([Share(gpu, 1, 3, 0, False)], 4) == [CPU, A, A, CPU]


@pytest.mark.parametrize(
    ("device", "vram", "problem"),
    [
        ("tpu", None, "device is tpu, expected cpu, cuda"),
        ("cuda:0,cuda:00", None, "device is cuda:0,cuda:00, which names a GPU twice"),
        ("cuda,cuda:1", None, "expected cpu, cuda"),
        ("cpu", [1], "vram is given and device is cpu"),
        ("cuda", [1, 2, 3], "vram has 3 sizes, expected one, or one for each of 2 GPUs"),
    ],
)
def test_devices_that_make_no_sense(device: str, vram: list[int] | None, problem: str, two_gpus: None) -> None:
    with pytest.raises(UsageError, match=problem):
        gpus.find(device, vram)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 << device.index, 99))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    # Of an RTX 3090, 936 GB/s.
    properties = SimpleNamespace(memory_clock_rate=9_751_000, memory_bus_width=384)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_are_there() -> None:
    """Fails if a size goes to another GPU, or all of one's free memory is taken."""
    zero, one = torch.device("cuda", 0), torch.device("cuda", 1)
    assert gpus.find("cpu", None) == []

    def gpu(device: torch.device, nbytes: int) -> Gpu:
        return Gpu(device, nbytes, rate=936.096e9)

    assert gpus.find("cuda", None) == [gpu(zero, 15), gpu(one, 30)]
    assert gpus.find("cuda:1", None) == [gpu(one, 30)]
    assert gpus.find("cuda:1,cuda:0", [20, 10]) == [gpu(one, 20), gpu(zero, 10)]
    assert gpus.find("cuda", [9]) == [gpu(zero, 9), gpu(one, 9)]
    with pytest.raises(ResourceError, match="there are 2 GPUs, counted from 0"):
        gpus.find("cuda:2", None)
    with pytest.raises(ResourceError, match="are asked for; lower --vram"):
        gpus.find("cuda", [20])


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old")
    with pytest.raises(ResourceError, match="cuda:0 is Old, older than our kernels can use"):
        gpus.find("cuda", None)


@pytest.mark.usefixtures("two_gpus")
def test_graphs_are_made_where_there_are_gpus() -> None:
    """Fails if --no-graphs has no effect, or is accepted where it has none."""
    found = gpus.find("cuda", None)
    assert isinstance(gpus.recorder(found, True), CudaRecorder)
    assert isinstance(gpus.recorder(found, None), CudaRecorder)
    assert gpus.recorder(found, False) is None and gpus.recorder([], None) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"graphs": False}, "graphs are about GPUs, and none is used"),
        ({"graphs": True}, "graphs are about GPUs, and none is used"),
        ({"graphs": True, "device": "cuda", "kernels": "reference"}, "kernels=reference computes in PyTorch"),
        ({"graphs": True, "device": "cuda", "kv_format": "fp8"}, "no graph can be made with kv_format=fp8"),
    ],
)
def test_graphs_that_there_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    """Before a GPU is looked for. Fails if they are asked for, or refused, without effect."""
    with pytest.raises(UsageError, match=problem):
        LLM(**options)


def test_graphs_that_could_not_be_made_are_told_of() -> None:
    llm = LLM(kernels="reference")
    assert llm.graphs_notice is None
    llm.engine.decoder = SimpleNamespace(failed=None)  # type: ignore[assignment]
    assert llm.graphs_notice is None
    llm.engine.decoder = SimpleNamespace(failed="not today")  # type: ignore[assignment]
    assert llm.graphs_notice is not None and llm.graphs_notice.startswith("no CUDA graphs: not today; every step")
    llm.close()


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ResourceError, match="finds no GPU; see localmoe doctor"):
        gpus.find("cuda", None)


def test_the_embedded_model_on_gpus_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the API loses the devices on the way, or something between logits and text expects the CPU's tensors."""
    params = SamplingParams(temperature=0, max_tokens=30)
    expected = LLM(kernels="reference").generate("Once upon a time", params)[0].text
    monkeypatch.setattr(gpus, "find", lambda device, vram: [Gpu(A, PLENTY), Gpu(B, PLENTY)])
    with simulated():
        llm = LLM(kernels="reference", device="cuda")
        assert {site.device for site in llm.engine.model.sites} == {A, B}
        assert llm.generate("Once upon a time", params)[0].text == expected
        assert llm.graphs_notice is not None and "PyTorch computes instead of our kernels" in llm.graphs_notice
        assert llm.pager is None and llm.experts_held == llm.config.num_moe_layers * llm.config.num_experts
        llm.close()
        with pytest.raises(UsageError, match="observed on the CPU only"):
            LLM(kernels="reference", device="cuda", observer=lambda _name: None)
