"""Linear maps over plain or quantized weights, as layers bind them by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from localmoe.formats import Weight, linear

__all__ = ["Lookup", "Weight", "grouped_linear", "linear", "tensor"]

Lookup = Callable[[str], Weight]


def grouped_linear(x: Tensor, w: Weight) -> Tensor:
    """Block-diagonal map: x [T, G, in], w [G * out, in] -> [T, G * out]; group g uses rows [g * out, (g + 1) * out)."""
    w = w if isinstance(w, Tensor) else w.dequantize(x.dtype)
    blocks = w.unflatten(0, (x.shape[1], -1))
    return torch.bmm(x.to(w.dtype).transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1).flatten(1)


def tensor(get: Lookup, name: str) -> Tensor:
    """A weight that must be plain (norms, biases, mixing parameters)."""
    w = get(name)
    assert isinstance(w, Tensor), f"{name} cannot be quantized"
    return w
