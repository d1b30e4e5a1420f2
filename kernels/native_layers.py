"""Layers, and halves of them, in one call of the compiled library: latent attention, router and experts.

Knows tensors and their memory; does not know names or sequences. For the few tokens of a decode step, whose time would
otherwise go to the Python between small calls. A layer keeps what it points into alive."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from localmoe.kernels.native_types import Experts, Matrix, check_memory, check_status, float32

Mode = Literal["strict", "fast"]
Scoring = Literal["softmax", "sigmoid"]
MODES: dict[Mode, int] = {"strict": 0, "fast": 1}
_SCORINGS: dict[Scoring, int] = {"softmax": 0, "sigmoid": 1}
_POINTER, _INT32, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True)
class Routing:
    """How experts are chosen; see GroupRouter. bias: [E] float32 or None."""

    gate: Matrix
    gate_mode: Mode
    bias: Tensor | None
    top_k: int
    scoring: Scoring
    scale: float
    normalize: bool
    groups: int = 1
    keep: int = 1
    best: int = 1


class MoeLayer(ctypes.Structure):
    """The feed-forward half of a layer: x + mlp(norm(x)). See lm_moe_layer in localmoe_cpu.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("experts", "gate", "shared", "bias", "norm")),
        *((name, _INT64) for name in ("num_experts", "width", "top_k")),
        *((name, _INT32) for name in ("scoring", "groups", "keep", "best", "normalize", "gate_mode")),
        *((name, _FLOAT) for name in ("scale", "limit", "eps")),
        ("reserved", _INT32),
    )
    kept: tuple[Any, ...]

    @classmethod
    def of(cls, routed: tuple[Experts, Routing] | None, shared: Experts, *, norm: tuple[Tensor, float]) -> MoeLayer:
        """norm: weight [D] float32 and eps.

        Raises ValueError for experts of another width or limit than the shared one."""
        width, limit = shared.width, shared.limit
        weight, eps = float32(norm[0], width), norm[1]
        pointers = shared.address, weight.data_ptr()
        if routed is None:
            layer = cls(None, None, pointers[0], None, pointers[1], 0, width, 0, limit=limit, eps=eps)
        else:
            experts, way = routed
            bias = None if way.bias is None else float32(way.bias, len(experts))
            if (experts.width, experts.limit) != (width, limit):
                raise ValueError("a layer's experts are of one width and limit")
            layer = cls(
                experts.address,
                ctypes.addressof(way.gate),
                pointers[0],
                None if bias is None else bias.data_ptr(),
                pointers[1],
                len(experts),
                width,
                *(way.top_k, _SCORINGS[way.scoring], way.groups, way.keep, way.best, way.normalize),
                *(MODES[way.gate_mode], way.scale, limit, eps),
            )
        layer.kept = routed, shared, weight, None if routed is None else bias
        return layer


class LatentLayer(ctypes.Structure):
    """A layer of multi-head latent attention, or its attention half; see lm_latent_layer in localmoe_cpu.h."""

    _fields_ = (
        *(
            (name, _POINTER)
            for name in ("q_a", "q_b", "kv_a", "keys", "values", "out", "norm", "q_norm", "kv_norm", "feed")
        ),
        *((name, _INT64) for name in ("heads", "rank", "nope", "rope")),
        *((name, _FLOAT) for name in ("eps", "latent_eps", "scale")),
        ("reserved", _INT32),
    )
    width: int
    kept: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        matrices: tuple[Matrix | None, Matrix, Matrix, Matrix, Matrix, Matrix],
        norms: tuple[Tensor, Tensor | None, Tensor],
        *,
        dims: tuple[int, int, int, int],
        eps: tuple[float, float],
        scale: float,
        feed: MoeLayer | None = None,
    ) -> LatentLayer:
        """matrices: q_a (or None), q_b, kv_a, keys, values, out. norms, float32: norm, q_norm (or None), kv_norm.
        dims: heads, rank, nope, rope. eps: of norm, and of the other two. feed: the other half."""
        q_a, _, kv_a, *_ = matrices
        sizes = kv_a.cols, 0 if q_a is None else q_a.rows, dims[1]
        kept = tuple(None if w is None else float32(w, n) for w, n in zip(norms, sizes, strict=True))
        pointers = [None if m is None else ctypes.addressof(m) for m in matrices]
        weights = [None if w is None else w.data_ptr() for w in kept]
        layer = cls(*pointers, *weights, None if feed is None else ctypes.addressof(feed), *dims, *eps, scale)
        layer.width, layer.kept = kv_a.cols, (matrices, kept, feed)
        return layer


class LatentLayers:
    """Layers that follow each other, as the library reads them."""

    def __init__(self, layers: Sequence[LatentLayer]) -> None:
        """All of one width and of rows of one size."""
        self.width, self.row, self.pairs = layers[0].width, layers[0].rank + layers[0].rope, layers[0].rope // 2
        if any((layer.width, layer.rank + layer.rope) != (self.width, self.row) for layer in layers):
            raise ValueError("layers of one width expected")
        self._table = (_POINTER * len(layers))(*map(ctypes.addressof, layers))
        self._keep = tuple(layers)
        self.address = ctypes.addressof(self._table)

    def __len__(self) -> int:
        return len(self._keep)


class LayerCalls:
    """The part of Library that computes half layers."""

    _lib: ctypes.CDLL

    def _declare_layers(self) -> None:
        self._lib.lm_latent_layers_step.argtypes = (
            *(_POINTER, _INT64, _POINTER, _INT64, _POINTER, _POINTER),
            *(_POINTER, _POINTER, _INT32),
        )
        self._lib.lm_moe_layer_step.argtypes = (
            *(ctypes.POINTER(MoeLayer), _POINTER, _INT64, _POINTER),
            *(_POINTER, _POINTER, _INT32),
        )

    def latent_layers(
        self,
        layers: LatentLayers,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        caches: Sequence[Tensor],
        lengths: Sequence[int],
        *,
        mode: Mode,
    ) -> Tensor:
        """x [T, D] -> [T, D] float32; each token extends a sequence of its own. turn: cos and sin [T, rope / 2].

        caches: of each layer and in it of each token, the buffer [..., rank + rope] float32 of its sequence, in which
        row lengths[t] - 1 is written here and those before it are read."""
        count, (cos, sin) = x.shape[0], turn
        x = float32(x, count, layers.width).clone()
        cos, sin = float32(cos, count, layers.pairs), float32(sin, count, layers.pairs)
        if len(lengths) != count or len(caches) != len(layers) * count:
            raise ValueError(f"{len(caches)} caches of {len(lengths)} sequences for {count} tokens")
        for i, rows in enumerate(caches):
            check_memory(rows, rows.numel(), itemsize=4)
            if rows.shape[0] < lengths[i % count] or rows.shape[1] != layers.row or rows.dtype != torch.float32:
                raise ValueError(f"{lengths[i % count]} float32 rows expected, found {tuple(rows.shape)}")
        places = (_POINTER * len(caches))(*[rows.data_ptr() for rows in caches])
        depths = (_INT64 * count)(*lengths)
        pointers = x.data_ptr(), count, cos.data_ptr(), sin.data_ptr(), places, depths
        check_status(self._lib.lm_latent_layers_step(layers.address, len(layers), *pointers, MODES[mode]))
        return x

    def moe_layer(self, layer: MoeLayer, x: Tensor, *, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] float32 -> [T, D] float32, and the experts taken [T, K] int64 with their weights [T, K] float32."""
        count, top_k = x.shape[0], layer.top_k
        x, y = float32(x, count, layer.width), torch.empty_like(x, memory_format=torch.contiguous_format)
        ids, weights = torch.empty((count, top_k), dtype=torch.long), x.new_empty((count, top_k))
        chosen = ids.data_ptr(), weights.data_ptr()
        check_status(self._lib.lm_moe_layer_step(layer, x.data_ptr(), count, *chosen, y.data_ptr(), MODES[mode]))
        return y, ids, weights
