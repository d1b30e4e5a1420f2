"""Calibrating and fitting models with multi-head latent attention: V3 in FP8, V2-Lite in bf16.

The importance matrix is compared with what goes into the matrices of a transformers model of the same values."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.backend import KernelChoice
from localmoe.checkpoint import Checkpoint
from localmoe.cli.main import main
from localmoe.formats import QuantizedTensor
from localmoe.loader import load_weights
from localmoe.matching import match
from localmoe.models import mla
from localmoe.models.family import config_of, expert_names, tensor_inventory
from localmoe.models.tensors import is_routed
from localmoe.quantize import convert, fit, imatrix
from localmoe.quantize.imatrix import Importance, kept_under
from localmoe.quantize.recipe import Recipe, read_text, simple
from localmoe.quantize.verify import verify
from tests.test_fit import memory_for, silent
from tests.test_imatrix import CHUNK, IDS, NATIVE, collected, text
from tests.tiny_mla import build_transformers, write_published_mla
from tests.tiny_tokenizer import tiny_description

MODELS = ["v3", "v2-lite"]
STORY = "a story about a brave frog, 12345 times; user Assistant think. " * 30


def published(folder: Path, name: str, **overrides: Any) -> Path:
    """With a tokenizer of as many tokens as the vocabulary has, and more experts than a text chooses."""
    path = write_published_mla(folder, name, shards=2, vocab_size=400, **overrides)
    (path / "tokenizer.json").write_text(json.dumps(tiny_description()))
    return path


def inputs_in_transformers(folder: Path) -> dict[str, tuple[Tensor, int]]:
    """Sums of squares and rows of what goes into each matrix, by the names that they are kept under."""
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    config, weights = config_of(raw), load_weights(folder, torch.float32)[1]
    state: dict[str, Tensor] = {}
    for name in tensor_inventory(config):
        value = weights.get(name)
        state[name] = value.dequantize() if isinstance(value, QuantizedTensor) else value.float()
    model, seen = build_transformers(raw, state), defaultdict[str, list[Tensor]](list)

    def of_experts(layer: int, x: Tensor, chosen: Tensor) -> None:
        for expert in range(config.num_experts):
            w1, w2, w3 = expert_names(config, layer, expert)
            rows = x[(chosen == expert).any(1)]
            if len(rows):
                seen[w1].append(rows)
                seen[w2].append(F.silu(rows @ state[w1].T) * (rows @ state[w3].T))

    moe_layers = iter(range(config.num_moe_layers))
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            layer = next(moe_layers)
            module.register_forward_pre_hook(lambda _, args, layer=layer: of_experts(layer, args[0], args[1]))
        elif kept_under(f"{name}.weight") == f"{name}.weight" and f"{name}.weight" in imatrix.columns(config):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen[f"{name}.weight"].append(args[0].flatten(0, -2))
            )
    with torch.no_grad():
        for at in range(0, len(IDS), CHUNK - 1):
            model(torch.tensor([[0, *IDS[at : at + CHUNK - 1]]]))
    squares = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return {name: (rows.square().sum(0), len(rows)) for name, rows in squares.items()}


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("kernels", [*NATIVE[:1], "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_transformers(
    name: str, kernels: KernelChoice, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a matrix is not seen, such as kv_b_proj where it is absorbed, or seen twice, or after rounding."""
    pytest.importorskip("transformers", reason="needs transformers")
    model = published(tmp_path / "model", name)
    monkeypatch.setattr(mla, "EXPAND_FROM", 1 if form == "expanded" else CHUNK + 1)
    found = collected(model, tmp_path / "out", text(), kernels, None if form == "absorbed" else 9)
    expected = inputs_in_transformers(model)
    # Of the head, which is not calibrated for, only rows that are asked for are computed.
    assert set(found.sums) - {"lm_head.weight"} == set(expected) - {"lm_head.weight"}
    for matrix, (total, count) in expected.items():
        if matrix != "lm_head.weight":
            assert found.counts[matrix] == count, matrix
            assert float((found.sums[matrix] - total).norm() / total.norm()) < 1e-4, matrix


@pytest.mark.parametrize("name", MODELS)
def test_what_matters_is_rounded_better(name: str, tmp_path: Path) -> None:
    """Error weighted with the inputs' own squares. Fails if rounding asks for it under names that V3 does not have."""
    model = published(tmp_path / "model", name)
    importance = Importance(collected(model, tmp_path / "im", text()))
    rules = simple("int4", "int4", 128)
    convert.convert(model, tmp_path / "plain", rules)
    convert.convert(model, tmp_path / "calibrated", rules, importance=importance)
    original, plain, calibrated = (
        load_weights(tmp_path / folder, torch.float32)[1] for folder in ("model", "plain", "calibrated")
    )
    errors: dict[str, list[float]] = defaultdict(list)
    for matrix in imatrix.columns(config_of(json.loads((model / "config.json").read_text()))):
        weight = importance.of(matrix)
        if not isinstance(plain.get(matrix), QuantizedTensor) or weight is None:
            continue
        before = original.get(matrix)
        values = before.dequantize() if isinstance(before, QuantizedTensor) else before.float()
        for folder, weights in (("plain", plain), ("calibrated", calibrated)):
            packed = weights.get(matrix)
            assert isinstance(packed, QuantizedTensor)
            errors[folder].append(float(((packed.dequantize() - values).square() * weight).sum()))
    assert len(errors["plain"]) > 20
    assert all(
        after <= before * (1 + 1e-6) for before, after in zip(errors["plain"], errors["calibrated"], strict=True)
    )
    assert sum(errors["calibrated"]) < 0.999 * sum(errors["plain"])


@pytest.mark.parametrize("name", MODELS)
def test_fit_is_what_is_written(name: str, tmp_path: Path) -> None:
    """Half of what can be saved, and all. Fails if MTP layers count, or a recipe finds more or less than experts."""
    model = published(tmp_path / "model", name)
    with Checkpoint.open(model) as checkpoint:
        raw = json.loads((model / "config.json").read_text())
        sources = match(config_of(raw), tensor_inventory(config_of(raw)), checkpoint)
        dense = sum(source.nbytes for matrix, source in sources.items() if not is_routed(matrix))
        whole = sum(source.nbytes for source in sources.values())
        least = fit.fit(checkpoint, memory_for(dense), None, silent)
        half = fit.fit(checkpoint, memory_for((least.nbytes + whole) // 2), None, silent)
        assert fit.fit(checkpoint, 1 << 40, None, silent).recipe == Recipe(())
    assert least.nbytes < half.nbytes <= half.budget
    assert 0 < half.error < least.error
    for number, found in enumerate((half, least)):
        assert read_text(found.recipe.text) == found.recipe
        out = tmp_path / f"out{number}"
        made = convert.convert(model, out, found.recipe)
        assert {row["class"] for row in made["classes"]} <= {
            f"model.layers.N.mlp.experts.N.{p}_proj.weight" for p in ("gate", "up", "down")
        }
        with Checkpoint.open(out) as checkpoint:
            sources = match(config_of(raw), tensor_inventory(config_of(raw)), checkpoint)
        assert sum(source.nbytes for source in sources.values()) == found.nbytes
    assert {row["format"] for row in made["classes"]} == {"book2"}
    verify(out)


@pytest.mark.parametrize("name", MODELS)
def test_the_commands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """From a text to a judged model. Fails if one of them asks for a name or a field that only V4 has."""
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "model", name)
    (tmp_path / "text").write_text(STORY)
    assert main(["imatrix", "model", "-f", "text", "-o", "im", "--chunk", "64", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    columns = imatrix.columns(config_of(json.loads((tmp_path / "model/config.json").read_text())))
    missed = {
        kept_under(f"{expert}.{part}_proj.weight") for expert in facts["missed_experts"] for part in ("gate", "down")
    }
    assert facts["matrices"] == len(columns) - len(missed)
    smallest = {"v3": "1.144GB", "v2-lite": "1.1451GB"}[name]
    assert main(["quantize", "model", "small", "--fit", smallest, "--calib", "im"]) == 0
    assert "w2 of" in capsys.readouterr().out
    # All of it fits: a copy, and no complaint of what was given for the case that it would not.
    assert main(["quantize", "model", "all", "--fit", "1TB", "--calib", "im", "--dry-run"]) == 0
    assert "this copies the model" in capsys.readouterr().err
    assert main(["quantize", "model", "copy"]) == 0
    assert main(["quantize", "model", "int4", "--experts", "int4", "--dense", "int8", "--calib", "im"]) == 0
    kl = {}
    for out in ("small", "copy", "int4"):
        assert main(["verify", out]) == 0
        capsys.readouterr()
        assert (
            main(["eval", out, "--against", "model", "-f", "text", "-n", "200", "--kernels", "reference", "--json"])
            == 0
        )
        kl[out] = json.loads(capsys.readouterr().out)["found"]["mean_kl"]
    assert kl["copy"] == 0 < kl["int4"] < kl["small"]
