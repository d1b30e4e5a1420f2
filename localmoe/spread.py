"""Which layers go to which GPU, and what is left there for experts.

Owns that rule. Neighbours stay together. A GPU gets layers by its memory, so that each can hold the same part of its
layers' experts; but a token passes one GPU after another, so what fits with all experts goes to the fastest first.
Layers that no GPU has room for are the last ones, and the CPU's. Knows bytes; does not know names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from localmoe.errors import ResourceError

CPU = torch.device("cpu")
# CUDA's context and its libraries.
GPU_BASE_BYTES = 1 << 29


@dataclass(frozen=True)
class Gpu:
    """A device, and the bytes of its memory that may be used. resident: of the routed experts of its layers, the most
    that it may hold; less than there is room for is of use to measure only. rate: bytes per second that its memory can
    be read at; 0 where that is not known."""

    device: torch.device
    nbytes: int
    resident: float = 1.0
    rate: float = 0.0


@dataclass(frozen=True)
class LayerBytes:
    """What a layer takes where it is computed: weights without its routed experts, decode state; and its experts."""

    weights: int
    state: int
    experts: int


@dataclass(frozen=True)
class Share:
    """A GPU's layers [first, stop). left: bytes for experts; whole: they are enough for all experts of these layers."""

    gpu: Gpu
    first: int
    stop: int
    left: int
    whole: bool


def spread(layers: Sequence[LayerBytes], last: int, work: int, gpus: Sequence[Gpu]) -> list[Share]:
    """last: bytes of what follows the layers, which goes where the last of them is. work: of a step, on each GPU.

    GPUs without a layer are left out. Raises ResourceError if there is room for no layer at all."""
    shares = _by_memory(layers, last, work, gpus)
    if gpus and not shares:
        first_layer = layers[0]
        need = GPU_BASE_BYTES + work + first_layer.weights + first_layer.state
        raise ResourceError(
            f"{gpus[0].device} may use {gpus[0].nbytes / 2**30:.2f} GiB and one layer needs {need / 2**30:.2f}; raise "
            "--vram, lower --ctx or leave --device out"
        )
    uneven = len({gpu.rate for gpu in gpus}) > 1
    if uneven or not all(share.whole for share in shares):
        return _whole(layers, last, work, sorted(gpus, key=lambda gpu: -gpu.rate)) or shares
    return shares


def _by_memory(layers: Sequence[LayerBytes], last: int, work: int, gpus: Sequence[Gpu]) -> list[Share]:
    shares: list[Share] = []
    at, total = 0, sum(gpu.nbytes for gpu in gpus)
    for i, gpu in enumerate(gpus):
        # By memory; the last one is offered all that is left.
        wanted = len(layers) if i + 1 == len(gpus) else at + round(len(layers) * gpu.nbytes / total)
        room, first = gpu.nbytes - GPU_BASE_BYTES - work, at
        while at < min(wanted, len(layers)):
            layer = layers[at]
            need = layer.weights + layer.state + (last if at + 1 == len(layers) else 0)
            if need > room:
                break
            room -= need
            at += 1
        if at > first:
            experts = sum(layer.experts for layer in layers[first:at])
            room = room if gpu.resident >= 1 else min(room, int(experts * gpu.resident))
            shares.append(Share(gpu, first, at, room, experts <= room))
    return shares


def _whole(layers: Sequence[LayerBytes], last: int, work: int, gpus: Sequence[Gpu]) -> list[Share] | None:
    """All layers with all their experts, as many on a GPU as it has room for before the next one; None if some have no
    room."""
    shares: list[Share] = []
    at = 0
    for gpu in gpus:
        room, first, experts = gpu.nbytes - GPU_BASE_BYTES - work, at, 0
        while at < len(layers):
            layer = layers[at]
            need = layer.weights + layer.state + (last if at + 1 == len(layers) else 0)
            if need + experts + layer.experts > room or gpu.resident < 1:
                break
            room, experts, at = room - need, experts + layer.experts, at + 1
        if at > first:
            shares.append(Share(gpu, first, at, room, True))
    return shares if at == len(layers) else None


def devices_of(shares: Sequence[Share], num_layers: int) -> list[torch.device]:
    """Of each layer."""
    devices = [CPU] * num_layers
    for share in shares:
        devices[share.first : share.stop] = [share.gpu.device] * (share.stop - share.first)
    return devices
