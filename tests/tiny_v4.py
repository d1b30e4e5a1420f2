"""Tiny DeepSeek-V4 models with random weights: published-layout checkpoints and transformers models of the same values.

Values follow the oracle recipe: linear ~ N(0, 1 / fan_in), so that logits have a spread of about one; every bias, sink
and mixing parameter random; 32 index heads, because with few heads whole index scores are exactly 0 and tie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.formats import FORMATS
from localmoe.mini import export
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.family import config_of, places, tensor_inventory
from localmoe.safetensors_io import write_safetensors

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

_BASE: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 160,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 4,
    "o_lora_rank": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "index_n_heads": 32,
    "index_head_dim": 32,
    "index_topk": 4,
    "sliding_window": 8,
    "layer_types": [SLIDING, CSA, HCA, CSA, HCA, SLIDING],
    "compress_rates": {CSA: 4, HCA: 16},
    "num_hash_layers": 2,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}

# Dimensions transformers' dequantiser can take (multiples of 128) and the ratios of the published models.
PUBLISHED_DIMS: dict[str, Any] = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "index_head_dim": 128,
    "n_routed_experts": 4,
    "compress_rates": {CSA: 4, HCA: 128},
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A config.json of a six-layer model with every layer type; num_hidden_layers follows layer_types.

    With compress_ratios it takes the published form (ratios 0, 4, 128, then a 0 per MTP stage) instead."""
    config: dict[str, Any] = json.loads(json.dumps(_BASE | overrides))
    if "compress_ratios" in overrides and "layer_types" not in overrides:
        # The published form, which implies the rates 4 and 128.
        del config["layer_types"], config["compress_rates"]
        config.setdefault("num_hidden_layers", len(config["compress_ratios"]) - config["num_nextn_predict_layers"])
    else:
        config.setdefault("num_hidden_layers", len(config["layer_types"]))
    return config


def random_state(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights (int64 tid2eid) by published name. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    parsed = DeepseekV4Config.from_dict(config)
    return {name: _random_value(name, spec.shape, parsed, generator) for name, spec in tensor_inventory(parsed).items()}


def _random_value(name: str, shape: tuple[int, ...], config: DeepseekV4Config, generator: torch.Generator) -> Tensor:
    if name.endswith("tid2eid"):
        # Distinct experts per token: the default zeros would be one expert several times.
        return torch.rand(shape[0], config.num_experts, generator=generator).argsort(1)[:, : shape[1]].contiguous()
    if name.endswith("_scale"):
        return 0.5 + 0.5 * torch.rand(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if len(shape) == 1 or name.endswith("ape"):
        return 0.5 * noise
    # Rows of the embedding are not summed over, so they have unit spread.
    return noise if name == "embed.weight" else noise * shape[1] ** -0.5


def to_transformers_state(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names and in the stacked experts of a transformers state dict."""
    parsed = config_of(config)
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        # The published name first, then that of a state dict, if it is another.
        place = places(parsed, name)[:2][-1]
        if place.stack is None:
            result[place.name] = value
            continue
        stack = result.setdefault(place.name, torch.empty(place.stack))
        stack[place.expert, place.start : place.start + len(value)] = value
    return result


def build_transformers(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """A transformers DeepseekV4ForCausalLM in float32 with these weights; eager attention, eval mode."""
    from transformers import DeepseekV4Config as HFConfig
    from transformers import DeepseekV4ForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    family: Any = DeepseekV4ForCausalLM
    model = family._from_config(HFConfig(**plain), attn_implementation="eager").float()
    model.load_state_dict(to_transformers_state(config, state), strict=True)
    return model.eval()


def published_tensors(config: dict[str, Any], state: dict[str, Tensor], *, quantized: bool = True) -> dict[str, Tensor]:
    """The tensors of a published checkpoint: FP8 and FP4 with .scale, bf16, float32; or all in float32."""
    return export.published_tensors(config, state) if quantized else dict(state)


def rounded_state(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 values that are left of a state after writing it quantized."""
    rounded = dict(state)
    for name, spec in tensor_inventory(DeepseekV4Config.from_dict(config)).items():
        if spec.published in FORMATS:
            rounded[name] = FORMATS[spec.published].quantize(state[name]).dequantize()
        elif spec.published == "bf16":
            rounded[name] = state[name].bfloat16().float()
    return rounded


def write_published(
    directory: Path, config: dict[str, Any], state: dict[str, Tensor], quantized: bool = True, shards: int = 2
) -> Path:
    """A model directory in the published layout: config.json, shards, index. One shard makes a single file."""
    return write_model(directory, config, published_tensors(config, state, quantized=quantized), shards)


def write_model(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A model directory holding these tensors under these names."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_safetensors(directory / file, {name: tensors[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
