"""Whole matrices as numbers, and how far two of them are apart: by the compiled kernels, or by torch without them.

Knows tensors only. The same numbers either way; sums of squares may differ in the last digits of float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from localmoe.formats import QuantizedTensor
from localmoe.kernels import native
from localmoe.weights import bind_native


class Sums(NamedTuple):
    """Of two matrices a and b: the sums of a * a, b * b, a * b and (a - b) squared, in float64."""

    a: float
    b: float
    product: float
    difference: float


class Decoder:
    """Decodes one matrix after the other into the same memory, which the system would have to clear each time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def __call__(self, weight: Tensor | QuantizedTensor) -> Tensor:
        """The matrix [rows, cols] in float32; it is there until the next."""
        library = native.load()
        if isinstance(weight, Tensor):
            return weight.float()
        if isinstance(library, str):
            return weight.dequantize()
        rows, cols = weight.shape
        if self._memory.numel() < rows * cols:
            self._memory = torch.empty(rows * cols)
        out = self._memory[: rows * cols].view(rows, cols)
        return library.decode(bind_native(weight, library, "fast").matrix, out)


def compared(a: Tensor, b: Tensor) -> Sums:
    """a, b: [rows, cols] float32."""
    library = native.load()
    if not isinstance(library, str):
        return Sums(*library.compare(a, b))
    # A row at a time would be slow, all at once 16 bytes for each number.
    parts = [_sums(x.double(), y.double()) for x, y in zip(a.split(256), b.split(256), strict=True)]
    return Sums(*torch.stack(parts).sum(0).tolist())


def _sums(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in ((a, a), (b, b), (a, b), (a - b, a - b))])
