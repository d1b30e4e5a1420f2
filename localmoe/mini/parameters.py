"""Parameters of localmoe-mini before training: fresh values by published name, and who steps them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.family import tensor_inventory

EMBEDDINGS = ("embed.weight", "head.weight")


def initial_parameters(config: DeepseekV4Config, token_counts: np.ndarray, seed: int) -> dict[str, Tensor]:
    """Fresh float32 parameters by published name; tid2eid balances the load of the training text."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, spec in tensor_inventory(config).items():
        if name.endswith("tid2eid"):
            parameters[name] = balanced_hash(token_counts, config.num_experts, config.experts_per_token)
            continue
        value = initial_value(name, spec.shape, config, generator)
        parameters[name] = value.requires_grad_(not name.endswith("gate.bias"))
    return parameters


def initial_value(name: str, shape: tuple[int, ...], config: DeepseekV4Config, generator: torch.Generator) -> Tensor:
    """Norms at one, biases and sinks at zero, hyper-connections near identity, matrices at 1 / sqrt(fan_in)."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("_scale"):
        return torch.full(shape, 0.05)
    if name.endswith("_base"):
        s = config.hc_mult
        base = torch.zeros(shape)
        if len(base) > s:
            base[:s] = -math.log(s - 1)  # pre: each stream counts 1 / S
            base[2 * s :] = torch.eye(s).flatten() * 4.0  # comb: keep the streams apart
        else:
            base[:] = -math.log(s - 1)
        return base
    if len(shape) < 2 or name.endswith("ape"):
        return torch.zeros(shape)
    std = 0.02 if name in EMBEDDINGS else shape[-1] ** -0.5
    if name.endswith(("wo_b.weight", "w2.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return torch.randn(shape, generator=generator) * std


def balanced_hash(counts: np.ndarray, num_experts: int, top_k: int) -> Tensor:
    """tid2eid [vocab, K] int64: tokens from the most frequent down, each to the K least loaded experts."""
    load = np.zeros(num_experts)
    table = np.zeros((len(counts), top_k), dtype=np.int64)
    for token in np.argsort(-counts, kind="stable"):
        table[token] = np.argsort(load, kind="stable")[:top_k]
        load[table[token]] += counts[token] + 1e-3
    return torch.from_numpy(table)


def is_muon(name: str, p: Tensor) -> bool:
    """Matrices between hidden layers go to Muon; embeddings, head, router and mixing parameters to AdamW."""
    kept = ("embed.", "head.", "hc_", ".ape", "ffn.gate.", "weights_proj")
    return p.dim() == 2 and not any(k in name for k in kept)
