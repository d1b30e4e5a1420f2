"""What a model weighs, from its config.json alone: experts, everything else, the KV cache, and the work of a token.

Knows bytes and counts; does not know tiers, machines or files. Sizes are those of the published checkpoints, without
their MTP stages; what localmoe holds differs by the few tensors it widens. Time: under a second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from localmoe.cache import GROWN_BY
from localmoe.models.family import config_of, expert_names, tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.tensors import LOOKED_UP, is_routed
from localmoe.step_size import WorkBytes, prefill_tokens

# The KV cache and the activations are float32 by default.
ENTRY_BYTES = 4
_FLOAT = 4
_BLOCK = 128
_FP4_GROUP = 32


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model as stored. An expert is the w1, w2 and w3 of one routed expert of one layer.

    dense_bytes: all weights but the routed experts. dense_bytes_per_token: what a decode step reads of them, so without
    the embedding and the hash tables. kv_bytes_per_token: of a sequence, for each token of context; kv_read_per_token:
    what a step reads again of those. kv_fixed_bytes: of a sequence, whatever its length. work: of what is computed at
    once. flops_per_token: 2 for each weight a token is multiplied with, flops_per_expert: in one of its experts."""

    name: str
    num_layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    num_hash_layers: int
    expert_bytes: int
    dense_bytes: int
    dense_bytes_per_token: int
    kv_bytes_per_token: float
    kv_read_per_token: float
    kv_fixed_bytes: int
    work: WorkBytes
    context: int
    flops_per_token: int
    flops_per_expert: int

    def kv_bytes(self, context: int) -> int:
        """What a sequence of so many tokens may take, with what its buffers have in reserve."""
        return round(self.kv_fixed_bytes + context * self.kv_bytes_per_token * (1 + 1 / GROWN_BY))

    @property
    def experts(self) -> int:
        """Routed experts of the whole model."""
        return self.moe_layers * self.num_experts

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that are computed at once."""
        return prefill_tokens(self.experts * self.flops_per_expert // 2)

    @property
    def experts_bytes(self) -> int:
        return self.experts * self.expert_bytes

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.experts_bytes


class _Totals(NamedTuple):
    dense: int
    read: int
    multiplied: int
    expert: int
    expert_weights: int


def sizes_of(raw: Mapping[str, Any], name: str = "config.json", entry_bytes: int = ENTRY_BYTES) -> ModelSizes:
    """The sizes of a parsed config.json; `name` names the model, and the file in errors.

    entry_bytes: of a number in the KV cache. Raises ConfigError for a family that localmoe does not run, and for a
    field that is missing or makes no sense."""
    return sizes_of_config(config_of(raw, name), name, entry_bytes)


def stored_bytes(shape: tuple[int, ...], stored: str) -> int:
    """Bytes of a tensor with its scales. stored: bf16, f32, i64, fp8_block, fp8_f32 (with float32 scales) or fp4."""
    elements = math.prod(shape)
    if stored == "fp4":
        return elements // 2 + elements // _FP4_GROUP
    if stored in ("fp8_block", "fp8_f32"):
        blocks = math.prod(-(-size // _BLOCK) for size in shape)
        return elements + blocks * (4 if stored == "fp8_f32" else 1)
    return elements * {"bf16": 2, "f32": 4, "i64": 8}[stored]


def _totals(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> _Totals:
    """Adds up (role, shape, stored). Roles: dense is read for each token, table only looked up, expert is one."""
    dense = read = multiplied = expert = expert_weights = 0
    for role, shape, stored in tensors:
        nbytes, elements = stored_bytes(shape, stored), math.prod(shape)
        if role == "expert":
            expert, expert_weights = expert + nbytes, expert_weights + elements
            continue
        dense += nbytes
        if role == "dense":
            read, multiplied = read + nbytes, multiplied + (elements if len(shape) > 1 else 0)
    return _Totals(dense, read, multiplied, expert, expert_weights)


def sizes_of_config(c: ModelConfig, name: str, entry_bytes: int = ENTRY_BYTES) -> ModelSizes:
    """The sizes of a config that has been read already; arguments as of sizes_of."""
    totals, cache = _totals(_tensors(c)), c.cache
    return ModelSizes(
        name=name,
        num_layers=c.num_layers,
        moe_layers=c.num_moe_layers,
        num_experts=c.num_experts,
        top_k=c.experts_per_token,
        num_hash_layers=c.num_hash_layers,
        expert_bytes=totals.expert,
        dense_bytes=totals.dense,
        dense_bytes_per_token=totals.read,
        kv_bytes_per_token=entry_bytes * cache.per_token,
        kv_read_per_token=entry_bytes * cache.read_per_token,
        kv_fixed_bytes=entry_bytes * cache.fixed + _FLOAT * cache.fixed_float32,
        work=c.work,
        context=c.max_position_embeddings,
        flops_per_token=2 * (totals.multiplied + c.num_moe_layers * c.experts_per_token * totals.expert_weights),
        flops_per_expert=2 * totals.expert_weights,
    )


def _tensors(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Every tensor but the routed experts, and one expert."""
    first = expert_names(c, 0, 0)
    for name, spec in tensor_inventory(c).items():
        if not is_routed(name):
            yield "table" if name.endswith(LOOKED_UP) else "dense", spec.shape, spec.published
        elif name in first:
            yield "expert", spec.shape, spec.published
