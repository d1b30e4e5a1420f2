"""What others make of a quantized V2-Lite or V3: compressed-tensors, bitsandbytes and transformers are asked.

transformers decodes routed experts to the dtype of their scales, bf16, and everything else exactly. So its logits are
compared with ours on the same rounded experts: all matrices equal bit by bit, logits up to the order of additions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.engine import Engine
from localmoe.experts.paging import Paging
from localmoe.formats import FORMATS, QuantizedTensor
from localmoe.loader import load_weights
from localmoe.models.family import config_of, tensor_inventory
from localmoe.models.tensors import is_routed
from localmoe.pager import open_model
from localmoe.quantize import convert, output
from localmoe.quantize.recipe import KEEP, Recipe, Rule, simple
from tests.tiny_engine import difference, run, token_ids
from tests.tiny_mla import write_published_mla
from tests.tiny_v4 import to_transformers_state, write_model

IDS = token_ids(40)
# Of float32 logits with a spread of about one.
TOLERANCE = 1e-4
# Every way to combine formats of which transformers reads all.
READ = {
    "int4": simple("int4", KEEP, 32),
    "int8": simple("int8", KEEP, 64),
    "int4 int4": simple("int4", "int4", 32),
    "int8 int8": simple("int8", "int8", 32),
    "int4 int8": simple("int4", "int8", 32),
    # The smaller format is not that of the experts.
    "int8 int4": simple("int8", "int4", 32),
    "two groups": Recipe((Rule(r"\.experts\.", "int4_g64"), Rule(r"self_attn|shared", "int4_g32"))),
}
MIXED = Recipe((Rule(r"\.experts\.\d+\.down", "int8_g32"), Rule(r"\.experts\.", "int4_g32")))
ONLY_LOCALMOE, NOT_TRANSFORMERS = "Only localmoe reads it", "transformers (5.23) does not read it"


def logits(folder: Path) -> Tensor:
    return run(Engine(open_model(folder, "tiny", Paging(), dtype=torch.float32)), IDS)


def decoded(folder: Path) -> dict[str, Tensor]:
    """What we read, in float32, experts rounded to bf16."""
    config, weights = (
        config_of(json.loads((folder / "config.json").read_text())),
        load_weights(folder, torch.float32)[1],
    )
    found = {}
    for name in tensor_inventory(config):
        value = weights.get(name)
        found[name] = value.dequantize() if isinstance(value, QuantizedTensor) else value.float()
        if is_routed(name):
            found[name] = found[name].bfloat16().float()
    return found


def opened(folder: Path, **options: Any) -> tuple[Any, Tensor]:
    """The model as transformers opens it, and its logits, all computed in float32."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    family = transformers.AutoModelForCausalLM
    model = family.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)
    for value in model.parameters():
        # Experts, which would be computed in bf16 too.
        value.data = value.data.float() if value.dtype == torch.bfloat16 else value.data
    # Else bitsandbytes wants rows in multiples of 32 where the processor has AVX-512; these are too small for it.
    model.train()
    with torch.no_grad():
        return model, model(torch.tensor([IDS])).logits[0]


def card(folder: Path) -> str:
    text = (folder / output.CARD).read_text()
    limits = [line for line in text.splitlines() if line.startswith((ONLY_LOCALMOE, NOT_TRANSFORMERS))]
    assert len(limits) < 2
    if limits:
        assert limits[0] in (folder / f"{output.REPORT}.md").read_text()
    return "".join(limits)


@pytest.mark.parametrize(
    ("model", "name"),
    [*(("v3", name) for name in READ if name != "int8"), ("v2-lite", "int4"), ("v2-lite", "int8 int8")],
)
def test_transformers_opens_integers_with_the_same_logits(model: str, name: str, tmp_path: Path) -> None:
    """V3's attention stays FP8 where no rule names it. Fails if one matrix is decoded by the scheme of another."""
    out = tmp_path / "out"
    convert.convert(write_published_mla(tmp_path / "source", model, shards=2), out, READ[name])
    theirs, their_logits = opened(out)
    config, ours = json.loads((out / "config.json").read_text()), decoded(out)
    stacked = to_transformers_state(config, ours)
    found = theirs.state_dict()
    for tensor, value in stacked.items():
        assert torch.equal(found[tensor], value), tensor
    plain = {key: value for key, value in config.items() if "quantization" not in key}
    assert difference(their_logits, logits(write_model(tmp_path / "decoded", plain, ours))) < TOLERANCE
    # What that rounding of theirs comes to.
    assert difference(their_logits, logits(out)) < 0.2
    assert card(out) == ""


@pytest.mark.parametrize("name", ["int4", "int4 int4", "int8 int4"])
def test_transformers_decodes_everything_at_once(name: str, tmp_path: Path) -> None:
    """Its other way, to bf16. Fails if dense matrices are decoded by the scheme of the experts, or of the MTP layer."""
    config = pytest.importorskip("transformers", reason="needs transformers").CompressedTensorsConfig(dequantize=True)
    out = tmp_path / "out"
    convert.convert(write_published_mla(tmp_path / "source", "v3"), out, READ[name])
    theirs, _ = opened(out, quantization_config=config)
    found, ours = (
        theirs.state_dict(),
        to_transformers_state(json.loads((out / "config.json").read_text()), decoded(out)),
    )
    for tensor in ("mlp.experts.down_proj", "mlp.shared_experts.up_proj.weight", "self_attn.q_b_proj.weight"):
        full = f"model.layers.2.{tensor}"
        # FP8 becomes float32, integers bf16.
        rounded = ours[full] if name == "int4" else ours[full].bfloat16().float()
        assert torch.equal(found[full], rounded), tensor


@pytest.mark.parametrize(
    ("model", "rules"), [*(("v3", rules) for rules in READ.values()), ("v3", MIXED), ("v2-lite", READ["int8 int4"])]
)
def test_compressed_tensors_decodes_every_matrix_to_the_same_numbers(model: str, rules: Recipe, tmp_path: Path) -> None:
    """FP8 that stays too, and what the model does not bind. Fails if a stored matrix is described wrongly, twice or not
    at all, or its bits are laid out otherwise."""
    reason = "compressed-tensors is not installed: pip install compressed-tensors"
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    schema = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    matching = pytest.importorskip("compressed_tensors.utils.match", reason=reason)
    out = tmp_path / "out"
    convert.convert(write_published_mla(tmp_path / "source", model), out, rules)
    described = schema.QuantizationConfig.model_validate(
        json.loads((out / "config.json").read_text())["quantization_config"]
    )
    with Checkpoint.open(out) as checkpoint:
        stored = {name: checkpoint.read(ref) for name, ref in checkpoint.refs.items()}
    modules = {name.rsplit(".weight", 1)[0] for name in stored if ".weight" in name}
    weights, decoded_count = load_weights(out, torch.float32)[1], 0
    for module in modules:
        schemes = [
            scheme
            for scheme in described.config_groups.values()
            if matching.is_match(module, torch.nn.Linear(1, 1), scheme.targets)
        ]
        name = f"{module}.weight"
        packed = f"{name}_packed" in stored or stored[name].dtype == torch.float8_e4m3fn
        assert len(schemes) == packed, name
        if not packed:
            continue
        parts = {
            part: stored[f"{module}.{part}"]
            for part in ("weight", "weight_packed", "weight_scale", "weight_shape")
            if f"{module}.{part}" in stored
        }
        # In float32, which holds all of it.
        parts["weight_scale"] = parts["weight_scale"].float()
        compressor = compressors.BaseCompressor.get_value_from_registry(schemes[0].format or described.format)
        theirs = compressor.decompress(parts, schemes[0])["weight"]
        if module.startswith("model.layers.3."):
            ours = FORMATS["fp8_block"].bind(stored[name], parts["weight_scale"], (128, 256))
        else:
            ours = weights.get(name)  # type: ignore[assignment]
            assert isinstance(ours, QuantizedTensor)
        assert torch.equal(theirs, ours.dequantize()), name
        decoded_count += 1
    assert decoded_count > 8


def test_fp8_is_described_as_deepseek_means_it(tmp_path: Path) -> None:
    """Inputs are rounded where the source says so. Fails if it is not the preset that others have kernels for."""
    presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme", reason="needs compressed-tensors")
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    # As V3.1 says beside it.
    method["scale_fmt"] = "ue8m0"
    source = write_published_mla(tmp_path / "source", "v3", quantization_config=method)
    convert.convert(source, tmp_path / "out", READ["int4"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["localmoe_source_quantization"] == method
    first, *others = config["quantization_config"]["config_groups"].values()
    assert first["weights"]["num_bits"] == 4
    for group in others:
        found = presets.QuantizationScheme.model_validate(group)
        preset = presets.preset_name_to_scheme("FP8_BLOCK", group["targets"])
        assert (found.weights, found.input_activations) == (preset.weights, preset.input_activations)
    theirs, _ = opened(tmp_path / "out")
    assert torch.equal(
        theirs.model.layers[0].self_attn.o_proj.weight,
        decoded(tmp_path / "out")["model.layers.0.self_attn.o_proj.weight"],
    )


@pytest.mark.parametrize("model", ["v2-lite", "v3"])
def test_bitsandbytes_decodes_every_matrix_to_the_same_numbers(model: str, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    out = tmp_path / "out"
    convert.convert(write_published_mla(tmp_path / "source", model), out, simple("nf4", "nf4", 32))
    with Checkpoint.open(out) as checkpoint:
        stored = {name: checkpoint.read(ref) for name, ref in checkpoint.refs.items()}
    weights, count = load_weights(out, torch.float32)[1], 0
    for name in stored:
        if f"{name}.absmax" in stored:
            parts = {
                part.removeprefix(f"{name}."): value for part, value in stored.items() if part.startswith(f"{name}.")
            }
            state = functional.QuantState.from_dict(parts, torch.device("cpu"))
            state.dtype = torch.float32
            ours = weights.get(name)
            assert isinstance(ours, QuantizedTensor)
            assert torch.equal(functional.dequantize_4bit(stored[name], state), ours.dequantize()), name
            count += 1
    assert count == 3 * 8 * (1 if model == "v3" else 2) + (3 * 5 + 3 * 3 if model == "v3" else 3 * 4 + 3 * 3)


def test_transformers_opens_nf4_beside_plain_experts(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    out = tmp_path / "out"
    convert.convert(write_published_mla(tmp_path / "source", "v2-lite"), out, simple(KEEP, "nf4", 32))
    theirs, _ = opened(out)
    for module in theirs.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    with torch.no_grad():
        assert difference(theirs(torch.tensor([IDS])).logits[0], logits(out)) < TOLERANCE
    assert card(out) == ""


@pytest.mark.parametrize(
    ("model", "rules", "limit"),
    [
        ("v2-lite", MIXED, NOT_TRANSFORMERS),
        ("v3", MIXED, NOT_TRANSFORMERS),
        ("v2-lite", simple(KEEP, "int8", 32), NOT_TRANSFORMERS),
        ("v3", simple(KEEP, "int8", 32), NOT_TRANSFORMERS),
        ("v2-lite", simple("nf4", KEEP, 32), NOT_TRANSFORMERS),
        ("v3", simple("nf4", KEEP, 32), ONLY_LOCALMOE),
        ("v3", simple(KEEP, "nf4", 32), ONLY_LOCALMOE),
        ("v2-lite", simple("int3", "int8", 32), ONLY_LOCALMOE),
        ("v2-lite", simple("int4", "nf4", 32), ONLY_LOCALMOE),
    ],
)
def test_who_cannot_read_it_is_said(model: str, rules: Recipe, limit: str, tmp_path: Path) -> None:
    """In card and report, and it is true. Fails if users find out by loading noise, or are warned without cause."""
    out = tmp_path / "out"
    convert.convert(write_published_mla(tmp_path / "source", model), out, rules)
    assert card(out).startswith(limit)
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    if not transformers.__version__.startswith("5.23."):
        pytest.skip(f"the sentence is about transformers 5.23, this is {transformers.__version__}")
    try:
        _, theirs = opened(out)
    except RuntimeError:
        return
    assert difference(theirs, logits(out)) > 0.5
