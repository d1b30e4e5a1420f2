"""Routed experts of layers on GPUs: all of a layer's where there is room, else a cache of them.

Knows names, layers and GPUs; does not know what computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.experts.layout import Layout
from localmoe.experts.on_device import DeviceExperts
from localmoe.experts.policies import POLICIES
from localmoe.experts.policy import PolicyName
from localmoe.experts.residency import Residency
from localmoe.experts.resident import Expert, ExpertSource, ResidentExperts
from localmoe.experts.vram import SPARE, Accelerator, VramTier, staging_bytes
from localmoe.formats import QuantizedTensor
from localmoe.loader import Loaded, Progress, read_later
from localmoe.memory import SlotMemory
from localmoe.models.family import expert_names
from localmoe.models.model import ModelConfig
from localmoe.ops import DeviceOps
from localmoe.spread import Share

# Makes what computes in slots of a GPU: (layout, slots in RAM, number of slots, device, limit= of the SwiGLU).
Accelerate = Callable[..., Accelerator]


class _Read(Sequence[tuple[Tensor | QuantizedTensor, ...]]):
    """A layer's experts, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, loaded: Loaded, layer: int, read: Callable[[int], None]) -> None:
        """read: told the bytes of each expert that has been read."""
        self._checkpoint, self._loaded, self._layer, self._read = checkpoint, loaded, layer, read

    def __len__(self) -> int:
        return self._loaded.config.num_experts

    def __getitem__(self, expert: int) -> tuple[Tensor | QuantizedTensor, ...]:  # type: ignore[override]
        if not 0 <= expert < len(self):
            raise IndexError(expert)
        later = {n: self._loaded.on_gpus[n] for n in expert_names(self._loaded.config, self._layer, expert)}
        found = tuple(read_later(self._checkpoint, name, each) for name, each in later.items())
        self._read(sum(each.source.nbytes for each in later.values()))
        return found

    def on(self, device: torch.device) -> list[Expert]:
        """All of them on a device, for torch."""
        moved = ([weight.to(device) for weight in each] for each in self)
        return [Expert(w1, w2, w3, self._loaded.config.swiglu_limit) for w1, w2, w3 in moved]


def moe_layers(config: ModelConfig, share: Share) -> range:
    """A GPU's layers, counted among those that have experts."""
    dense = config.num_layers - config.num_moe_layers
    return range(max(share.first - dense, 0), max(share.stop - dense, 0))


def whole_layers(
    path: Path, loaded: Loaded, ops: DeviceOps | None, progress: Progress | None = None
) -> dict[int, ExpertSource]:
    """The experts of every layer whose GPU has room for all of them, read and brought there. ops: None for torch.
    progress(done, total): told the bytes after each expert, going on from what load_model() has read.

    Raises ResourceError for a format that has no kernel for a GPU."""
    config, limit = loaded.config, loaded.config.swiglu_limit
    where = {layer: share.gpu.device for share in loaded.shares if share.whole for layer in moe_layers(config, share)}
    done = loaded.done

    def read(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, loaded.total)

    with Checkpoint.open(path, passing=True) as checkpoint:
        layers = {layer: _Read(checkpoint, loaded, layer, read) for layer in where}
        source: ExpertSource
        if ops is not None:
            source = DeviceExperts(layers, where, ops, limit)
        else:
            source = ResidentExperts({layer: layers[layer].on(where[layer]) for layer in where})
    return dict.fromkeys(where, source)


def caches(
    loaded: Loaded, layout: Layout, accelerate: Accelerate, policy: PolicyName, host: SlotMemory
) -> dict[int, VramTier]:
    """Of each layer on a GPU that has room for some of its layers' experts only: its tier there.

    host: where the RAM tier has its experts."""
    config, found = loaded.config, dict[int, VramTier]()
    for share, slots in _slots(loaded, layout):
        ways = POLICIES[policy](config.num_moe_layers * config.num_experts)
        table = Residency(slots - SPARE, config.num_moe_layers, config.num_experts, ways)
        accelerator = accelerate(layout, host, slots, share.gpu.device, limit=config.swiglu_limit)
        found |= dict.fromkeys(moe_layers(config, share), VramTier(accelerator, table))
    return found


def staging(loaded: Loaded, layout: Layout) -> int:
    """Page-locked RAM that these caches take at most."""
    return sum(staging_bytes(layout.slot_bytes) for _ in _slots(loaded, layout))


def _slots(loaded: Loaded, layout: Layout) -> Iterator[tuple[Share, int]]:
    """Of each GPU that has room for some of its layers' experts only, the slots, SPARE among them."""
    for share in (share for share in loaded.shares if not share.whole):
        experts = len(moe_layers(loaded.config, share)) * loaded.config.num_experts
        slots = min(share.left // layout.slot_bytes, experts + SPARE)
        if slots > SPARE:
            yield share, slots
