"""Quantizing models with multi-head latent attention: FP8 with float32 scales as V3 has it, and bf16 as V2-Lite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.engine import Engine
from localmoe.errors import FormatError
from localmoe.experts.paging import Paging
from localmoe.pager import open_model
from localmoe.quantize import convert, recipe
from localmoe.quantize.imatrix import expert_of, kept_under
from localmoe.quantize.recipe import KEEP, simple
from localmoe.quantize.verify import verify
from tests.tiny_engine import run, token_ids
from tests.tiny_mla import write_published_mla

IDS = token_ids(40)


def logits(path: Path, slots: int | None = None) -> Tensor:
    return run(Engine(open_model(path, "tiny", Paging(slots=slots), dtype=torch.float32)), IDS)


@pytest.mark.parametrize("name", [name for name in recipe.WRITTEN if name.split("_")[0] != "int8"] + ["int8_g32"])
@pytest.mark.parametrize("model", ["v3", "v2-lite"])
def test_every_format_is_read_in_memory_and_paged(model: str, name: str, tmp_path: Path) -> None:
    """Fails if a matrix is found under another name than it was written under, or is rounded without its scale."""
    source = write_published_mla(tmp_path / "source", model)
    found = convert.convert(source, tmp_path / "out", simple(name, KEEP, 32))
    assert {row["class"].split(".")[-2] for row in found["classes"]} == {"gate_proj", "up_proj", "down_proj"}
    assert sum(row["tensors"] for row in found["classes"]) == 3 * 8 * (1 if model == "v3" else 2)
    verify(tmp_path / "out")
    whole, before = logits(tmp_path / "out"), logits(source)
    assert 0 < (whole - before).abs().mean() < before.abs().mean()
    assert torch.equal(logits(tmp_path / "out", 9), whole)


@pytest.mark.parametrize("model", ["v3", "v2-lite"])
def test_what_no_rule_names_keeps_its_bytes(model: str, tmp_path: Path) -> None:
    """Embedding, head, router and MTP layer. Fails if --dense would take one of them or miss a matrix of attention."""
    source = write_published_mla(tmp_path / "source", model)
    convert.convert(source, tmp_path / "out", simple("int4", "int8", 32))
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "out") as after:
        kept = [name for name in before.refs if name in after.refs]
        for name in kept:
            assert torch.equal(*(at.read(at.refs[name]).view(torch.uint8) for at in (before, after)))
        matrices = {name for name in kept if len(before.refs[name].shape) == 2}
    routers = {f"model.layers.{layer}.mlp.gate.weight" for layer in ((2,) if model == "v3" else (1, 2))}
    later = "model.layers.3.mlp.experts.0.up_proj.weight"
    # FP8 of the MTP layer, which --dense does not name, is all that is described without having been rounded.
    blocks = {"model.layers.3.mlp.experts.0.gate_proj.weight"} if model == "v3" else set()
    assert matrices == {"model.embed_tokens.weight", "lm_head.weight", later, *routers, *blocks}
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    matching = pytest.importorskip("compressed_tensors.utils.match", reason="compressed-tensors is not installed")
    targets = [target for group in quantization["config_groups"].values() for target in group["targets"]]
    linear = torch.nn.Linear(1, 1)
    for name in matrices:
        assert matching.is_match(name.removesuffix(".weight"), linear, targets) == (name in blocks), name
    assert matching.is_match("model.layers.0.self_attn.kv_b_proj", linear, targets)


def test_columns_that_no_group_divides_are_named(tmp_path: Path) -> None:
    """As 10944 of V2-Lite's first layer in groups of 128. Fails if the command would end in a half-made folder."""
    source = write_published_mla(tmp_path / "source", "v2-lite", intermediate_size=192)
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.down_proj\.weight has 192 columns"):
        convert.convert(source, tmp_path / "out", simple(KEEP, "int4", 128))
    assert not (tmp_path / "out").exists()


def test_gate_and_up_have_the_same_inputs() -> None:
    """Fails if up_proj would be rounded without what is known of gate_proj."""
    for prefix in ("model.layers.3.mlp.experts.7", "model.layers.3.mlp.shared_experts", "model.layers.0.mlp"):
        assert kept_under(f"{prefix}.up_proj.weight") == f"{prefix}.gate_proj.weight"
    assert expert_of("model.layers.3.mlp.experts.7.gate_proj.weight") == "model.layers.3.mlp.experts.7"
