"""Where a layer is computed, and with what: the CPU with its kernels, or a device with its own.

A model has one for each layer, and everything that belongs to the layer lies there: weights, decode state, hidden
states while they pass. Knows no names and no layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from localmoe.backend import Backend
from localmoe.kernels.native import Library
from localmoe.ops import DeviceOps
from localmoe.spread import CPU
from localmoe.weights import DeviceWeight, NativeWeight, Observed, Weight, bind_device, bind_native


@dataclass(frozen=True)
class Site:
    """backend: the compiled kernels, on the CPU only. ops: a device's kernels. With neither, torch computes there."""

    device: torch.device = CPU
    backend: Backend | None = None
    ops: DeviceOps | None = None

    def __post_init__(self) -> None:
        assert self.backend is None or (self.device == CPU and self.ops is None), "compiled kernels are the CPU's"

    @property
    def library(self) -> Library | DeviceOps | None:
        """What computes other things than products with weights; None: torch."""
        return self.ops if self.backend is None else self.backend.library

    @property
    def fast_library(self) -> Library | DeviceOps | None:
        """The same, for what torch computes in strict mode."""
        return self.ops if self.backend is None or self.backend.mode == "strict" else self.backend.library

    @property
    def rounds(self) -> bool:
        """Whether products are of rounded numbers."""
        return self.fast_library is not None and (self.ops is None or not self.ops.exact)

    @property
    def strict(self) -> bool:
        """Whether a token's bits must not depend on others beside it."""
        return self.backend is not None and self.backend.mode == "strict"

    def bind(self, weight: Weight) -> Weight:
        """A weight that is only ever multiplied, brought here and given to the kernels if there are any."""
        if isinstance(weight, (NativeWeight, DeviceWeight, Observed)):
            return weight
        weight = weight.to(self.device)
        if self.backend is not None:
            return bind_native(weight, self.backend.library, self.backend.mode)
        return weight if self.ops is None else bind_device(weight, self.ops)
