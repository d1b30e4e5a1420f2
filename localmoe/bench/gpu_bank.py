"""Weights and caches to time a GPU's kernels on: random codes, made on the device, more than its caches hold.

Knows packings; does not know models' tensors. Memory: on the device, what is asked for, once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.bench.bank import PACKINGS, matrix_bytes
from localmoe.bench.shapes import CONFIGS, ExpertShape, published
from localmoe.kernels.triton.matrix import FORMATS, Matrix
from localmoe.kernels.triton.slab import Experts
from localmoe.models.family import tensor_inventory
from localmoe.models.tensors import is_routed

# Formats that have a kernel for GPUs.
GPU_FORMATS = tuple(name for name in PACKINGS if name == "bf16" or name in FORMATS)
# One matrix after the other, as many as hold so much.
_ROTATED_BYTES = 256 << 20
_LIMIT = 10.0
# Tokens before: what latent attention reads all of, and V4's compressed attention a part of.
CONTEXT = 131_072


class Slab:
    """`count` matrices of one shape and format, one after the other."""

    def __init__(self, format: str, shape: tuple[int, int], count: int, device: torch.device) -> None:
        self._format, self._shape, self.count = format, shape, count
        packing, (size, _scales) = PACKINGS[format], matrix_bytes(format, *shape)
        generator = torch.Generator(device).manual_seed(count)
        if packing.scale is None:
            noise = torch.randn(count, size // 2, generator=generator, device=device, dtype=torch.bfloat16)
            self.data = self.scale = noise.mul_(shape[1] ** -0.5)
            return
        kinds = {"generator": generator, "device": device, "dtype": torch.uint8}
        self.data = torch.randint(256, (count, size), **kinds)  # type: ignore[call-overload]
        if format == "fp8_block":
            # Without this bit no e4m3 code is NaN.
            self.data &= 0xF7
        exponent = round(math.log2(shape[1] ** -0.5 / packing.unit))
        value = 127 + exponent if packing.scale == torch.uint8 else 2.0**exponent
        scales = math.prod(packing.scale_shape(*shape))
        self.scale = torch.full((count, scales), value, dtype=packing.scale, device=device)

    def whole(self) -> Matrix:
        """The first, with all others behind it."""
        return Matrix.within(self._name, self._shape, self.data, self.scale, group=PACKINGS[self._format].group)

    def one(self, number: int) -> Matrix:
        """One, which can be told from the others by nobody."""
        packing = PACKINGS[self._format]
        scale = None if packing.scale is None else self.scale[number].view(packing.scale_shape(*self._shape))
        return Matrix.of(self._name, self._shape, self._data(number), scale, group=packing.group)

    @property
    def _name(self) -> str:
        return "plain" if self._format == "bf16" else self._format

    def _data(self, number: int) -> Tensor:
        return self.data[number].view(self._shape) if self._format == "bf16" else self.data[number]

    def offsets(self) -> tuple[Tensor, Tensor]:
        number = torch.arange(self.count, device=self.data.device)
        return number * self.data.shape[1], number * self.scale.shape[1]


def expert_table(shape: ExpertShape, format: str, count: int, device: torch.device) -> Experts:
    """Experts as a layer on a GPU has them."""
    slabs = [Slab(format, matrix, count, device) for matrix in shape.matrices]
    w1, w2, w3 = (slab.whole() for slab in slabs)
    data_at, scale_at = zip(*(slab.offsets() for slab in slabs), strict=True)
    return Experts(w1, w2, w3, data_at, scale_at, _LIMIT)


def rotated(format: str, shape: tuple[int, int], device: torch.device) -> list[Matrix]:
    """Matrices that take turns, so that no cache keeps one."""
    slab = Slab(format, shape, max(-(-_ROTATED_BYTES // sum(matrix_bytes(format, *shape))), 2), device)
    return [slab.one(i) for i in range(slab.count)]


def dense_shapes(name: str) -> dict[str, tuple[int, int]]:
    """(rows, cols) of matrices that every token takes: of the shared expert, the largest one of attention, the head."""
    inventory = tensor_inventory(published(name))
    shared = next(spec for tensor, spec in inventory.items() if "shared_expert" in tensor)
    head = next(spec for tensor, spec in inventory.items() if tensor.endswith("head.weight"))
    attention = [s for t, s in inventory.items() if "attn" in t and s.kind == "linear" and not is_routed(t)]
    largest = max(attention, key=lambda spec: math.prod(spec.shape))
    return {"shared": shared.matrix, "attention": largest.matrix, "head": head.matrix}


@dataclass(frozen=True)
class Attention:
    """One kind of attention after CONTEXT tokens, in a shape. kind: latent (MLA: all rows of the cache); hca and csa
    (V4: a window and entries, the same for all queries or chosen for each); index (V4: scores of all entries).

    row: numbers of a key, the first `width` of which are its value."""

    kind: str
    heads: int
    row: int
    width: int
    window: int
    entries: int

    def work(self, tokens: int) -> tuple[int, int]:
        """Bytes of bfloat16 keys that must be read, and operations."""
        keys = self.window + self.entries * (tokens if self.kind == "csa" else 1)
        each = self.row if self.kind == "index" else self.row + self.width
        return 2 * keys * self.row, 2 * tokens * self.heads * (self.window + self.entries) * each


def attentions(name: str) -> list[Attention]:
    """What the layers of a shape have."""
    raw = CONFIGS[name]
    heads = raw["num_attention_heads"]
    if raw["model_type"] != "deepseek_v4":
        width = raw["kv_lora_rank"]
        return [Attention("latent", heads, width + raw["qk_rope_head_dim"], width, 0, CONTEXT)]
    row, window = raw["head_dim"], raw["sliding_window"]
    return [
        Attention("hca", heads, row, row, window, CONTEXT // 128),
        Attention("csa", heads, row, row, window, min(raw["index_topk"], CONTEXT // 4)),
        Attention("index", raw["index_n_heads"], raw["index_head_dim"], 0, 0, CONTEXT // 4),
    ]
