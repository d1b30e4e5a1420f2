"""DeepSeek-V4: every tensor of a checkpoint by its published name, and the other names a checkpoint may use.

Three spellings exist: the published one, the one of a transformers state dict, and the mixture that transformers'
`save_pretrained` writes. The published name is the only one used outside this file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.tensors import ROUTED, Place, Published, TensorSpec, is_routed


def tensor_inventory(config: DeepseekV4Config) -> dict[str, TensorSpec]:
    """Every tensor the model binds, by published name, in file order. mtp.* tensors are not part of it."""
    c, s = config, config.hc_mult
    specs = {"embed.weight": _table(c)}
    for layer in range(c.num_layers):
        for name, spec in _layer(c, layer):
            specs[f"layers.{layer}.{name}"] = spec
    specs["norm.weight"] = _bf16(c.hidden_size)
    specs |= {"hc_head_fn": _f32(s, s * c.hidden_size), "hc_head_base": _f32(s), "hc_head_scale": _f32(1)}
    specs["head.weight"] = _table(c)
    return specs


def _bf16(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "float", "bf16")


def _table(c: DeepseekV4Config) -> TensorSpec:
    return TensorSpec((c.vocab_size, c.hidden_size), "float", "bf16", compact=True)


def _f32(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "float32", "f32")


def _linear(rows: int, cols: int, published: Published = "fp8_block") -> TensorSpec:
    return TensorSpec((rows, cols), "linear", published, compact=True)


def _layer(c: DeepseekV4Config, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    s = c.hc_mult
    for site in ("attn", "ffn"):
        yield f"hc_{site}_fn", _f32((2 + s) * s, s * c.hidden_size)
        yield f"hc_{site}_base", _f32((2 + s) * s)
        yield f"hc_{site}_scale", _f32(3)
        yield f"{site}_norm.weight", _bf16(c.hidden_size)
    yield from _attention(c, layer)
    yield from _experts(c, layer)


def _attention(c: DeepseekV4Config, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    kind = c.layer_kind(layer)
    width = c.num_heads * c.head_dim
    yield "attn.wq_a.weight", _linear(c.q_lora_rank, c.hidden_size)
    yield "attn.q_norm.weight", _bf16(c.q_lora_rank)
    yield "attn.wq_b.weight", _linear(width, c.q_lora_rank)
    yield "attn.wkv.weight", _linear(c.head_dim, c.hidden_size)
    yield "attn.kv_norm.weight", _bf16(c.head_dim)
    yield "attn.attn_sink", _f32(c.num_heads)
    yield "attn.wo_a.weight", _linear(c.o_groups * c.o_lora_rank, width // c.o_groups)
    yield "attn.wo_b.weight", _linear(c.hidden_size, c.o_groups * c.o_lora_rank)
    if kind == "hca":
        yield from _compressor(c, "attn.compressor", c.hca_ratio, c.head_dim, c.head_dim)
    if kind == "csa":
        # Overlapping windows: each token contributes one series to its own window and one to the next.
        yield from _compressor(c, "attn.compressor", c.csa_ratio, c.head_dim, 2 * c.head_dim)
        yield from _compressor(c, "attn.indexer.compressor", c.csa_ratio, c.index_head_dim, 2 * c.index_head_dim)
        yield "attn.indexer.wq_b.weight", _linear(c.index_num_heads * c.index_head_dim, c.q_lora_rank)
        yield "attn.indexer.weights_proj.weight", _linear(c.index_num_heads, c.hidden_size, "bf16")


def _compressor(c: DeepseekV4Config, prefix: str, ratio: int, dim: int, rows: int) -> Iterator[tuple[str, TensorSpec]]:
    # Stored in bf16, computed in float32 whatever the dtype of the rest, as the official code does.
    for part in ("wkv", "wgate"):
        yield f"{prefix}.{part}.weight", TensorSpec((rows, c.hidden_size), "float32", "bf16", compact=True)
    yield f"{prefix}.ape", _f32(ratio, rows)
    yield f"{prefix}.norm.weight", _bf16(dim)


def _experts(c: DeepseekV4Config, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    d, f = c.hidden_size, c.moe_intermediate_size
    yield "ffn.gate.weight", TensorSpec((c.num_experts, d), "float32", "bf16", compact=True)
    if c.is_hash(layer):
        yield "ffn.gate.tid2eid", TensorSpec((c.vocab_size, c.experts_per_token), "int", "i64")
    else:
        yield "ffn.gate.bias", _f32(c.num_experts)
    routed = {"w1": _linear(f, d, "fp4"), "w2": _linear(d, f, "fp4"), "w3": _linear(f, d, "fp4")}
    for expert in range(c.num_experts):
        for part, spec in routed.items():
            yield f"ffn.experts.{expert}.{part}.weight", spec
    for part, spec in routed.items():
        yield f"ffn.shared_experts.{part}.weight", replace(spec, published="fp8_block")


_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# Published to transformers, applied in this order to the part after "layers.N.".
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^attn\.indexer\.compressor\.", "attn.compressor.indexer."),
        (r"^attn\.indexer\.wq_b\.", "attn.compressor.indexer.q_b_proj."),
        (r"^attn\.indexer\.weights_proj\.", "attn.compressor.indexer.scorer.weights_proj."),
        (r"^attn_norm\.", "input_layernorm."),
        (r"^ffn_norm\.", "post_attention_layernorm."),
        (r"^hc_(attn|ffn)_", r"\1_hc."),
        (r"^attn\.", "self_attn."),
        (r"^ffn\.", "mlp."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.norm\.", ".kv_norm."),
        (r"\.ape$", ".position_bias"),
        (r"\.wq_a\.", ".q_a_proj."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_a\.", ".o_a_proj."),
        (r"\.wo_b\.", ".o_b_proj."),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    )
]
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])\.weight")


def places(config: DeepseekV4Config, name: str) -> tuple[Place, ...]:
    """Where to look for a tensor, given its published name: the published spelling first, then transformers' two."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return Place(name), Place(_TOP[name])
    number, tail = layer.groups()
    prefix = f"model.layers.{number}."
    # save_pretrained undoes the renaming of kv_norm one level too far.
    saved = Place(prefix + tail.replace("attn.kv_norm.", "attn.norm."))
    expert = _EXPERT.fullmatch(tail)
    if expert is not None:
        return Place(name), _stacked(config, prefix, int(expert[1]), expert[2]), saved
    for pattern, replacement in _RENAMES:
        tail = pattern.sub(replacement, tail)
    return Place(name), Place(prefix + tail), saved


def _stacked(config: DeepseekV4Config, prefix: str, expert: int, part: str) -> Place:
    """transformers stacks the experts of a layer: gate_up_proj holds w1's rows, then w3's."""
    count, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
    if part == "w2":
        return Place(f"{prefix}mlp.experts.down_proj", (count, d, f), expert)
    return Place(f"{prefix}mlp.experts.gate_up_proj", (count, 2 * f, d), expert, f if part == "w3" else 0)


def part_of(name: str) -> str:
    """What a tensor is for, in words, by its published name."""
    if is_routed(name):
        return ROUTED
    for key, part in ((".ffn.shared_experts.", "shared experts"), (".attn.", "attention"), (".ffn.gate.", "routers")):
        if key in name:
            return part
    return "embedding and head" if name in ("embed.weight", "head.weight") else "norms and streams"


def expert_names(_config: DeepseekV4Config, layer: int, expert: int) -> tuple[str, str, str]:
    """w1 (gate), w2 (down) and w3 (up) of a routed expert."""
    return mlp_names(f"layers.{layer}.ffn.experts.{expert}")


def mlp_names(prefix: str) -> tuple[str, str, str]:
    """w1, w2 and w3 of one expert, a routed or the shared one."""
    w1, w2, w3 = (f"{prefix}.{part}.weight" for part in ("w1", "w2", "w3"))
    return w1, w2, w3


_IGNORED = re.compile(r"(model\.)?mtp\.|.*\.rotary_emb\.\w*inv_freq$")


def is_ignored(_config: DeepseekV4Config, name: str) -> bool:
    """Tensors of a checkpoint the forward pass does not use: MTP and DSpark stages, rotary buffers."""
    return _IGNORED.match(name) is not None
