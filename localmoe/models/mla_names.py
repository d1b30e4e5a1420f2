"""Multi-head latent attention: every tensor of a checkpoint by its published name, which transformers uses too; only
the stacks of experts of its state dicts are another spelling."""

from __future__ import annotations

import re
from collections.abc import Iterator

from localmoe.models.mla_config import MlaConfig
from localmoe.models.tensors import ROUTED, Place, Published, TensorSpec, is_routed

_PARTS = ("gate_proj", "down_proj", "up_proj")


def tensor_inventory(config: MlaConfig) -> dict[str, TensorSpec]:
    """Every tensor the model binds, by published name, in file order. MTP layers are not part of it."""
    c = config
    table = TensorSpec((c.vocab_size, c.hidden_size), "float", "bf16", compact=True)
    specs = {"model.embed_tokens.weight": table}
    for layer in range(c.num_layers):
        for name, spec in _layer(c, layer):
            specs[f"model.layers.{layer}.{name}"] = spec
    specs["model.norm.weight"] = _vector(c.hidden_size)
    specs["lm_head.weight"] = _matrix(c, c.vocab_size, c.hidden_size, "bf16")
    return specs


def _vector(width: int) -> TensorSpec:
    return TensorSpec((width,), "float", "bf16")


def _matrix(c: MlaConfig, rows: int, cols: int, published: Published | None = None) -> TensorSpec:
    return TensorSpec((rows, cols), "linear", published or c.published_matrices, compact=True)


def _layer(c: MlaConfig, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    yield "input_layernorm.weight", _vector(c.hidden_size)
    for name, spec in _attention(c):
        yield f"self_attn.{name}", spec
    yield "post_attention_layernorm.weight", _vector(c.hidden_size)
    if layer < c.num_dense_layers:
        yield from _mlp(c, "mlp", c.intermediate_size)
        return
    yield "mlp.gate.weight", TensorSpec((c.num_experts, c.hidden_size), "float32", "bf16", compact=True)
    if c.scoring == "sigmoid":
        yield "mlp.gate.e_score_correction_bias", TensorSpec((c.num_experts,), "float32", "f32")
    for expert in range(c.num_experts):
        yield from _mlp(c, f"mlp.experts.{expert}", c.moe_intermediate_size)
    yield from _mlp(c, "mlp.shared_experts", c.num_shared_experts * c.moe_intermediate_size)


def _attention(c: MlaConfig) -> Iterator[tuple[str, TensorSpec]]:
    queries = c.num_heads * (c.nope_head_dim + c.rope_head_dim)
    if c.q_lora_rank is None:
        yield "q_proj.weight", _matrix(c, queries, c.hidden_size)
    else:
        yield "q_a_proj.weight", _matrix(c, c.q_lora_rank, c.hidden_size)
        yield "q_a_layernorm.weight", _vector(c.q_lora_rank)
        yield "q_b_proj.weight", _matrix(c, queries, c.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", _matrix(c, c.latent_dim, c.hidden_size)
    yield "kv_a_layernorm.weight", _vector(c.kv_lora_rank)
    yield "kv_b_proj.weight", _matrix(c, c.num_heads * (c.nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield "o_proj.weight", _matrix(c, c.hidden_size, c.num_heads * c.v_head_dim)
    if c.index is not None and c.q_lora_rank is not None:
        yield "indexer.wq_b.weight", _matrix(c, c.index.num_heads * c.index.head_dim, c.q_lora_rank)
        yield "indexer.wk.weight", _matrix(c, c.index.head_dim, c.hidden_size)
        for part in ("weight", "bias"):
            yield f"indexer.k_norm.{part}", TensorSpec((c.index.head_dim,), "float32", "f32")
        yield "indexer.weights_proj.weight", _matrix(c, c.index.num_heads, c.hidden_size, "bf16")


def _mlp(c: MlaConfig, prefix: str, width: int) -> Iterator[tuple[str, TensorSpec]]:
    for part in _PARTS:
        shape = (c.hidden_size, width) if part == "down_proj" else (width, c.hidden_size)
        yield f"{prefix}.{part}.weight", _matrix(c, *shape)


_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


def places(config: MlaConfig, name: str) -> tuple[Place, ...]:
    """Where to look for a tensor, given its published name."""
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return (Place(name),)
    # transformers stacks the experts of a layer: gate_up_proj holds the rows of the gate, then those of up.
    prefix, number, part = expert.groups()
    count, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
    if part == "down_proj":
        return Place(name), Place(f"{prefix}.down_proj", (count, d, f), int(number))
    stacked = Place(f"{prefix}.gate_up_proj", (count, 2 * f, d), int(number), f if part == "up_proj" else 0)
    return Place(name), stacked


def expert_names(config: MlaConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """w1 (gate), w2 (down) and w3 (up) of a routed expert. layer: of those that have experts."""
    return mlp_names(f"model.layers.{config.num_dense_layers + layer}.mlp.experts.{expert}")


def mlp_names(prefix: str) -> tuple[str, str, str]:
    """w1, w2 and w3 of one MLP: a routed expert, the shared ones or a dense layer's."""
    w1, w2, w3 = (f"{prefix}.{part}.weight" for part in _PARTS)
    return w1, w2, w3


_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_ROTARY = re.compile(r".*\.rotary_emb\.\w*inv_freq")


def is_ignored(config: MlaConfig, name: str) -> bool:
    """Tensors that the forward pass does not use: MTP layers, which follow the others, and rotary buffers."""
    layer = _IN_LAYER.match(name)
    stages = max(config.num_nextn_predict_layers, 1)
    later = layer is not None and config.num_layers <= int(layer[1]) < config.num_layers + stages
    return later or _ROTARY.fullmatch(name) is not None


_PARTS_OF = {
    ".shared_experts.": "shared experts",
    ".self_attn.": "attention",
    ".gate.": "routers",
    ".mlp.": "dense layers",
}


def part_of(name: str) -> str:
    """What a tensor is for, in words, by its published name."""
    if is_routed(name):
        return ROUTED
    for key, part in _PARTS_OF.items():
        if key in name:
            return part
    return "embedding and head" if name in ("model.embed_tokens.weight", "lm_head.weight") else "norms and streams"
