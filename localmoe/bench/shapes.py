"""Shapes to measure: published DeepSeek models in numbers. A model's weights are not needed to know how fast it runs.

Knows config fields and expert sizes; does not know tensors. Source: config.json of the published checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from localmoe.errors import UsageError
from localmoe.models.family import config_of
from localmoe.models.model import ModelConfig


@dataclass(frozen=True)
class ExpertShape:
    """One MoE layer: w1 and w3 [width, hidden_size], w2 [hidden_size, width]; top_k of num_experts run for a token."""

    hidden_size: int
    width: int
    top_k: int
    num_experts: int

    @property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(rows, cols) of w1, w2, w3."""
        up, down = (self.width, self.hidden_size), (self.hidden_size, self.width)
        return up, down, up

    @property
    def num_weights(self) -> int:
        return 3 * self.hidden_size * self.width


EXPERT_SHAPES = {
    "v4-flash": ExpertShape(4096, 2048, 6, 256),
    "v4-pro": ExpertShape(7168, 3072, 6, 384),
    "v3": ExpertShape(7168, 2048, 8, 256),
    "v2-lite": ExpertShape(2048, 1408, 6, 64),
}

_COMMON: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
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
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "vocab_size": 129280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
# config.json of each, without the MTP stage: nothing here runs it.
CONFIGS: dict[str, dict[str, Any]] = {
    "v4-flash": _COMMON
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4],
        "index_topk": 512,
        "n_routed_experts": 256,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 1.5,
    },
    "v4-pro": _COMMON
    | {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "compress_ratios": [128, 128] + [4, 128] * 29 + [4],
        "index_topk": 1024,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "routed_scaling_factor": 2.5,
    },
}

_MLA: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
}
_MLA_YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
CONFIGS["v3"] = _MLA | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_scaling": _MLA_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
CONFIGS["v2-lite"] = _MLA | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": _MLA_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}


def published(name: str) -> ModelConfig:
    """The whole model of that name. Raises UsageError for a name that is not in CONFIGS."""
    if name not in CONFIGS:
        raise UsageError(f"no shape is called {name!r}, only {', '.join(CONFIGS)}")
    return config_of(CONFIGS[name], name)


def cut(name: str, num_layers: int, num_experts: int, vocab_size: int | None = None) -> ModelConfig:
    """The first layers of a published model, with fewer experts in each and fewer tokens in the vocabulary, None for
    all of them; every other size is as published.

    Raises UsageError for more than it has, no layer, no token, or fewer experts than one token needs."""
    whole = published(name)
    if not 1 <= num_layers <= whole.num_layers:
        raise UsageError(f"{num_layers} layers were asked of {name}, expected 1 to {whole.num_layers}")
    if not whole.experts_per_token <= num_experts <= whole.num_experts:
        low, high = whole.experts_per_token, whole.num_experts
        raise UsageError(f"{num_experts} experts were asked of each layer of {name}, expected {low} to {high}")
    vocab_size = whole.vocab_size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= whole.vocab_size:
        raise UsageError(f"{vocab_size} tokens were asked of {name}'s vocabulary, expected 1 to {whole.vocab_size}")
    smaller = {"num_hidden_layers": num_layers, "n_routed_experts": num_experts, "vocab_size": vocab_size}
    smaller |= {"num_nextn_predict_layers": 0, **_plan_of(CONFIGS[name], num_layers)}
    if vocab_size != whole.vocab_size:
        smaller |= {"bos_token_id": 0, "eos_token_id": min(1, vocab_size - 1)}
    return config_of(CONFIGS[name] | smaller, name)


def _plan_of(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The fields that say what each layer is, for the first layers; at least one has experts."""
    if "compress_ratios" in raw:
        ratios, hashed = list(raw["compress_ratios"][:num_layers]), min(raw["num_hash_layers"], num_layers)
        return {"compress_ratios": ratios, "num_hash_layers": hashed}
    return {"first_k_dense_replace": min(raw["first_k_dense_replace"], num_layers - 1)}
