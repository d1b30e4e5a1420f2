"""The two sizes of localmoe-mini, as the config.json that is published with them.

Every mechanism of V4 is present in both: a hash-routed layer, CSA with more entries than its top-k, HCA, mHC, a shared
expert. Field names are the published ones plus the transformers spelling of the layer plan, because the published
`compress_ratios` can only say 0, 4 and 128 to transformers and a small model needs a smaller HCA ratio."""

from __future__ import annotations

from typing import Any

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "num_key_value_heads": 1,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 64,
    "compress_rates": {CSA: 4, HCA: 16},
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 8,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 4096,
    "vocab_size": 4096,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}

SIZES: dict[str, dict[str, Any]] = {
    # An hour or two of two CPU cores: about 10 M parameters in all.
    "cpu": {
        "layer_types": [SLIDING, CSA, HCA, CSA],
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "moe_intermediate_size": 128,
    },
    # An hour of one GPU: about 31 M parameters, 9 M active.
    "gpu": {
        "layer_types": [SLIDING, SLIDING, CSA, HCA, CSA, HCA, CSA, HCA],
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "moe_intermediate_size": 256,
    },
}


def config_json(size: str) -> dict[str, Any]:
    """The complete config.json of one size."""
    return COMMON | SIZES[size]
