"""What the loader must know of a model's tensors: shapes, what they are needed as, and where a checkpoint keeps them.

The words that all families share; knows no family."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

# linear: a matrix that may be quantized; float: held in the compute dtype; float32: always float32; int: int64.
Kind = Literal["linear", "float", "float32", "int"]
# What DeepSeek publishes: the format of a linear, or the dtype of anything else. fp8_f32: FP8 with float32 scales.
Published = Literal["fp8_block", "fp8_f32", "fp4", "bf16", "f32", "i64"]


@dataclass(frozen=True)
class TensorSpec:
    """Logical shape (before any packing), what the engine needs it as, and how DeepSeek stores it."""

    shape: tuple[int, ...]
    kind: Kind
    published: Published
    # A matrix that is only multiplied or looked up: where the kernels compute in float32 from bf16, it may stay bf16.
    compact: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one that is a matrix."""
        rows, cols = self.shape
        return rows, cols


class Place(NamedTuple):
    """Where a checkpoint may keep a tensor: all of `name`, or rows [start, start + rows) of matrix `expert` of a stack.

    stack: shape [E, rows of all parts, cols] of the stacked tensor, None for a tensor of its own."""

    name: str
    stack: tuple[int, int, int] | None = None
    expert: int = 0
    start: int = 0


ROUTED = "routed experts"
# Ends of the names of tensors of which a step reads a row for each token.
LOOKED_UP = ("embed.weight", "embed_tokens.weight", ".tid2eid")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ROUTED = re.compile(r"\.(?:ffn|mlp)\.experts\.")


def is_routed(name: str) -> bool:
    """True for the matrices of routed experts, by published name."""
    return _ROUTED.search(name) is not None


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by published name; None for those before and after the layers."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])
