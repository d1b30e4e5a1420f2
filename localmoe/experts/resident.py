"""Routed experts that are all in memory, computed in torch.

`ExpertSource.apply` is the seam of the engine: whatever stores or computes experts elsewhere implements that method.
Knows layers and expert ids; does not know routers or tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmoe import ops
from localmoe.formats import Weight, linear


@dataclass(frozen=True)
class Expert:
    """A clamped SwiGLU: w1 (gate) and w3 (up) [F, D], w2 (down) [D, F]."""

    w1: Weight
    w2: Weight
    w3: Weight
    limit: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return linear(ops.swiglu(linear(x, self.w1), linear(x, self.w3), self.limit), self.w2)


class ExpertSource(Protocol):
    """Anything that can compute a layer's routed experts."""

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum over k of weights[t, k] * expert ids[t, k] (hidden[t]).

        hidden: [T, D]; ids: [T, K] int64; weights: [T, K] float32. Returns [T, D] float32."""
        ...


class ResidentExperts:
    """Experts held as tensors, run one by one over the tokens that chose them, in order of expert id."""

    def __init__(self, layers: list[list[Expert]]) -> None:
        self._layers = layers

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertSource.apply. Each token's terms are added in order of expert id, whatever its batch mates."""
        experts, top_k = self._layers[layer], ids.shape[1]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        tokens = order // top_k
        counts = torch.bincount(flat, minlength=len(experts)).tolist()
        grouped = hidden[tokens].split(counts)
        outputs = [expert(x) for expert, x in zip(experts, grouped, strict=True) if len(x)]
        terms = torch.cat(outputs).float() * weights.flatten()[order][:, None]
        return torch.zeros(hidden.shape, dtype=torch.float32).index_add(0, tokens, terms)
