"""Rotary tables: V4 turns plain layers with one base and compressed layers with another (plus YaRN)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from localmoe import ops


@dataclass(frozen=True)
class Rotation:
    """cos and sin [T, P] float32 of one step's positions."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return ops.rope(x, self.cos, self.sin)

    def undo(self, x: Tensor) -> Tensor:
        return ops.rope(x, self.cos, -self.sin)


def rotation(positions: Tensor, inv_freq: Tensor) -> Rotation:
    """The angle is the fp32 product position * inv_freq, as in the official code: at 1M tokens fp64 angles differ."""
    angle = positions.float()[:, None] * inv_freq
    return Rotation(angle.cos(), angle.sin())
