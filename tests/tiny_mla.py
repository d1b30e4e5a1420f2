"""Tiny models with multi-head latent attention and random weights, and transformers models of the same values.

As of V2-Lite, V2, V3, V3.2, Kimi-K2 and GLM-4.7-Flash: every way to route, to project queries and to rotate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.formats import FORMATS
from localmoe.models.family import config_of, tensor_inventory
from tests.tiny_v4 import to_transformers_state, write_model

_BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 2560,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_SOFTMAX = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 2}
_V2_YARN = _BASE["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}

CONFIGS: dict[str, dict[str, Any]] = {
    "v2-lite": _BASE | _SOFTMAX | {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0,
                                   "rope_scaling": _V2_YARN, "n_group": 1, "topk_group": 1},
    "v2": _BASE | _SOFTMAX | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
                              "rope_scaling": _V2_YARN},
    "v3": _BASE | {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc",
                   "first_k_dense_replace": 2, "num_nextn_predict_layers": 1},
    # Another scale of cos and sin than 1, which no published model has.
    "v3 mscale": _BASE | {"model_type": "deepseek_v3", "rope_scaling": _V2_YARN | {"mscale_all_dim": 1.3}},
    "v3.2": _BASE | {"model_type": "deepseek_v32", "index_n_heads": 32, "index_head_dim": 24, "index_topk": 16},
    "kimi-k2": _BASE | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "rope_theta": 50000,
                        "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "glm-4.7-flash": _BASE | {"model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1, "rope_scaling": None,
                              "rope_theta": 1000000, "rms_norm_eps": 1e-5, "v_head_dim": 32},
}  # fmt: skip

_PUBLISHED = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384, "kv_lora_rank": 128,
              "v_head_dim": 32}  # fmt: skip
# Widths that every format has room for.
_PUBLISHED_DIMS: dict[str, dict[str, Any]] = {
    "v2-lite": _PUBLISHED,
    "v3": _PUBLISHED | {"q_lora_rank": 128, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
                                                                  "weight_block_size": [128, 128]}},
}  # fmt: skip


def tiny_config(name: str, **overrides: Any) -> dict[str, Any]:
    """A config.json of the published form."""
    config: dict[str, Any] = json.loads(json.dumps(CONFIGS[name] | overrides))
    return config


def random_state(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights by published name. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    return {n: _value(n, s.shape, generator) for n, s in tensor_inventory(config_of(config)).items()}


def _value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if len(shape) == 1:
        return 0.1 * noise
    return noise if "embed_tokens" in name else noise * shape[1] ** -0.5


def write_published_mla(folder: Path, name: str, shards: int = 1, **overrides: Any) -> Path:
    """A checkpoint as it is published, V3 in FP8 or V2-Lite in bf16, with widths that every format has room for.

    With two matrices of an expert of the MTP layer, of which one is FP8 if all are."""
    config = tiny_config(name, **_PUBLISHED_DIMS[name] | overrides)
    state, stored = random_state(config), dict[str, Tensor]()
    for tensor, spec in tensor_inventory(config_of(config)).items():
        if spec.published == "fp8_f32":
            stored |= _fp8(tensor, state[tensor])
        else:
            stored[tensor] = state[tensor].bfloat16() if spec.published == "bf16" else state[tensor]
    later = "model.layers.3.mlp.experts.0"
    stored[f"{later}.up_proj.weight"] = torch.ones(128, 128).bfloat16()
    if "quantization_config" in config:
        stored |= _fp8(f"{later}.gate_proj.weight", state["model.layers.2.mlp.experts.0.gate_proj.weight"])
    return write_model(folder, config, stored, shards)


def _fp8(name: str, value: Tensor) -> dict[str, Tensor]:
    # No power of two, which V3 does not round its scales to.
    packed = FORMATS["fp8_block"].quantize(value)
    return {name: packed.data, f"{name}_scale_inv": packed.scale * 1.1}


def build_transformers(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """A transformers model in float32 with these weights; eager attention, eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers reads Kimi-K2 with the code of V3.
    model_type = config["model_type"].replace("kimi_k2", "deepseek_v3")
    family: Any = AutoModelForCausalLM
    hf = AutoConfig.for_model(**config | {"model_type": model_type, "num_nextn_predict_layers": 0})
    model = family.from_config(hf, attn_implementation="eager").float()
    model.load_state_dict(to_transformers_state(config, state), strict=True)
    return model.eval()
