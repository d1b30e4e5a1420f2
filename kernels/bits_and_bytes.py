"""Products with nf4 matrices by bitsandbytes, where it is installed: other kernels for the same bytes.

Its blocks of 64 inputs with a float32 scale each are our groups, so nothing is repacked. Of our other formats it has
none: its int8 has one scale for a row where ours has one for each group of its inputs, its fp4 has other values than
e2m1. Knows tensors; imports bitsandbytes when an object is made, which takes a second. Memory: sixteen numbers for each
device."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from localmoe.kernels.codecs import NF4_BLOCK, NF4_LEVELS
from localmoe.kernels.triton.matrix import NF4, Matrix

# Up to this many rows, our kernels multiply in float32; so does this.
_FEW_ROWS = 4


def takes(matrix: Matrix) -> bool:
    """Whether it can compute with a matrix as it lies: nf4 by its own blocks, and not one of many in a slab."""
    whole = matrix.data.numel() * 2 == matrix.rows * matrix.cols
    return matrix.format == NF4 and matrix.group == NF4_BLOCK and whole and matrix.scale.dtype == torch.float32


class BitsAndBytes:
    """The installed library."""

    def __init__(self) -> None:
        """Raises ImportError where it is not installed."""
        self._library = importlib.import_module("bitsandbytes")
        self.version: str = self._library.__version__
        self._levels: dict[torch.device, Tensor] = {}

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [T, cols] -> [T, rows] float32: see localmoe.kernels.triton.linear. Many rows are rounded to bfloat16."""
        if x.device not in self._levels:
            self._levels[x.device] = NF4_LEVELS.to(x.device)
        state = self._library.functional.QuantState(
            matrix.scale.flatten(), shape=torch.Size((matrix.rows, matrix.cols)), code=self._levels[x.device],
            blocksize=NF4_BLOCK, quant_type="nf4", dtype=torch.float32,
        )  # fmt: skip
        x = x.to(torch.float32 if len(x) <= _FEW_ROWS else torch.bfloat16).contiguous()
        # [rows * cols / 2, 1] is how it keeps a weight.
        product: Tensor = self._library.matmul_4bit(x, matrix.data.reshape(-1, 1), quant_state=state)
        return product.float()
