"""Models with multi-head latent attention: config.json to one frozen dataclass.

DeepSeek-V2, V2-Lite, V3, R1, V3.1 and V3.2, and relatives that are V3 in all but name: Kimi-K2 and GLM-4.7-Flash.
Knows field names and what is implemented; the rotation, which has two spellings, is read in mla_rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from localmoe.config import Reader
from localmoe.models.mla_rope import Rope, read_rope
from localmoe.models.shared_fields import check_quantization, eos_token_ids, size
from localmoe.step_size import ATTENTION_TOKENS, KEY_BLOCK, CacheSize, WorkBytes, query_block, scored_heads

_FLOAT = 4
# Bounds far above any published relative (61 layers, 384 experts); they keep a hostile file from filling memory.
_MAX_LAYERS, _MAX_EXPERTS = 128, 1024
# Of the norms of the latents, whatever rms_norm_eps is.
LATENT_EPS = 1e-6

Scoring = Literal["softmax", "sigmoid"]
# model_type to how its routers score, unless the config says so.
_FAMILY: dict[str, Scoring] = {
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
    "deepseek_v32": "sigmoid",
    "kimi_k2": "sigmoid",
    "glm4_moe_lite": "sigmoid",
}
MODEL_TYPES = tuple(_FAMILY)


@dataclass(frozen=True)
class IndexConfig:
    """V3.2: the lightning indexer, which picks top_k tokens for each query."""

    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True)
class MlaConfig:
    """Everything the forward pass needs to know. Dimensions in elements; q_lora_rank None: queries are projected
    directly; groups: experts are chosen from topk_group of num_groups groups; bias: V3's correction of the choice."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    index: IndexConfig | None
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_shared_experts: int
    experts_per_token: int
    scoring: Scoring
    num_groups: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    num_nextn_predict_layers: int
    published_matrices: Literal["bf16", "fp8_f32"]

    # Of the protocol that all families share.
    num_hash_layers = 0
    swiglu_limit = float("inf")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> MlaConfig:
        """Read a parsed config.json; `source` names the file in errors.

        Raises ConfigError for a missing, contradictory or unimplemented field."""
        reader = Reader(raw, source)
        reader.must_be("model_type", *MODEL_TYPES)
        model_type = str(raw["model_type"])
        _refuse_unimplemented(reader, model_type)
        num_layers = reader.required("num_hidden_layers", int, low=1, high=_MAX_LAYERS)
        num_experts = reader.required("n_routed_experts", int, low=1, high=_MAX_EXPERTS)
        num_groups, topk_group = _groups(reader, model_type, num_experts)
        vocab_size = size(reader, "vocab_size")
        q_lora_rank = size(reader, "q_lora_rank") if reader.has("q_lora_rank") else None
        return cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=size(reader, "hidden_size"),
            num_layers=num_layers,
            num_dense_layers=_num_dense_layers(reader, num_layers),
            num_heads=size(reader, "num_attention_heads"),
            q_lora_rank=q_lora_rank,
            kv_lora_rank=size(reader, "kv_lora_rank"),
            nope_head_dim=size(reader, "qk_nope_head_dim"),
            rope_head_dim=_rope_head_dim(reader),
            v_head_dim=size(reader, "v_head_dim"),
            index=_index(reader, q_lora_rank) if model_type == "deepseek_v32" else None,
            intermediate_size=size(reader, "intermediate_size"),
            moe_intermediate_size=size(reader, "moe_intermediate_size"),
            num_experts=num_experts,
            num_shared_experts=reader.required("n_shared_experts", int, low=1, high=64),
            experts_per_token=reader.required(
                "num_experts_per_tok", int, low=1, high=num_experts // num_groups * topk_group
            ),
            scoring=_FAMILY[model_type],
            num_groups=num_groups,
            topk_group=topk_group,
            norm_topk_prob=reader.required("norm_topk_prob", bool),
            routed_scaling_factor=reader.required("routed_scaling_factor", float, low=0),
            rms_norm_eps=reader.required("rms_norm_eps", float, low=0),
            rope=read_rope(reader),
            max_position_embeddings=size(reader, "max_position_embeddings", 1 << 40),
            bos_token_id=reader.required("bos_token_id", int, low=0, high=vocab_size - 1),
            eos_token_ids=eos_token_ids(reader, vocab_size),
            num_nextn_predict_layers=reader.optional("num_nextn_predict_layers", int, 0, low=0, high=64),
            published_matrices=_published_matrices(reader),
        )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def latent_dim(self) -> int:
        """What the cache keeps of a token in each layer: the latent, and the rotated key that all heads share."""
        return self.kv_lora_rank + self.rope_head_dim

    @property
    def expert_weights(self) -> int:
        """Numbers in all routed experts."""
        return 3 * self.num_moe_layers * self.num_experts * self.hidden_size * self.moe_intermediate_size

    @property
    def layer_kinds(self) -> dict[str, int]:
        kinds = {"dense": self.num_dense_layers, "MoE": self.num_moe_layers}
        return {kind: count for kind, count in kinds.items() if count}

    @property
    def attention(self) -> str:
        index = f", index keys of {self.index.head_dim}; the {self.index.top_k:,} best are read" if self.index else ""
        return f"{self.num_heads} heads; a latent of {self.kv_lora_rank} + {self.rope_head_dim} for each token{index}"

    @property
    def work(self) -> WorkBytes:
        """Of float32 activations, at the end of the longest context."""
        wide = max(self.intermediate_size, self.experts_per_token * self.moe_intermediate_size)
        heads = self.num_heads * (2 * self.latent_dim + self.nope_head_dim + self.rope_head_dim + self.v_head_dim)
        return WorkBytes(_FLOAT * 3 * (self.hidden_size + wide), _FLOAT * heads, self._block_bytes())

    def _block_bytes(self) -> int:
        """Scores three times, as they are hidden, weighed and summed: of one block of queries over all that is kept, or
        of all queries over one block of it. The compiled kernels keep no such scores, and take less."""
        entries, index = self.max_position_embeddings, self.index
        expanded = 3 * ATTENTION_TOKENS * self.num_heads * KEY_BLOCK
        if index is None:
            queries = query_block(scored_heads(self.num_heads, None), entries)
            return _FLOAT * max(expanded, 3 * queries * self.num_heads * entries)
        picked = min(index.top_k, entries)
        chosen = picked * self.latent_dim
        queries = query_block(scored_heads(self.num_heads, index.num_heads), entries, chosen)
        picking = queries * entries * (index.num_heads + 3)
        return _FLOAT * max(expanded, picking, queries * (chosen + 3 * self.num_heads * picked))

    @property
    def cache(self) -> CacheSize:
        """A decode step reads all latents again, or with an index its keys and the latents that it picks."""
        index = self.index.head_dim if self.index else 0
        read = index if self.index else self.latent_dim
        return CacheSize(self.num_layers * (self.latent_dim + index), self.num_layers * read, 0, 0)


def _refuse_unimplemented(reader: Reader, model_type: str) -> None:
    v2 = model_type == "deepseek_v2"
    scoring = _FAMILY[model_type]
    reader.must_be("scoring_func", scoring, default=scoring)
    if v2:
        reader.must_be("topk_method", "greedy", "group_limited_greedy", default="greedy")
        reader.must_be("norm_topk_prob", False)
    else:
        reader.must_be("topk_method", "noaux_tc", default="noaux_tc")
    reader.must_be("hidden_act", "silu", default="silu")
    reader.must_be("moe_layer_freq", 1, default=1)
    reader.must_be("rope_interleave", True, default=True)
    heads = reader.required("num_attention_heads", int)
    reader.must_be("num_key_value_heads", heads, default=heads)
    for flag in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        reader.must_be(flag, False, default=False)
    check_quantization(reader)


def _groups(reader: Reader, model_type: str, num_experts: int) -> tuple[int, int]:
    """How many groups of experts there are, and from how many a token may choose; 1 and 1 where there are none."""
    if model_type == "deepseek_v2" and reader.optional("topk_method", str, "greedy") == "greedy":
        return 1, 1
    groups = reader.required("n_group", int, low=1, high=num_experts)
    if num_experts % groups:
        raise reader.error("n_group", f"is {groups}, expected a divisor of n_routed_experts = {num_experts}")
    if model_type != "deepseek_v2" and num_experts // groups < 2:
        raise reader.error("n_group", f"is {groups}, expected groups of two experts or more")
    return groups, reader.required("topk_group", int, low=1, high=groups)


def _num_dense_layers(reader: Reader, num_layers: int) -> int:
    """The first layers, which have one plain MLP."""
    if not reader.has("mlp_layer_types"):
        return reader.required("first_k_dense_replace", int, low=0, high=num_layers - 1)
    types = reader.items("mlp_layer_types", str)
    count = sum(kind == "dense" for kind in types)
    if types != ["dense"] * count + ["sparse"] * (num_layers - count) or count == num_layers:
        problem = f"is not some dense then sparse, {num_layers} in all, the only plan localmoe implements"
        raise reader.error("mlp_layer_types", problem)
    if reader.has("first_k_dense_replace"):
        reader.agree("first_k_dense_replace", reader.required("first_k_dense_replace", int), "mlp_layer_types", count)
    return count


def _rope_head_dim(reader: Reader) -> int:
    dim = size(reader, "qk_rope_head_dim")
    if dim % 2:
        raise reader.error("qk_rope_head_dim", f"is {dim}, expected an even number")
    return dim


def _index(reader: Reader, q_lora_rank: int | None) -> IndexConfig:
    if q_lora_rank is None:
        raise reader.error("q_lora_rank", "is missing, and the index of V3.2 needs it")
    index = IndexConfig(size(reader, "index_n_heads"), size(reader, "index_head_dim"), size(reader, "index_topk"))
    rope = reader.required("qk_rope_head_dim", int)
    if rope > index.head_dim:
        raise reader.error("index_head_dim", f"is {index.head_dim}, expected at least qk_rope_head_dim = {rope}")
    return index


def _published_matrices(reader: Reader) -> Literal["bf16", "fp8_f32"]:
    """As DeepSeek publishes them: FP8 with a float32 scale for each block, or bf16 where no quantization is named."""
    return "fp8_f32" if reader.has("quantization_config") else "bf16"
