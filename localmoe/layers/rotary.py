"""Rotary tables of a step: cos and sin of every position, whichever base and scaling the frequencies have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from localmoe import ops
from localmoe.kernels.native import Library


@dataclass(frozen=True)
class Rotation:
    """cos and sin [T, P] float32 of one step's positions."""

    cos: Tensor
    sin: Tensor
    library: Library | ops.DeviceOps | None = None

    def rows(self, rows: slice) -> Rotation:
        """Of some of the positions."""
        if rows.indices(len(self.cos)) == (0, len(self.cos), 1):
            return self
        return Rotation(self.cos[rows], self.sin[rows], self.library)

    def apply(self, x: Tensor) -> Tensor:
        return ops.norm_rope(x, self.cos, self.sin, library=self.library)

    def norm_apply(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """The RMS norm of the last dimension, then the rotation."""
        return ops.norm_rope(x, self.cos, self.sin, weight=weight, eps=eps, library=self.library)

    @cached_property
    def _back(self) -> Tensor:
        """Once for all layers of a step."""
        return -self.sin

    def undo(self, x: Tensor) -> Tensor:
        return ops.norm_rope(x, self.cos, self._back, library=self.library)


def rotation(positions: Tensor, inv_freq: Tensor, *, scale: float = 1.0) -> Rotation:
    """The angle is the fp32 product position * inv_freq, as in the official code: at 1M tokens fp64 angles differ.

    scale: of cos and sin, for YaRN with mscale."""
    angle = positions.float()[:, None] * inv_freq
    return Rotation(angle.cos() * scale, angle.sin() * scale)
