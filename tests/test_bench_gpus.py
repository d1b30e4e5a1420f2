"""Whole-model rows of GPUs: where experts are, what is launched, and the limit. GPUs are simulated, or the Triton
kernels are interpreted on the CPU; nothing here is a time of a GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from localmoe import gpus
from localmoe.bench import endtoend, gpu_subject, shapes, synthetic
from localmoe.bench.endtoend import Trial
from localmoe.bench.on_gpus import OnGpus, Using
from localmoe.bench.subject import Computing, Subject
from localmoe.cli.main import main
from localmoe.errors import ResourceError
from localmoe.experts.carried import CarriedExperts
from localmoe.experts.vram import SPARE
from localmoe.models.tensors import is_routed
from localmoe.spread import CPU, Gpu
from tests.fake_accelerator import FakeAccelerator
from tests.simulated_devices import SIMULATED, simulated
from tests.tiny_v4 import PUBLISHED_DIMS, tiny_config
from tests.triton_kernels import DEVICE, HAS_GPU

# isort: split
from localmoe.experts.accelerator import TritonAccelerator
from localmoe.kernels.triton.ops import TritonOps

A, B, _ = SIMULATED
INTERPRETED = DEVICE if HAS_GPU else torch.device("cpu", 0)
PLENTY = 1 << 40
TORCH = Computing(torch.float32, None)
FEW = {"n_routed_experts": 24, "num_experts_per_tok": 2, "num_hash_layers": 1, "hc_sinkhorn_iters": 2}
TINY = tiny_config(**PUBLISHED_DIMS | FEW | {"compress_ratios": [0, 4, 128]})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape with 24 experts in each of three layers."""
    monkeypatch.setitem(shapes.CONFIGS, "small", TINY)
    return "small"


def silent(_doing: str) -> None: ...


def fake(layout: Any, host: Any, slots: int, _device: torch.device, *, limit: float) -> FakeAccelerator:
    return FakeAccelerator(slots, layout, host, limit, seconds=1e-7, copy_seconds=1e-7)


def using(*devices: torch.device, **changes: Any) -> Using:
    found = tuple(Gpu(device, PLENTY) for device in devices)
    return replace(Using(found, None, fake, dict.fromkeys(devices, 1e9), warm_up=6), **changes)


def made_up(name: str, how: Using, computing: Computing = TORCH) -> Subject:
    config = shapes.published(name)
    return gpu_subject.open_synthetic(name, config, computing, how, 64, silent)


def there(subject: Subject) -> OnGpus:
    assert subject.gpus is not None
    return subject.gpus


@pytest.mark.parametrize("weights", [None, "fp8_block", "int4_g32", "nf4"])
def test_a_made_up_model_is_on_gpus_whole(small: str, weights: str | None) -> None:
    """Fails if an expert is left in RAM, or a row says otherwise than where the model is."""
    with simulated():
        subject = made_up(small, using(A, B), replace(TORCH, matrices=weights))
        [row] = endtoend.run(subject, [Trial(0, 2, 0)], 2, silent)
    experts = subject.engine.model.experts
    assert isinstance(experts, CarriedExperts) and experts.source is None
    assert (row["device"], row["resident_percent"], row["gpu_hit_percent"]) == (f"{A},{B}", 100, None)
    config = shapes.published(small)
    held = synthetic.bytes_held(config, replace(TORCH, matrices=weights).held)
    assert row["model_bytes"] == sum(held.values())
    # Both copy at 1 GB/s, and RAM gives rows of tables only.
    assert row["percent_of_limit"] == pytest.approx(
        100 * row["weight_bytes_per_token"] / 1e9 * row["tokens_per_s"], rel=0.01
    )


@pytest.mark.parametrize(("part", "most"), [(0.7, 51), (0.85, 62)])
def test_a_part_of_the_experts_is_cached(small: str, part: float, most: int) -> None:
    """Fails if a GPU holds more than it may, RAM lacks an expert, or what is cached is never used."""
    with simulated():
        subject = made_up(small, using(A).holding(part))
        rows = list(endtoend.run(subject, [Trial(3, 0, 0), Trial(0, 3, 0)], 2, silent))
    cache = there(subject).cache
    assert cache is not None
    # An expert takes a slot, which is larger than it is; some slots are for what is on its way.
    slots = 72 * there(subject).resident
    layout = cache._ram.layout
    bytes_ = part * 72 * layout.expert_bytes
    assert slots == bytes_ // layout.slot_bytes - SPARE and 0 < slots < most
    assert cache.stats.misses == cache.stats.first == 72 and cache.capacity == 72
    assert [row["resident_percent"] for row in rows] == [pytest.approx(100 * slots / 72)] * 2
    assert 0 < rows[1]["gpu_hit_percent"] < 100
    config = shapes.published(small)
    routed = {n: nbytes for n, nbytes in synthetic.bytes_held(config, TORCH.held).items() if is_routed(n)}
    assert there(subject).cached == {A: pytest.approx(sum(routed.values()) * 2 / 24)}
    whole = sum(there(subject).read.values()) + sum(there(subject).cached.values())
    assert subject.bytes_per_token == pytest.approx(whole, abs=1)
    cache.check()
    cache.close()


def test_gpus_without_room_for_experts_hold_none(small: str) -> None:
    with simulated():
        subject = made_up(small, using(A).holding(0))
        [row] = endtoend.run(subject, [Trial(0, 1, 0)], 1, silent)
    assert row["resident_percent"] == 0 and row["device"] == str(A) and row["gpu_hit_percent"] == 0
    cache = there(subject).cache
    assert cache is not None
    cache.close()


def test_what_is_made_up_is_computed_alike_wherever_it_is(small: str) -> None:
    """Fails if bytes that are read as a file are others than those a GPU was given."""
    ids = endtoend.trace(5, shapes.published(small).vocab_size)
    with simulated():
        found = []
        for part in (1, 0.5):
            subject = made_up(small, using(A).holding(part))
            session = subject.engine.new_session()
            found += [subject.engine.advance([(session, ids)], all_logits=True).logits]
        assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()
    assert found[0].std() > 0


def test_a_model_directory_is_measured_on_gpus() -> None:
    """Fails if a directory is measured otherwise than it is loaded, or other bytes are counted than are held."""
    with simulated():
        subject = gpu_subject.open_directory(None, TORCH, using(A), 64, silent)
        [row] = endtoend.run(subject, [Trial(0, 2, 0)], 1, silent)
        assert {site.device for site in subject.engine.model.sites} == {A}
    assert row["model"] == "localmoe-mini" and row["resident_percent"] == 100
    # Scales of FP8 are held in float32, and counted as they are stored.
    assert row["weight_bytes_per_token"] == pytest.approx(_on_the_cpu().bytes_per_token, rel=1e-4)
    assert row["model_bytes"] == pytest.approx(_on_the_cpu().nbytes, rel=1e-4)


@functools.cache
def _on_the_cpu() -> Subject:
    from localmoe.bench.subject import open_directory

    return open_directory(None, TORCH, silent)


def test_every_repetition_takes_tokens_that_caches_have_not_seen(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a cache is measured with tokens that it was filled with."""
    taken: list[tuple[int, tuple[int, ...]]] = []
    advance = endtoend.advance

    def record(engine: Any, session: Any, chunk: list[int]) -> None:
        taken.append((session.length, tuple(chunk)))
        advance(engine, session, chunk)

    with simulated():
        subject = made_up(small, using(A, warm_up=2).holding(0.5))
        monkeypatch.setattr(endtoend, "advance", record)
        list(endtoend.run(subject, [Trial(0, 2, 1)], 2, silent))
    ids = endtoend.trace(7, subject.engine.model.config.vocab_size)
    filling, context, *others = taken[:2], taken[2], *taken[3:]
    assert [at for at, _ in filling] == [0, 1] and context == (0, (ids[0],))
    assert others == [(1 + i % 2, (ids[1 + i],)) for i in range(6)] + [(1, (ids[1],))]
    cache = there(subject).cache
    assert cache is not None
    cache.close()


def test_ram_must_hold_what_gpus_do_not(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if made-up experts are measured as if a disk gave them in no time."""
    monkeypatch.setattr(gpu_subject, "available_memory", lambda: 72 * 28671)
    with simulated(), pytest.raises(ResourceError, match=r"72 experts .* need .* GiB of RAM.* lower --layers"):
        made_up(small, using(A).holding(0.5))


def bound(**changes: Any) -> OnGpus:
    given = OnGpus("cuda:0", 1000, 1.0, {A: 600.0, CPU: 0.5}, {}, False, (), using(A), None)
    return replace(given, **changes)


def test_the_least_time_of_a_token() -> None:
    """Fails if a bound is given where there is none, or devices that work at the same time are added up."""
    two = using(A, rates={A: 100.0, B: 50.0})
    assert bound(using=two).least_seconds(None, None) == 6
    assert bound(using=two, read={A: 600.0, B: 100.0}).least_seconds(None, None) == 8
    assert bound(using=two, read={A: 600.0, CPU: 100.0}).least_seconds(None, None) is None
    assert bound(using=two, read={A: 600.0, CPU: 100.0}).least_seconds(None, 25.0) == 10
    cached = bound(using=two, read={A: 600.0}, cached={A: 400.0})
    assert cached.least_seconds(None, 25.0) is None and cached.least_seconds(0.5, None) is None
    assert cached.least_seconds(0.5, 25.0) == 6 + max(200 / 100, 200 / 25)
    assert cached.least_seconds(1.0, 25.0) == 6 + 4
    assert replace(cached, cpu_experts=True).least_seconds(0.5, 25.0) is None


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """--device cuda:0 is Triton's interpreter."""
    if not HAS_GPU:
        monkeypatch.setattr(gpus, "find", lambda device, vram: [Gpu(INTERPRETED, PLENTY)])
    made = functools.partial(TritonAccelerator, exact=True)
    monkeypatch.setattr(gpus, "kernels_for", lambda found, kernels: (TritonOps(exact=True), made))
    monkeypatch.setattr("localmoe.bench.hardware.copy_rate", lambda _device: 1e9)
    yield


@pytest.mark.usefixtures("interpreted")
def test_the_command_measures_every_part(small: str, capsys: Any) -> None:
    """The whole way with our kernels, whole layers and caches. Fails if a row lacks a field, or the parts are one."""
    arguments = ["--synthetic", small, "--layers", "1", "--weights", "fp8_block", "-p", "0", "-n", "1", "-r", "1"]
    more = ["--resident", "100,95", "--warm-up", "1", "-o", "jsonl", "--device", "cuda:0"]
    assert main(["bench", *arguments, *more]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    whole, half = (json.loads(line) for line in out.splitlines())
    assert whole.keys() == half.keys() and whole["test"] == "tg1"
    assert whole["resident_percent"] == 100 > half["resident_percent"] > 0
    assert whole["device"] == half["device"] == str(INTERPRETED)
    assert whole["gpu_hit_percent"] is None and half["gpu_hit_percent"] is not None
    # Of one layer: its products, norms, attention and streams; three of experts where all are on the GPU.
    assert whole["triton_launches_per_token"] > half["triton_launches_per_token"] - 4 > 10
    assert whole["percent_of_limit"] > 0 and whole["gpu_copy_bytes_per_s"] > 0
    assert HAS_GPU or whole["launches_per_token"] is whole["gpu_kernels_per_token"] is None


@pytest.mark.usefixtures("interpreted")
def test_the_table_of_gpus(small: str, capsys: Any) -> None:
    arguments = ["--synthetic", small, "--layers", "1", "--experts", "24", "-p", "1", "-n", "0", "-r", "1"]
    assert main(["bench", *arguments, "--device", "cuda"]) == 0
    header, _rule, row = capsys.readouterr().out.splitlines()
    titles, cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, row))
    shown = dict(zip(titles, cells, strict=True))
    assert shown["device"] == str(INTERPRETED) and shown["experts on GPU %"] == "100.0"
    assert shown["launches/token"] == "-" == shown["% of limit"]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("wanted", [True, False])
def test_why_there_are_no_graphs(small: str, wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Once, after the rows. Fails if steps that are told to a GPU anew are taken for graphs, or prompts should be."""
    monkeypatch.setattr(gpus, "kernels_for", lambda found, kernels: (None, None))
    arguments = ["--synthetic", small, "--layers", "1", "--experts", "24", "-p", "1", "-n", "1,2", "-r", "1"]
    graphs = [] if wanted else ["--no-graphs"]
    monkeypatch.setattr("localmoe.cli.bench.warn", lambda _kernels: None)
    assert main(["bench", *arguments, "--device", "cuda", "-o", "jsonl", *graphs]) == 0
    out, err = capsys.readouterr()
    notice = "no CUDA graphs: PyTorch computes instead of our kernels; every step is told to the GPU anew, which takes "
    assert err == (f"localmoe: warning: {notice}longer\n" if wanted else "")
    notices = {row["test"]: row["graphs_notice"] for row in map(json.loads, out.splitlines())}
    assert notices == {"pp1": None} | dict.fromkeys(("tg1", "tg2"), f"{notice}longer" if wanted else None)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--resident", "50"], "--vram, --resident, --warm-up and --graphs are about GPUs; they need --device cuda"),
        (["--no-graphs"], "are about GPUs; they need --device cuda"),
        (["--graphs"], "are about GPUs; they need --device cuda"),
        (["--graphs", "--device", "cuda", "--kernels", "reference"], "kernels=reference computes in PyTorch"),
        (["--vram", "8GB"], "they need --device cuda"),
        (["--device", "cuda", "--resident", "50,120"], "--resident is '50,120', expected percents from 0 to 100"),
        (["--device", "cuda", "--resident", "half"], "expected percents from 0 to 100, for example 100,50,10"),
        (["--device", "tpu"], "device is tpu, expected cpu, cuda"),
        (["--device", "cuda", "-d", "4000"], "pp512 @ d4000 needs a context of 4512 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], problem: str, capsys: Any) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and problem in err and err.count("\n") == 1
