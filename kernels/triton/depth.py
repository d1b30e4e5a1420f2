"""How much of its caches a decoded token sees, as a device reads it: the same launches do for every position.

Knows tensors; does not know Triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Depth:
    """position [1] int64: of the token, on the device. It sees the rows of a window that have been written, all of a
    full one, and an entry for each `ratio` tokens up to itself; ratio 0: all entries that it is given."""

    position: Tensor
    ratio: int
