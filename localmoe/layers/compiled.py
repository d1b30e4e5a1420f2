"""Layers, and halves of them, in one call of the C++ kernels, for the few tokens of a decode step.

What they compute is what layers.latent, layers.router and experts.resident do op by op; those stay in charge of
everything else: prompts, training, observed or recorded steps, and saying what is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.backend import FEW_TOKENS, Backend
from localmoe.cache import LatentState
from localmoe.experts.resident import NativeExperts, SharedExpert
from localmoe.kernels import native
from localmoe.layers.latent import LatentAttention
from localmoe.layers.moe import MoE
from localmoe.layers.rotary import Rotation
from localmoe.layers.router import GroupRouter
from localmoe.step import Step
from localmoe.weights import NativeWeight, float32_mode


@dataclass(frozen=True)
class CompiledFeed:
    """x + mlp(norm(x)), of experts that are all in memory."""

    backend: Backend
    layer: native.MoeLayer

    @classmethod
    def of(cls, backend: Backend | None, mlp: object, norm: tuple[Tensor, float]) -> CompiledFeed | None:
        """mlp: a MoE, or the SharedExpert of a dense layer. None if the kernels cannot compute it in one call.

        Scores are not of the same bits as torch's, so strict mode computes them in torch."""
        if backend is None or backend.mode == "strict" or norm[0].dtype != torch.float32:
            return None
        shared = mlp.shared if isinstance(mlp, MoE) else mlp
        if not isinstance(shared, SharedExpert) or shared.native.mode != "fast":
            return None
        if not isinstance(mlp, MoE):
            return cls(backend, native.MoeLayer.of(None, shared.native.table, norm=norm))
        routed = mlp.experts.layer(mlp.layer) if isinstance(mlp.experts, NativeExperts) else None
        gate = mlp.router.gate
        if routed is None or routed.mode != "fast" or not isinstance(gate, NativeWeight):
            return None
        if not isinstance(mlp.router, GroupRouter):
            return None
        routing = mlp.router.routing(gate.matrix, float32_mode(gate))
        return cls(backend, native.MoeLayer.of((routed.table, routing), shared.native.table, norm=norm))

    def __call__(self, x: Tensor, step: Step) -> Tensor | None:
        """x [T, D] -> [T, D], or None where it must be done otherwise, so that a fault is put down to its expert.

        One sum is looked at for all sequences: with a damaged one, its mates too are computed op by op."""
        if not _takes(x, step):
            return None
        y = self.backend.library.moe_layer(self.layer, x, mode="fast")[0]
        return y if math.isfinite(y.sum()) else None


def latent_layer(
    backend: Backend | None, attention: LatentAttention, norm: Tensor, eps: float, *, feed: CompiledFeed | None = None
) -> native.LatentLayer | None:
    """x + attention(norm(x)), and then the other half if there is one; None if the kernels cannot compute it."""
    a = attention
    if backend is None or a.index is not None or a.up.see is not None:
        return None
    q_a = _matrix(a.q_a, backend)
    found = [_matrix(w, backend) for w in (a.q_b, a.kv_a, a.up.keys, a.up.values, a.out)]
    norms = norm, a.q_norm, a.kv_norm
    plain = all(w is None or w.dtype == torch.float32 for w in norms)
    if None in found or (q_a is None) != (a.q_a is None) or not plain:
        return None
    q_b, kv_a, keys, values, out = (m for m in found if m is not None)
    return native.LatentLayer.of(
        (q_a, q_b, kv_a, keys, values, out),
        norms,
        dims=(a.num_heads, a.kv_rank, a.nope_dim, a.rope_dim),
        eps=(eps, a.eps),
        scale=a.scale,
        feed=None if feed is None else feed.layer,
    )


@dataclass(frozen=True)
class CompiledLayers:
    """Layers that follow each other. Attention has the same bits as LatentAttention in strict mode, and in fast mode
    for one sequence: several are multiplied together."""

    backend: Backend
    layers: native.LatentLayers

    @classmethod
    def of(cls, backend: Backend | None, layers: Sequence[native.LatentLayer | None]) -> CompiledLayers | None:
        """None unless the kernels can compute all of them."""
        found = [layer for layer in layers if layer is not None]
        if backend is None or len(found) < len(layers):
            return None
        return cls(backend, native.LatentLayers(found))

    def __call__(self, x: Tensor, step: Step, states: list[LatentState], turn: Rotation) -> Tensor | None:
        """x [T, D] -> [T, D], or None, with nothing changed, where it must be done otherwise.

        states: of each layer and in it of each span; they are advanced."""
        spans = len(step.spans)
        if x.shape[0] != spans or not _takes(x, step):
            return None
        for state in states:
            state.latents.grow(1)
        buffers = [state.latents.buffer for state in states]
        lengths = [state.latents.count for state in states[:spans]]
        turned = turn.cos, turn.sin
        y = self.backend.library.latent_layers(self.layers, x, turned, buffers, lengths, mode=self.backend.mode)
        if math.isfinite(y.sum()):
            return y
        for state in states:
            state.latents.count -= 1
        return None


def _takes(x: Tensor, step: Step) -> bool:
    few = x.shape[0] <= FEW_TOKENS and x.dtype == torch.float32
    return few and step.router_log is None and not torch.is_grad_enabled()


def _matrix(w: object, backend: Backend) -> native.Matrix | None:
    """The matrix of a weight that the kernels multiply as all others of the layer."""
    return w.matrix if isinstance(w, NativeWeight) and w.mode == backend.mode else None
