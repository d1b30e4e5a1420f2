"""DeepSeek-V3: the tensors of a published checkpoint, by role, shape and format; enough to weigh it, not to run it.

Knows config fields and shapes. Nothing here reads weights, and localmoe does not run V3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from localmoe.config import Reader

# Far above V3 and what was made from it (61 layers, 384 experts).
_MAX_LAYERS, _MAX_EXPERTS, _MAX_DIM = 128, 1024, 1 << 24

Tensor = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class DeepseekV3Shape:
    """The dimensions that decide how much V3 weighs. q_lora_rank 0: queries come from the hidden state directly."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_shared_experts: int
    experts_per_token: int
    num_dense_layers: int
    max_position_embeddings: int
    matrix_format: str

    @classmethod
    def read(cls, reader: Reader) -> DeepseekV3Shape:
        """Raises ConfigError for a missing or contradictory field."""
        reader.must_be("moe_layer_freq", 1, default=1)
        reader.must_be("tie_word_embeddings", False, default=False)
        num_layers = reader.required("num_hidden_layers", int, low=1, high=_MAX_LAYERS)
        num_experts = reader.required("n_routed_experts", int, low=1, high=_MAX_EXPERTS)
        return cls(
            vocab_size=_size(reader, "vocab_size"),
            hidden_size=_size(reader, "hidden_size"),
            num_layers=num_layers,
            num_heads=_size(reader, "num_attention_heads"),
            q_lora_rank=reader.optional("q_lora_rank", int, 0, low=1, high=_MAX_DIM),
            kv_lora_rank=_size(reader, "kv_lora_rank"),
            nope_head_dim=_size(reader, "qk_nope_head_dim"),
            rope_head_dim=_size(reader, "qk_rope_head_dim"),
            v_head_dim=_size(reader, "v_head_dim"),
            intermediate_size=_size(reader, "intermediate_size"),
            moe_intermediate_size=_size(reader, "moe_intermediate_size"),
            num_experts=num_experts,
            num_shared_experts=reader.required("n_shared_experts", int, low=0, high=64),
            experts_per_token=reader.required("num_experts_per_tok", int, low=1, high=num_experts),
            num_dense_layers=reader.required("first_k_dense_replace", int, low=0, high=num_layers - 1),
            max_position_embeddings=reader.required("max_position_embeddings", int, low=1, high=1 << 40),
            matrix_format=_matrix_format(reader),
        )

    @property
    def moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    def tensors(self) -> Iterator[Tensor]:
        """(role, shape, format) of every tensor but the routed experts, and of one expert; see sizes.py for the roles.

        The bf16 tensors are those that the published checkpoints leave unquantized."""
        d, stored = self.hidden_size, self.matrix_format
        yield "table", (self.vocab_size, d), "bf16"
        yield "dense", (self.vocab_size, d), "bf16"
        yield "dense", (d,), "bf16"
        for layer in range(self.num_layers):
            yield from self._attention()
            if layer < self.num_dense_layers:
                yield from _mlp("dense", d, self.intermediate_size, stored)
                continue
            yield "dense", (self.num_experts, d), "bf16"
            yield "dense", (self.num_experts,), "f32"
            if self.num_shared_experts:
                yield from _mlp("dense", d, self.num_shared_experts * self.moe_intermediate_size, stored)
        yield from _mlp("expert", d, self.moe_intermediate_size, stored)

    def _attention(self) -> Iterator[Tensor]:
        d, heads, stored = self.hidden_size, self.num_heads, self.matrix_format
        queries = heads * (self.nope_head_dim + self.rope_head_dim)
        for width in (d, d, self.kv_lora_rank):
            yield "dense", (width,), "bf16"
        if self.q_lora_rank:
            yield "dense", (self.q_lora_rank, d), stored
            yield "dense", (self.q_lora_rank,), "bf16"
        yield "dense", (queries, self.q_lora_rank or d), stored
        yield "dense", (self.kv_lora_rank + self.rope_head_dim, d), stored
        yield "dense", (heads * (self.nope_head_dim + self.v_head_dim), self.kv_lora_rank), stored
        yield "dense", (d, heads * self.v_head_dim), stored


def _size(reader: Reader, name: str) -> int:
    return reader.required(name, int, low=1, high=_MAX_DIM)


def _mlp(role: str, hidden_size: int, width: int, stored: str) -> Iterator[Tensor]:
    for shape in ((width, hidden_size), (width, hidden_size), (hidden_size, width)):
        yield role, shape, stored


def _matrix_format(reader: Reader) -> str:
    """FP8 with a float32 scale for each block, as published, or bf16 where the config says nothing of quantization."""
    if not reader.has("quantization_config"):
        return "bf16"
    section = reader.section("quantization_config")
    section.must_be("quant_method", "fp8")
    if section.has("weight_block_size") and section.items("weight_block_size", int) != [128, 128]:
        raise section.error("weight_block_size", "is not [128, 128], the only block size localmoe knows")
    return "fp8_f32"
