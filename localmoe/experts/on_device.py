"""Routed experts that all lie on the devices where their layers are computed.

Knows layers and their experts; does not know where these come from. Memory: each expert's bytes once, on its device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from localmoe.errors import ResourceError
from localmoe.experts.resident import ExpertSource
from localmoe.formats import QuantizedTensor
from localmoe.kernels.triton.matrix import Matrix
from localmoe.kernels.triton.slab import Experts
from localmoe.ops import DeviceOps
from localmoe.weights import device_matrix

# w1, w2 and w3 of an expert.
Stored = Sequence[Tensor | QuantizedTensor]


class DeviceExperts(ExpertSource):
    """Computes the experts of some layers; nothing here waits for a device."""

    def __init__(
        self,
        layers: Mapping[int, Sequence[Stored]],
        devices: Mapping[int, torch.device],
        ops: DeviceOps,
        limit: float,
    ) -> None:
        """layers: the experts of each, taken one after the other and copied to the layer's device: where a sequence
        makes them when they are asked for, there is one at a time. limit: of the SwiGLU.

        Raises ResourceError for experts that the kernels cannot compute: in a format that has none, or not alike."""
        self._ops = ops
        self._tables = {layer: _table(layer, experts, limit, devices[layer]) for layer, experts in layers.items()}

    def leaves_device(self, layer: int) -> bool:
        """See ExpertSource.leaves_device."""
        return False

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertSource.apply; all on the layer's device. A token's terms are added in the order of its choices,
        whatever its batch mates."""
        return self._ops.experts(self._tables[layer], hidden, ids, weights)


def _table(layer: int, experts: Sequence[Stored], limit: float, device: torch.device) -> Experts:
    try:
        return Experts.of(_matrices(experts), len(experts), limit, device)
    except ValueError as error:
        raise ResourceError(f"layer {layer} cannot be computed on {device}: {error}; leave --device out") from None


def _matrices(experts: Iterable[Stored]) -> Iterable[tuple[Matrix, Matrix, Matrix]]:
    for expert in experts:
        w1, w2, w3 = map(_matrix, expert)
        yield w1, w2, w3


def _matrix(weight: Tensor | QuantizedTensor) -> Matrix:
    found = device_matrix(weight)
    if found is None:
        name = weight.format.packing if isinstance(weight, QuantizedTensor) else str(weight.dtype)
        raise ResourceError(f"experts are stored as {name}, which is computed on the CPU only; leave --device out")
    return found
