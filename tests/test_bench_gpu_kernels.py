"""A GPU's kernels in numbers: bytes, operations, and who is timed. Triton is interpreted; nothing here is a time of a
GPU."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import pytest
import torch

from localmoe import gpus
from localmoe.bench import bank, gpu_bank, gpu_kernels, hardware, shapes
from localmoe.bench.bank import expert_bytes, matrix_bytes
from localmoe.bench.gpu_bank import GPU_FORMATS, Attention, attentions, dense_shapes, expert_table, rotated
from localmoe.bench.gpu_kernels import Limits
from localmoe.bench.measure import Spread
from localmoe.bench.shapes import ExpertShape
from localmoe.cli.main import main
from localmoe.spread import Gpu
from tests.tiny_v4 import PUBLISHED_DIMS, tiny_config
from tests.triton_kernels import DEVICE, HAS_GPU

# isort: split
from localmoe.kernels.triton.ops import TritonOps

SHAPE = ExpertShape(256, 128, 2, 8)
OPS = TritonOps()
LIMITS = Limits(1e9, 1e12)


def bench(repetitions: int = 3) -> gpu_kernels._Bench:
    return gpu_kernels._Bench(DEVICE, OPS, LIMITS, repetitions)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "WORKING_SET", 1 << 19)
    monkeypatch.setattr(gpu_bank, "_ROTATED_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_kernels, "_CALLS", 2)
    monkeypatch.setattr(gpu_kernels, "_BUDGET_S", 0.0)


def test_every_format_of_the_kernels_is_measured() -> None:
    assert GPU_FORMATS == ("fp4", "int4", "int8", "fp8_block", "bf16", "nf4")


@pytest.mark.parametrize("format", GPU_FORMATS)
def test_what_is_made_up_is_as_large_as_its_format_and_finite(format: str) -> None:
    """Fails if a kernel would be timed on NaN, read scales that are not there, or find experts in one place."""
    table = expert_table(SHAPE, format, 6, DEVICE)
    x = torch.randn(3, 256).to(DEVICE)
    ids = torch.tensor([[0, 5], [1, 2], [3, 4]], device=DEVICE)
    y = OPS.experts(table, x, ids, torch.full((3, 2), 0.5, device=DEVICE))
    assert y.isfinite().all() and 0.01 < float(y.std()) < 100
    assert len(set(table.data_at[0].tolist())) == 6
    held = sum(m.data.nbytes + (0 if m.scale is m.data else m.scale.nbytes) for m in (table.w1, table.w2, table.w3))
    assert held == 6 * expert_bytes(SHAPE, format)
    matrices = rotated(format, (128, 256), DEVICE)
    assert len(matrices) == max(-(-(1 << 16) // sum(matrix_bytes(format, 128, 256))), 2)
    spread = [float(OPS.linear(x, matrix).std()) for matrix in matrices[:2]]
    assert spread[0] != spread[1] and all(0.1 < s < 10 for s in spread)


def test_experts_are_measured_with_few_and_many_tokens() -> None:
    """Fails if bytes of experts that nobody chose are counted, or a call is taken for all calls."""
    few, many = bench().experts(SHAPE, "fp4", [2, 16])
    one = expert_bytes(SHAPE, "fp4")
    assert (few["bytes"], many["bytes"]) == (2 * one, 8 * one)
    assert few["percent_of_copy"] == pytest.approx(100 * 2 * one / few["seconds"] / 1e9)
    operations = 2 * 16 * 3 * 256 * 128 * 2
    assert many["percent_of_product"] == pytest.approx(100 * operations / many["seconds"] / 1e12)
    assert len(few["samples_seconds"]) == 3 and few["times_triton"] == 1


def test_a_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if several calls between two waits are taken for one, or torch's two bytes of a weight for ours."""
    spread = Spread((2.0,))
    monkeypatch.setattr(gpu_kernels, "interleaved", lambda works, **_: dict.fromkeys(works, spread))
    ours, torch_, many, _ = [row for row in bench().linear("head", "fp4", (64, 128), [1, 16])]
    assert (ours["seconds"], many["seconds"]) == (1.0, 2.0)
    assert (ours["bytes_per_s"], torch_["bytes_per_s"]) == (64 * 128 // 2 + 64 * 4, 2 * 64 * 128)
    assert ours["flops_per_s"] == 2 * 64 * 128 and ours["percent_of_copy"] == pytest.approx(100 * 4352 / 1e9)


def test_bitsandbytes_is_timed_in_turn_where_it_can_compute() -> None:
    """Fails if it is left out for nf4, or asked for what it has no kernel for."""
    nf4 = list(bench().linear("head", "nf4", (64, 128), [1, 9]))
    installed = ["bitsandbytes"] if importlib.util.find_spec("bitsandbytes") else []
    assert [row["by"] for row in nf4] == ["triton", *installed, "torch bf16"] * 2
    assert [row["tokens"] for row in nf4] == [1] * (2 + len(installed)) + [9] * (2 + len(installed))
    assert nf4[0]["bytes"] == sum(matrix_bytes("nf4", 64, 128)) and nf4[-1]["bytes"] == 2 * 64 * 128
    assert nf4[0]["times_triton"] == 1
    assert nf4[1]["times_triton"] == pytest.approx(nf4[0]["seconds"] / nf4[1]["seconds"])
    int8 = bench().linear("head", "int8", (64, 128), [1])
    assert [row["by"] for row in int8] == ["triton", "torch bf16"]


@pytest.mark.parametrize(
    "what",
    [
        Attention("latent", 4, 80, 64, 0, 256),
        Attention("hca", 4, 64, 64, 16, 32),
        Attention("csa", 4, 64, 64, 16, 8),
        Attention("index", 4, 32, 0, 0, 64),
    ],
    ids=lambda what: what.kind,
)
def test_attention_is_measured(what: Attention) -> None:
    """Fails if a kernel is called otherwise than layers call it."""
    rows = list(bench().attention(what, [1, 3]))
    assert [row["op"] for row in rows] == [f"{what.kind} attention"] * 2
    assert all(row["seconds"] > 0 for row in rows)


def test_work_of_attention() -> None:
    """By hand. Fails if keys that are shared count for each query, or those chosen for each do not."""
    assert Attention("latent", 2, 80, 64, 0, 100).work(3) == (2 * 100 * 80, 2 * 3 * 2 * 100 * (80 + 64))
    assert Attention("csa", 2, 64, 64, 16, 8).work(3) == (2 * (16 + 8 * 3) * 64, 2 * 3 * 2 * 24 * 128)
    assert Attention("index", 2, 32, 0, 0, 100).work(3) == (2 * 100 * 32, 2 * 3 * 2 * 100 * 32)


def test_shapes_are_the_published_ones() -> None:
    assert dense_shapes("v4-flash") == {"shared": (2048, 4096), "attention": (32768, 1024), "head": (129280, 4096)}
    assert dense_shapes("v3") == {"shared": (2048, 7168), "attention": (7168, 16384), "head": (129280, 7168)}
    [latent] = attentions("v3")
    assert latent == Attention("latent", 128, 576, 512, 0, 131_072)
    assert [a.kind for a in attentions("v4-pro")] == ["hca", "csa", "index"]
    assert attentions("v4-pro")[1].entries == 1024


def test_the_device_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the limit would be a rate of something else, or be given without having waited."""
    assert hardware.copy_rate(DEVICE, 1 << 20) > 0
    assert hardware.product_rate(DEVICE, 64) > 0
    monkeypatch.setattr(hardware, "rates", lambda work, amount, repetitions: type("S", (), {"median": amount}))
    assert (hardware.copy_rate(DEVICE, 100), hardware.product_rate(DEVICE, 8)) == (200, 1024)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.EXPERT_SHAPES, "tiny", SHAPE)
    config = tiny_config(**PUBLISHED_DIMS | {"compress_ratios": [0, 4, 128], "vocab_size": 160})
    monkeypatch.setitem(shapes.CONFIGS, "tiny", config)
    monkeypatch.setattr(gpu_bank, "CONTEXT", 512)
    monkeypatch.setattr(gpu_kernels, "MAX_QUERIES", 8)
    monkeypatch.setattr(bank, "WORKING_SET", 1 << 17)
    monkeypatch.setattr(Limits, "of", lambda _device: LIMITS)
    if not HAS_GPU:
        monkeypatch.setattr(gpus, "find", lambda device, vram: [Gpu(DEVICE, 1 << 40)])


@pytest.mark.usefixtures("interpreted")
def test_the_command(capsys: Any) -> None:
    """Fails if an operation is left out, or rows differ in their fields."""
    arguments = ["--shapes", "tiny", "--formats", "bf16", "--tokens", "1", "-r", "1", "-o", "jsonl"]
    assert main(["bench", "kernels", *arguments, "--device", "cuda:0"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ops = ["hca attention", "csa attention", "index attention"]
    assert list(dict.fromkeys(row["op"] for row in rows)) == [*ops, "experts", "shared", "attention", "head"]
    assert len({tuple(row) for row in rows}) == 1
    assert {row["tokens"] for row in rows if row["op"] in ops} == {1}
    assert {row["format"] for row in rows if row["op"] == "experts"} == {"bf16"}
    assert all(math.isfinite(row["percent_of_copy"]) and row["percent_of_product"] > 0 for row in rows)


@pytest.mark.usefixtures("interpreted")
def test_the_table(capsys: Any) -> None:
    arguments = ["--shapes", "tiny", "--formats", "bf16", "--tokens", "1", "-r", "1", "--device", "cuda:0"]
    assert main(["bench", "kernels", *arguments]) == 0
    header, _rule, *rows = capsys.readouterr().out.splitlines()
    titles = [cell.strip() for cell in header.split("|")[1:-1]]
    assert {"GB/s", "% of copy", "TFLOP/s", "% of product"} <= set(titles) and len(rows) == 3 + 1 + 3 * 2


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--formats", "book3"], "--formats does not know 'book3', only fp4, int4, int8, fp8_block, bf16, nf4"),
        (["--threads", "2"], "threads belong to the CPU's kernels"),
    ],
)
def test_what_gpus_do_not_have_is_refused(arguments: list[str], problem: str, capsys: Any) -> None:
    assert main(["bench", "kernels", "--device", "cuda", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_kernels_are_measured_on_one_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpus, "find", lambda device, vram: [Gpu(DEVICE, 1)] * 2)
    assert main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "2 GPUs are found, kernels are measured on one" in capsys.readouterr().err
