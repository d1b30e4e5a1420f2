"""Loader: the same values as transformers' own loader, in every spelling of the names and every stored dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from localmoe.config import load_config
from localmoe.formats import FORMATS, QuantizedTensor
from localmoe.kernels.codecs import decode_e8m0
from localmoe.loader import Weights, load_weights
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_names import places, tensor_inventory
from localmoe.safetensors_io import write_safetensors
from tests.conftest import shared_data
from tests.tiny_v4 import (
    CSA,
    HCA,
    PUBLISHED_DIMS,
    SLIDING,
    build_transformers,
    published_tensors,
    random_state,
    rounded_state,
    tiny_config,
    to_transformers_state,
    write_model,
    write_published,
)

# One layer of each kind; the sliding one is hash-routed.
CONFIG = tiny_config(**PUBLISHED_DIMS | {"layer_types": [SLIDING, CSA, HCA], "num_hash_layers": 1})
STATE = random_state(CONFIG)
NAMES = tuple(STATE)
WQ_A, W1 = "layers.0.attn.wq_a", "layers.2.ffn.experts.1.w1"


def values(weights: Weights) -> dict[str, Tensor]:
    """Everything dequantized to float32."""
    found = {name: weights.get(name) for name in NAMES}
    return {name: w.dequantize() if isinstance(w, QuantizedTensor) else w for name, w in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "model", CONFIG, STATE)


def test_a_published_checkpoint_has_the_values_transformers_loads(published: Path) -> None:
    """Fails for swapped nibbles, misread scales, w1 and w3 exchanged, or a transposed block grid."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(published, dtype=torch.float32).float()
    ours = to_transformers_state(CONFIG, values(load_weights(published, torch.float32)[1]))
    assert_same(ours, dict(model.state_dict()))


def test_a_published_checkpoint_has_the_values_that_were_rounded(published: Path) -> None:
    """Fails if two tensors are exchanged; needs no transformers."""
    assert_same(values(load_weights(published, torch.float32)[1]), rounded_state(CONFIG, STATE))


@pytest.mark.parametrize("shards", [1, 3])
def test_any_number_of_shards_gives_the_same_values(tmp_path: Path, shards: int) -> None:
    """Fails if a weight and its scale must be in one file."""
    model = write_published(tmp_path, CONFIG, STATE, quantized=False, shards=shards)
    assert_same(values(load_weights(model, torch.float32)[1]), STATE)


def test_a_checkpoint_saved_by_transformers_loads(tmp_path: Path) -> None:
    """Fails for the mixture of names save_pretrained writes (attn.norm for kv_norm, model. before published names)."""
    pytest.importorskip("transformers")
    build_transformers(CONFIG, STATE).save_pretrained(tmp_path)
    config, weights = load_weights(tmp_path, torch.float32)
    assert_same(values(weights), STATE)
    plain = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    assert config == DeepseekV4Config.from_dict(plain)


def test_a_transformers_state_dict_loads(tmp_path: Path) -> None:
    """Fails if the stacked experts are cut at the wrong rows."""
    model = write_model(tmp_path, CONFIG, to_transformers_state(CONFIG, STATE))
    assert_same(values(load_weights(model, torch.float32)[1]), STATE)


def test_names_match_the_state_dict_of_transformers() -> None:
    """Fails if transformers has a tensor we do not know, or another shape for it."""
    pytest.importorskip("transformers")
    theirs = build_transformers(CONFIG, STATE).state_dict()
    assert {n: t.shape for n, t in theirs.items()} == {
        n: t.shape for n, t in to_transformers_state(CONFIG, STATE).items()
    }


def test_transformers_names_with_quantized_weights_load(tmp_path: Path) -> None:
    """Fails if a scale is only looked for under its published name."""
    config = DeepseekV4Config.from_dict(CONFIG)
    renamed = {}
    for name, tensor in published_tensors(CONFIG, STATE).items():
        base = name.removesuffix(".scale") + ".weight"
        place = places(config, name if name in STATE else base)
        # Stacks of quantized experts do not exist; those keep save_pretrained's names.
        to = place[2].name if place[1].stack else place[1].name
        renamed[to if name in STATE else f"{to}_scale_inv"] = tensor
    assert_same(
        values(load_weights(write_model(tmp_path, CONFIG, renamed), torch.float32)[1]), rounded_state(CONFIG, STATE)
    )


def test_fp8_with_float_scales_loads(tmp_path: Path) -> None:
    """Fails if scales of the Base checkpoints, float32 and not powers of two, are refused or rounded."""
    tensors = published_tensors(CONFIG, STATE)
    tensors["layers.0.attn.wq_a.scale"] = torch.full((1, 1), 0.3)
    weight = values(load_weights(write_model(tmp_path, CONFIG, tensors), torch.float32)[1])["layers.0.attn.wq_a.weight"]
    assert torch.equal(weight, tensors["layers.0.attn.wq_a.weight"].float() * 0.3)


def test_experts_in_fp8_load(tmp_path: Path) -> None:
    """Fails if the format comes from the config or the name instead of the tensor's dtype."""
    tensors, name = published_tensors(CONFIG, STATE), "layers.1.ffn.experts.3.w2"
    packed = FORMATS["fp8_block"].quantize(STATE[f"{name}.weight"])
    tensors |= {f"{name}.weight": packed.data, f"{name}.scale": packed.scale}
    loaded = values(load_weights(write_model(tmp_path, CONFIG, tensors), torch.float32)[1])
    assert torch.equal(loaded[f"{name}.weight"], packed.dequantize())


def test_each_tensor_has_the_dtype_its_kind_asks_for(published: Path) -> None:
    """Fails if hyper-connection, sink or router parameters are rounded to bf16, or weights are dequantized."""
    weights = load_weights(published, torch.bfloat16)[1]
    kept = ("ffn.gate.weight", "ffn.gate.bias", "hc_ffn_scale", "attn.compressor.wkv.weight")
    found = {name: weights.get(f"layers.1.{name}") for name in kept}
    assert all(isinstance(w, Tensor) and w.dtype == torch.float32 for w in found.values())
    for name in ("embed.weight", "head.weight", "layers.1.attn_norm.weight"):
        weight = weights.get(name)
        assert isinstance(weight, Tensor)
        assert weight.dtype == torch.bfloat16
    for name, fmt in (("layers.1.attn.wo_a.weight", "fp8_block"), ("layers.1.ffn.experts.0.w1.weight", "fp4")):
        packed = weights.get(name)
        assert isinstance(packed, QuantizedTensor)
        assert packed.format is FORMATS[fmt]


def test_memory_is_what_the_file_holds(published: Path) -> None:
    """Fails if weights are expanded on loading. Only what is computed in float32 grows (router, compressors)."""
    weights = load_weights(published, torch.bfloat16)[1]
    tensors = published_tensors(CONFIG, STATE)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    upcast = sum(t.nbytes for name, t in tensors.items() if "compressor.w" in name)
    assert stored + upcast <= weights.nbytes <= 1.01 * (stored + upcast)


def test_progress_counts_every_byte_once(published: Path) -> None:
    """Fails if a tensor is read twice, or the bar stops before the end."""
    calls: list[tuple[int, int]] = []
    load_weights(published, torch.float32, progress=lambda done, total: calls.append((done, total)))
    stored = sum(tensor.nbytes for tensor in published_tensors(CONFIG, STATE).values())
    assert {total for _, total in calls} == {stored}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (stored, stored)


def test_mtp_stages_and_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    """Fails if the tensors every published checkpoint has beyond the main model are refused."""
    extra = {
        "mtp.0.e_proj.weight": torch.ones(2, 2),
        "mtp.0.e_proj.scale": torch.ones(1, 1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    load_weights(write_model(tmp_path, CONFIG, STATE | extra), torch.float32)


def stored_bytes(config: DeepseekV4Config, prefix: str) -> int:
    """Bytes of a published checkpoint's tensors whose names start so."""
    total = 0
    for name, spec in tensor_inventory(config).items():
        if not name.startswith(prefix):
            continue
        if spec.published in FORMATS:
            fmt, (rows, cols) = FORMATS[spec.published], spec.shape
            total += sum(a * b for a, b in (fmt.data_shape(rows, cols), fmt.scale_shape(rows, cols)))
        else:
            total += torch.Size(spec.shape).numel() * {"bf16": 2, "f32": 4, "i64": 8}[spec.published]
    return total


def test_layers_have_the_published_number_of_bytes() -> None:
    """Fails for any wrong shape or published format. Figures: the published shards of V4-Flash and V4-Pro."""
    flash = DeepseekV4Config.from_dict(load_config(shared_data("dsv4_official/flash")))
    assert [stored_bytes(flash, f"layers.{i}.") for i in (0, 1, 2, 3, 4)] == [
        3_566_148_952,
        3_566_148_952,
        3_596_055_640,
        3_568_596_312,
        3_589_851_224,
    ]
    pro = DeepseekV4Config.from_dict(load_config(shared_data("dsv4_official/pro")))
    assert [stored_bytes(pro, f"layers.{i}.") for i in (0, 1, 3, 4)] == [
        13_874_466_328,
        13_874_466_328,
        13_868_262_424,
        13_903_542_296,
    ]


def test_scales_of_the_fixture_are_not_all_one() -> None:
    """Fails if the fixture would hide a loader that ignores scales."""
    tensors = published_tensors(CONFIG, STATE)
    assert decode_e8m0(tensors[f"{W1}.scale"]).unique().numel() > 2
    assert (decode_e8m0(tensors[f"{WQ_A}.scale"]) != 1).all()


def test_a_file_from_another_writer_with_unsorted_tensors_loads(tmp_path: Path) -> None:
    """Fails if data order must be the inventory's order."""
    model = write_published(tmp_path, CONFIG, STATE, quantized=False, shards=1)
    write_safetensors(model / "model.safetensors", dict(reversed(STATE.items())), {"format": "pt"})
    assert_same(values(load_weights(model, torch.float32)[1]), STATE)
