"""What of a measured model is on GPUs, how fast these read it, and the least time that a token can take there.

Knows bytes, shares and rates; does not know weights or engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from localmoe.device_ops import DeviceOps
from localmoe.experts.paged import PagedExperts
from localmoe.experts.vram import SPARE, Accelerator
from localmoe.gpu_experts import Accelerate, moe_layers
from localmoe.models.model import ModelConfig
from localmoe.models.shares import device_of
from localmoe.models.tensors import LOOKED_UP, is_routed, layer_of
from localmoe.spread import CPU, Gpu, Share

# Tokens decoded before anything is timed, so that the caches of GPUs have what they would have in the long run.
WARM_UP_TOKENS = 128


@dataclass(frozen=True)
class Using:
    """gpus: as localmoe.gpus.find() gives them. ops, accelerate: what computes there; without ops, torch, and without
    accelerate GPUs hold experts only where all of a layer fit. rates: bytes per second that each copies, read and
    written. warm_up: tokens decoded before anything is timed, where experts are cached. graphs: whether decode steps
    are played as graphs; None: where they can be."""

    gpus: tuple[Gpu, ...]
    ops: DeviceOps | None
    accelerate: Accelerate | None
    rates: Mapping[torch.device, float]
    warm_up: int = WARM_UP_TOKENS
    graphs: bool | None = None

    def holding(self, resident: float) -> Using:
        """GPUs may hold this part of the routed experts of their layers."""
        return replace(self, gpus=tuple(replace(gpu, resident=resident) for gpu in self.gpus))


class Slots:
    """Counts the slots for experts that caches are made with, by device."""

    def __init__(self, accelerate: Accelerate) -> None:
        self._accelerate = accelerate
        self.of: Counter[torch.device] = Counter()

    def __call__(self, layout: Any, host: Any, slots: int, device: torch.device, **options: Any) -> Accelerator:
        self.of[device] += slots - SPARE
        return self._accelerate(layout, host, slots, device, **options)


@dataclass(frozen=True)
class OnGpus:
    """devices: their names. nbytes: of all weights, wherever. resident: the part of all routed experts that GPUs have
    room for. read: bytes that a token reads of what is always on a device; cached: of experts of which a GPU holds
    some. cpu_experts: whether the CPU has layers with experts of its own. apart: layers, counted among those with
    experts, that are not whole on GPUs; cache: what serves their experts, None if there are none."""

    devices: str
    nbytes: int
    resident: float
    read: Mapping[torch.device, float]
    cached: Mapping[torch.device, float]
    cpu_experts: bool
    apart: tuple[int, ...]
    using: Using
    cache: PagedExperts | None

    @property
    def uses(self) -> tuple[int, int]:
        """Of experts so far: all, and those that found the expert on a GPU. Whole layers there do not count."""
        if self.cache is None:
            return 0, 0
        stats = self.cache.stats
        return stats.hits + stats.vram_hits + stats.misses, stats.vram_hits

    def least_seconds(self, hits: float | None, dram: float | None) -> float | None:
        """A token must wait at least so long for its weights. hits: the part of uses that found the expert on a GPU;
        dram: bytes per second of RAM.

        Devices work one after the other; where a GPU caches experts, it and the CPU read theirs at the same time, and
        those that are not on it are read from RAM, whoever computes them. None where that is no bound: a rate is not
        known, or uses of experts of the CPU's own layers are counted among the others."""
        seconds = 0.0
        for device, nbytes in self.read.items():
            rate = dram if device == CPU else self.using.rates.get(device)
            if rate:
                seconds += nbytes / rate
            # A row of the embedding is no reason to know how fast RAM is.
            elif nbytes > self.nbytes / 1000:
                return None
        for device, nbytes in self.cached.items():
            rate = self.using.rates.get(device)
            if hits is None or not dram or not rate or self.cpu_experts:
                return None
            seconds += max(hits * nbytes / rate, (1 - hits) * nbytes / dram)
        return seconds


def on_gpus(
    config: ModelConfig,
    held: Mapping[str, int],
    shares: Sequence[Share],
    using: Using,
    slots: Slots | None,
    cache: PagedExperts | None,
) -> OnGpus:
    """held: bytes of each weight, by published name. slots: that caches have been made with, None without any."""
    has = slots.of if slots is not None else Counter[torch.device]()
    read: Counter[torch.device] = Counter()
    cached: Counter[torch.device] = Counter()
    cpu_experts = False
    for name, nbytes in held.items():
        device, amount = device_of(config, shares, name), bytes_read(config, name, nbytes)
        caching = next((s.gpu.device for s in shares if s.first <= (layer_of(name) or 0) < s.stop), CPU)
        if is_routed(name) and device == CPU and has[caching]:
            cached[caching] += amount  # type: ignore[assignment]
        else:
            read[device] += amount  # type: ignore[assignment]
            cpu_experts |= is_routed(name) and device == CPU
    whole = {layer for share in shares if share.whole for layer in moe_layers(config, share)}
    apart = tuple(layer for layer in range(config.num_moe_layers) if layer not in whole)
    total = config.num_moe_layers * config.num_experts
    resident = (len(whole) * config.num_experts + sum(has.values())) / max(total, 1)
    devices = list(dict.fromkeys(str(share.gpu.device) for share in shares))
    if not shares or shares[-1].stop < config.num_layers:
        devices.append("cpu")
    nbytes = sum(held.values())
    return OnGpus(",".join(devices), nbytes, min(resident, 1.0), read, cached, cpu_experts, apart, using, cache)


def bytes_per_token(config: ModelConfig, held: Mapping[str, int]) -> int:
    """Bytes of weights that a decode step of one token must read: all but the experts that are not chosen, the other
    rows of the embedding and of the hash tables. held: bytes of each weight, by published name."""
    return round(sum(bytes_read(config, name, nbytes) for name, nbytes in held.items()))


def bytes_read(config: ModelConfig, name: str, nbytes: int) -> float:
    """What of a weight a token reads, on average."""
    if is_routed(name):
        return nbytes * config.experts_per_token / config.num_experts
    return nbytes // config.vocab_size if name.endswith(LOOKED_UP) else nbytes
