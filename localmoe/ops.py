"""The public ops: one name per op, whichever implementation runs. Shapes and sources are in each op's docstring.

The torch reference is the only implementation so far; a faster kernel takes a name over here and nowhere else."""

from localmoe.kernels.reference import (
    fake_quant_fp8,
    hyper_collapse,
    hyper_expand,
    hyper_head,
    hyper_mix,
    index_scores,
    pool_overlapping,
    pool_windows,
    rms_norm,
    rope,
    rope_frequencies,
    route,
    router_scores,
    routing_weights,
    select_top,
    sparse_attention,
    swiglu,
    yarn_frequencies,
)

__all__ = [
    "fake_quant_fp8",
    "hyper_collapse",
    "hyper_expand",
    "hyper_head",
    "hyper_mix",
    "index_scores",
    "pool_overlapping",
    "pool_windows",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "route",
    "router_scores",
    "routing_weights",
    "select_top",
    "sparse_attention",
    "swiglu",
    "yarn_frequencies",
]
