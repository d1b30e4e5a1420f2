"""A model of round numbers, so that every byte and second can be checked by multiplying."""

from __future__ import annotations

from localmoe.models.sizes import ModelSizes
from localmoe.step_size import WorkBytes

MB, GB = 10**6, 10**9
# 10 layers of 20 experts of 10 MB: 2 GB of experts, 1 GB of other weights, of which 100 MB are tables.
MODEL = ModelSizes(
    name="round",
    num_layers=10,
    moe_layers=10,
    num_experts=20,
    top_k=2,
    num_hash_layers=0,
    expert_bytes=10 * MB,
    dense_bytes=GB,
    dense_bytes_per_token=900 * MB,
    kv_bytes_per_token=1000.0,
    kv_read_per_token=500.0,
    kv_fixed_bytes=MB,
    work=WorkBytes(600, 400, 128 << 20),
    context=100_000,
    flops_per_token=10 * MB,
    flops_per_expert=MB // 10,
)
