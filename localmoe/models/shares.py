"""A model's layers over GPUs: what each takes, by the tensors' names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from localmoe.experts.layout import BLOCK
from localmoe.experts.vram import CACHED_LEAST
from localmoe.marks import LEAST_MARKS
from localmoe.models.family import tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.sizes import sizes_of_config
from localmoe.models.tensors import LOOKED_UP, is_routed, layer_of
from localmoe.spread import CPU, Gpu, LayerBytes, Share, spread
from localmoe.step_size import prefill_tokens, streamed_tokens

# A sequence has room on the GPUs for so many tokens at most; a longer one takes what is left free.
PLANNED_TOKENS = 32_768
# What a slot has besides an expert at most: each part may begin and end within a block, see Layout.
_SLOT_MARGIN = 3 * 6 * BLOCK
# Besides as it is stored, held as the absorbed form multiplies it.
_BOUND_TWICE = "kv_b_proj.weight"


def shares_of(
    config: ModelConfig, held: Mapping[str, int], dtype: torch.dtype, gpus: Sequence[Gpu], context: int | None
) -> tuple[list[Share], int]:
    """Layers over GPUs, and most tokens of a prompt in one step.

    held: bytes of each weight, by published name; dtype: of the decode state; context: tokens of a sequence, None for
    the model's own limit. Raises ResourceError if there is room for no layer."""
    if not gpus:
        return [], prefill_tokens(config.expert_weights)
    length = min(context or config.max_position_embeddings, PLANNED_TOKENS)
    sizes = sizes_of_config(config, "", dtype.itemsize)
    cache = sizes.kv_bytes(length) + LEAST_MARKS * sizes.kv_fixed_bytes
    weights, experts, last = [0] * config.num_layers, [0] * config.num_layers, 0
    inventory = tensor_inventory(config)
    for name, nbytes in held.items():
        layer = layer_of(name)
        if name.endswith(LOOKED_UP):
            continue
        if layer is None:
            last += nbytes
        elif is_routed(name):
            experts[layer] += nbytes
        else:
            weights[layer] += nbytes
            if name.endswith(_BOUND_TWICE):
                weights[layer] += math.prod(inventory[name].shape) * dtype.itemsize
    layers = [LayerBytes(w, cache // config.num_layers, e) for w, e in zip(weights, experts, strict=True)]
    ordinary = prefill_tokens(config.expert_weights)
    work = config.work.of(min(ordinary, length))
    slot = max(experts) // config.num_experts + _SLOT_MARGIN
    return _with_long_steps(config, spread(layers, last, work, gpus), ordinary, length, CACHED_LEAST * slot)


def _with_long_steps(
    config: ModelConfig, shares: list[Share], ordinary: int, length: int, least: int
) -> tuple[list[Share], int]:
    """Where experts have to be copied to every GPU, each leaves room for steps as long as streamed_tokens() says.

    least: bytes of each that only experts may take."""
    if length <= ordinary or any(share.whole for share in shares):
        return shares, ordinary
    tokens = streamed_tokens(config.work, ordinary, length, min(share.left for share in shares) - least)
    more = config.work.of(tokens) - config.work.of(ordinary)
    return [replace(share, left=share.left - more) for share in shares], tokens


def device_of(config: ModelConfig, shares: Sequence[Share], name: str) -> torch.device:
    """What is looked up by token stays with the CPU; what follows the layers is where the last of them is."""
    if not shares or name.endswith(LOOKED_UP):
        return CPU
    layer = layer_of(name)
    layer = config.num_layers - 1 if layer is None else layer
    share = next((share for share in shares if share.first <= layer < share.stop), None)
    return CPU if share is None or (is_routed(name) and not share.whole) else share.gpu.device
