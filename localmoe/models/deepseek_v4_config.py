"""DeepSeek-V4: config.json, as published or as transformers writes it, to one frozen dataclass.

Knows field names and what is implemented; the fields with two spellings are read in deepseek_v4_plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from localmoe.config import Reader
from localmoe.models.deepseek_v4_plan import (
    LayerKind,
    YarnConfig,
    read_compress_ratios,
    read_num_hash_layers,
    read_rates,
    read_rope,
    read_rope_head_dim,
)
from localmoe.models.shared_fields import check_quantization, eos_token_ids, size
from localmoe.step_size import CacheSize, WorkBytes, query_block, scored_heads

_FLOAT = 4

# Bounds far above any published V4 (61 layers, 384 experts); they keep a hostile file from filling memory with names.
_MAX_LAYERS, _MAX_EXPERTS = 128, 512
# No tensor has the window as a dimension, so nothing else would stop a nonsense one from being allocated.
_MAX_WINDOW = 8192


@dataclass(frozen=True)
class DeepseekV4Config:
    """Everything the V4 forward pass needs to know. Dimensions in elements, ratios and windows in tokens."""

    model_type: ClassVar[str] = "deepseek_v4"

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    csa_ratio: int
    hca_ratio: int
    index_num_heads: int
    index_head_dim: int
    index_topk: int
    num_experts: int
    num_shared_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnConfig | None
    max_position_embeddings: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    num_nextn_predict_layers: int

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> DeepseekV4Config:
        """Read a parsed config.json; `source` names the file in errors.

        Raises ConfigError for a missing, contradictory or unimplemented field."""
        reader = Reader(raw, source)
        _refuse_unimplemented(reader)
        num_layers = reader.required("num_hidden_layers", int, low=1, high=_MAX_LAYERS)
        csa, hca = read_rates(reader)
        theta, compress_theta, yarn = read_rope(reader)
        vocab_size = size(reader, "vocab_size")
        config = cls(
            vocab_size=vocab_size,
            hidden_size=size(reader, "hidden_size"),
            num_layers=num_layers,
            num_heads=size(reader, "num_attention_heads"),
            head_dim=size(reader, "head_dim"),
            rope_head_dim=read_rope_head_dim(reader),
            q_lora_rank=size(reader, "q_lora_rank"),
            o_groups=size(reader, "o_groups"),
            o_lora_rank=size(reader, "o_lora_rank"),
            sliding_window=size(reader, "sliding_window", _MAX_WINDOW),
            compress_ratios=read_compress_ratios(reader, num_layers, csa, hca),
            csa_ratio=csa,
            hca_ratio=hca,
            index_num_heads=size(reader, "index_n_heads"),
            index_head_dim=size(reader, "index_head_dim"),
            index_topk=size(reader, "index_topk"),
            num_experts=reader.required("n_routed_experts", int, low=1, high=_MAX_EXPERTS),
            num_shared_experts=reader.required("n_shared_experts", int),
            experts_per_token=size(reader, "num_experts_per_tok"),
            moe_intermediate_size=size(reader, "moe_intermediate_size"),
            num_hash_layers=read_num_hash_layers(reader, num_layers),
            routed_scaling_factor=reader.required("routed_scaling_factor", float, low=0),
            norm_topk_prob=reader.required("norm_topk_prob", bool),
            # 0, "no limit" elsewhere, would silence every expert here.
            swiglu_limit=reader.required("swiglu_limit", float, low=1e-3),
            hc_mult=reader.required("hc_mult", int, low=1, high=64),
            hc_sinkhorn_iters=reader.required("hc_sinkhorn_iters", int, low=1, high=1000),
            hc_eps=reader.required("hc_eps", float, low=0),
            rms_norm_eps=reader.required("rms_norm_eps", float, low=0),
            rope_theta=theta,
            compress_rope_theta=compress_theta,
            yarn=yarn,
            max_position_embeddings=size(reader, "max_position_embeddings", 1 << 40),
            bos_token_id=reader.required("bos_token_id", int, low=0, high=vocab_size - 1),
            eos_token_ids=eos_token_ids(reader, vocab_size),
            num_nextn_predict_layers=reader.optional("num_nextn_predict_layers", int, 0, low=0, high=64),
        )
        _check_sizes(reader, config)
        return config

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts: all of them."""
        return self.num_layers

    @property
    def expert_weights(self) -> int:
        """Numbers in all routed experts."""
        return 3 * self.num_layers * self.num_experts * self.hidden_size * self.moe_intermediate_size

    @property
    def layer_kinds(self) -> dict[str, int]:
        return dict(Counter(self.layer_kind(layer) for layer in range(self.num_layers)))

    @property
    def attention(self) -> str:
        window = f"{self.num_heads} heads of {self.head_dim}; a window of {self.sliding_window:,} tokens"
        ratios = (
            f"one entry for {self.csa_ratio} tokens (csa), of which {self.index_topk:,} are read, or {self.hca_ratio}"
        )
        return f"{window}, and {ratios} (hca)" if any(self.compress_ratios) else window

    @property
    def work(self) -> WorkBytes:
        """Of float32 activations, at the end of the longest context."""
        streams, experts = self.hc_mult * self.hidden_size, self.experts_per_token * self.moe_intermediate_size
        block = max(self._block_bytes(ratio) for ratio in set(self.compress_ratios))
        return WorkBytes(_FLOAT * 3 * (streams + experts), _FLOAT * 4 * self.num_heads * self.head_dim, block)

    def _block_bytes(self, ratio: int) -> int:
        """What one block of queries takes in a layer of that ratio: scores three times, as they are joined and summed,
        and where entries are chosen, those of each query, or before that the indexer's scores."""
        entries = self.max_position_embeddings // ratio if ratio else 0
        if ratio != self.csa_ratio:
            queries = query_block(scored_heads(self.num_heads, None), entries)
            return 3 * _FLOAT * queries * self.num_heads * (entries + 2 * self.sliding_window)
        kept, heads = min(self.index_topk, entries), scored_heads(self.num_heads, self.index_num_heads)
        chosen = kept * self.head_dim
        queries = query_block(heads, entries, chosen)
        # Blocks are largest where the context is short, and choosing takes most where it is long.
        most = query_block(heads, kept, chosen) * (chosen + 3 * self.num_heads * (kept + 2 * self.sliding_window))
        return _FLOAT * max(most, queries * entries * (self.index_num_heads + 3))

    @property
    def cache(self) -> CacheSize:
        """A decode step reads all HCA entries and index keys again; of CSA entries, only the few that are picked."""
        csa, hca = (sum(self.layer_kind(i) == kind for i in range(self.num_layers)) for kind in ("csa", "hca"))
        read = csa * self.index_head_dim / self.csa_ratio + hca * self.head_dim / self.hca_ratio
        # As in cache.OpenRows: CSA windows overlap, so two of them and two series of each token are kept.
        overlapping = csa * 2 * self.csa_ratio * 2 * (self.head_dim + self.index_head_dim)
        return CacheSize(
            read + csa * self.head_dim / self.csa_ratio,
            read,
            self.num_layers * self.sliding_window * self.head_dim,
            2 * (overlapping + hca * self.hca_ratio * self.head_dim),
        )

    def layer_kind(self, layer: int) -> LayerKind:
        """What a layer attends besides its window: nothing, indexed CSA entries, or all HCA entries."""
        ratio = self.compress_ratios[layer]
        if ratio == 0:
            return "sliding"
        return "csa" if ratio == self.csa_ratio else "hca"

    def is_hash(self, layer: int) -> bool:
        """True when the layer routes by token id (tid2eid) instead of by score."""
        return layer < self.num_hash_layers


def _refuse_unimplemented(reader: Reader) -> None:
    reader.must_be("model_type", "deepseek_v4")
    reader.must_be("scoring_func", "sqrtsoftplus")
    reader.must_be("num_key_value_heads", 1)
    reader.must_be("n_shared_experts", 1)
    reader.must_be("topk_method", "noaux_tc", default="noaux_tc")
    reader.must_be("hidden_act", "silu", default="silu")
    reader.must_be("n_group", 1, default=1)
    reader.must_be("topk_group", 1, default=1)
    for flag in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        reader.must_be(flag, False, default=False)
    check_quantization(reader)


def _check_sizes(reader: Reader, c: DeepseekV4Config) -> None:
    """Relations between fields that no tensor shape could reveal later."""
    if c.num_heads % c.o_groups:
        raise reader.error("o_groups", f"is {c.o_groups}, expected a divisor of num_attention_heads = {c.num_heads}")
    if c.experts_per_token > c.num_experts:
        found, limit = c.experts_per_token, c.num_experts
        raise reader.error("num_experts_per_tok", f"is {found}, expected at most n_routed_experts = {limit}")
    for name, dim in (("head_dim", c.head_dim), ("index_head_dim", c.index_head_dim)):
        if c.rope_head_dim > dim:
            raise reader.error(name, f"is {dim}, expected at least qk_rope_head_dim = {c.rope_head_dim}")
