"""Models with multi-head latent attention: how the blocks of DeepSeek-V2, -V3, -V3.2 and their relatives are stacked.

Source: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437), and the published inference code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe import ops
from localmoe.cache import EntryPool, LatentState
from localmoe.experts.resident import Expert, SharedExpert, shared
from localmoe.kernels.native import Library
from localmoe.layers.compiled import CompiledFeed, CompiledLayers, latent_layer
from localmoe.layers.latent import LatentAttention, TokenIndex, UpProjection
from localmoe.layers.linear import Lookup
from localmoe.layers.moe import MoE
from localmoe.layers.rotary import Rotation, rotation
from localmoe.layers.router import GroupRouter
from localmoe.models.inputs import Inputs, Kept, named, turn_of
from localmoe.models.mla_config import LATENT_EPS, MlaConfig
from localmoe.models.mla_names import expert_names, mlp_names
from localmoe.models.model import Binder, Model, Options, Outside
from localmoe.sequence import SequenceState
from localmoe.step import Step, note_faults
from localmoe.weights import Observed, Weight, linear_float32, stored

# Queries from which on keys and values are expanded: with fewer, expanding costs more than it saves. Measured on 16
# heads of the published dimensions with int4 weights: both forms take as long at 96 to 128 queries, whether 512 or
# 32768 tokens came before; at the beginning of a sequence, where only the queries' own rows are expanded, at 32.
# By counting operations it would be R (dn + dv) / (2 R - dn - dv + dr) = 171.
EXPAND_FROM = 112
# The same where the kernels attend with products of bf16: both take as long at 45 to 55 queries with AMX, at 60 to 80
# with AVX-512, at 16 or less at the beginning.
EXPAND_FROM_BF16 = 64


@dataclass(frozen=True)
class Block:
    """One layer: attention, then a mixture of experts or, in the first layers, one MLP; each on its input's norm."""

    attention_norm: Tensor
    attention: LatentAttention
    mlp_norm: Tensor
    mlp: MoE | Expert | SharedExpert
    eps: float
    library: Library | ops.DeviceOps | None
    # The two halves, each in one call, where the kernels can.
    compiled_attention: CompiledLayers | None
    compiled_mlp: CompiledFeed | None

    def attend(self, x: Tensor, step: Step, states: list[LatentState], turn: Rotation) -> Tensor:
        done = None if self.compiled_attention is None else self.compiled_attention(x, step, states, turn)
        if done is not None:
            return done
        return x + self.attention(self._normed(x, self.attention_norm), step, states, turn)

    def feed(self, x: Tensor, step: Step) -> Tensor:
        done = None if self.compiled_mlp is None else self.compiled_mlp(x, step)
        if done is not None:
            return done
        normed = self._normed(x, self.mlp_norm)
        return x + (self.mlp(normed, step) if isinstance(self.mlp, MoE) else self.mlp(normed).to(x.dtype))

    def guess(self, x: Tensor, step: Step) -> None:
        """While attention runs, experts that will probably be chosen after it can be read."""
        if isinstance(self.mlp, MoE):
            self.mlp.guess(lambda: self._normed(x, self.mlp_norm), step)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight, self.eps, library=self.library)

    def sample_weights(self) -> tuple[Weight, ...]:
        """A few of this layer's weights, enough to tell two models apart."""
        last = (self.mlp.router.gate, self.mlp.shared.w1) if isinstance(self.mlp, MoE) else (self.mlp.w1, self.mlp.w2)
        return self.attention.q_b, self.attention.kv_a, self.attention.out, *last


class Mla(Model):
    """A bound model."""

    config: MlaConfig

    def __init__(self, config: MlaConfig, get: Lookup, **options: Unpack[Options]) -> None:
        super().__init__(
            config, get, Outside("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), **options
        )
        self._inv_freq, self._turn_scale = frequencies(config)
        self.blocks: list[Block] = [self._bind_block(layer) for layer in range(config.num_layers)]
        self._compiled = self._compile()

    def new_state(self) -> SequenceState:
        c = self.config

        def state(device: torch.device) -> LatentState:
            index = EntryPool(c.index.head_dim, self.dtype, device) if c.index else None
            return LatentState(EntryPool(c.latent_dim, self.dtype, device), index)

        return SequenceState([state(site.device) for site in self.sites])

    def _inputs(self, step: Step) -> Inputs:
        turn = rotation(step.positions, self._inv_freq, scale=self._turn_scale)
        hidden = F.embedding(step.token_ids, self.embed).to(self.dtype)
        return Inputs(hidden, {"positions": step.positions} | named("turn", turn))

    def compute(self, step: Step, inputs: Inputs | Kept) -> Tensor:
        x = self._through_blocks(step, inputs)
        library = self.sites[-1].library
        hidden = ops.rms_norm(step.wanted(x), self.norm, self.config.rms_norm_eps, library=library)
        return linear_float32(hidden, self.head)

    def changes_at(self) -> list[int]:
        return [] if self.config.index is None else [self.config.index.top_k]

    def _through_blocks(self, step: Step, inputs: Inputs | Kept) -> Tensor:
        there, x = self._there(step, inputs), inputs.hidden
        turns = {device: turn_of(tables, "turn", self._libraries[device]) for device, (_, tables) in there.items()}
        if self._compiled is not None:
            layers = range(len(self.blocks))
            states = [cast(LatentState, span.state.layers[i]) for i in layers for span in step.spans]
            done = self._compiled(x, step, states, turns[x.device])
            if done is not None:
                return done
        for i, (block, site) in enumerate(zip(self.blocks, self.sites, strict=True)):
            x = step.bring(x, site.device)
            here = there[site.device][0]
            block.guess(x, step)
            states = [cast(LatentState, span.state.layers[i]) for span in step.spans]
            x = block.attend(x, here, states, turns[site.device])
            note_faults(step, i, "attention", x)
            x = block.feed(x, here)
            note_faults(step, i, "mixture of experts" if isinstance(block.mlp, MoE) else "MLP", x)
        return x

    def _bind_block(self, layer: int) -> Block:
        c, prefix, binder = self.config, f"model.layers.{layer}", self._at(layer)
        mlp: MoE | Expert | SharedExpert
        if layer < c.num_dense_layers:
            mlp = shared(binder.expert(mlp_names(f"{prefix}.mlp"), c.swiglu_limit))
        else:
            both = shared(binder.expert(mlp_names(f"{prefix}.mlp.shared_experts"), c.swiglu_limit))
            router = self._bind_router(binder, prefix)
            mlp = MoE(layer - c.num_dense_layers, router, self.experts, both, c.num_dense_layers)
        attention = self._bind_attention(binder, f"{prefix}.self_attn")
        attention_norm = binder.tensor(f"{prefix}.input_layernorm.weight")
        mlp_norm, eps = binder.tensor(f"{prefix}.post_attention_layernorm.weight"), c.rms_norm_eps
        backend = binder.site.backend
        half = CompiledLayers.of(backend, [latent_layer(backend, attention, attention_norm, eps)])
        feed = CompiledFeed.of(backend, mlp, (mlp_norm, eps))
        return Block(attention_norm, attention, mlp_norm, mlp, eps, binder.site.library, half, feed)

    def _compile(self) -> CompiledLayers | None:
        """All blocks in one call, where the kernels can."""
        backend = self.sites[0].backend
        if any(block.compiled_mlp is None for block in self.blocks):
            return None
        layers = [latent_layer(backend, b.attention, b.attention_norm, b.eps, feed=b.compiled_mlp) for b in self.blocks]
        return CompiledLayers.of(backend, layers)

    def _bind_attention(self, binder: Binder, p: str) -> LatentAttention:
        c, matrix = self.config, binder.matrix
        low_rank = c.q_lora_rank is not None
        yarn, fast = c.rope.yarn, binder.site.fast_library
        return LatentAttention(
            q_a=matrix(f"{p}.q_a_proj.weight") if low_rank else None,
            q_norm=binder.tensor(f"{p}.q_a_layernorm.weight") if low_rank else None,
            q_b=matrix(f"{p}.q_b_proj.weight" if low_rank else f"{p}.q_proj.weight"),
            kv_a=matrix(f"{p}.kv_a_proj_with_mqa.weight"),
            kv_norm=binder.tensor(f"{p}.kv_a_layernorm.weight"),
            up=self._bind_up(binder, f"{p}.kv_b_proj.weight"),
            out=matrix(f"{p}.o_proj.weight"),
            index=self._bind_index(binder, f"{p}.indexer") if c.index else None,
            num_heads=c.num_heads,
            kv_rank=c.kv_lora_rank,
            nope_dim=c.nope_head_dim,
            rope_dim=c.rope_head_dim,
            eps=LATENT_EPS,
            scale=(c.nope_head_dim + c.rope_head_dim) ** -0.5 * (yarn.softmax_scale if yarn else 1.0),
            expand_from=EXPAND_FROM_BF16 if isinstance(fast, Library) and fast.rounds_to_bf16 else EXPAND_FROM,
            fast_library=fast,
        )

    def _bind_up(self, binder: Binder, name: str) -> UpProjection:
        """Keys are needed transposed, which no packed format can be; fast kernels get bf16, as in the official code.

        Values are rows of the matrix, and stay packed if its scales can be told apart by heads."""
        c, site, both = self.config, binder.site, binder.matrix(name)
        see = both.see if isinstance(both, Observed) else None
        both = both.weight if isinstance(both, Observed) else both
        weight = stored(both)
        fast = site.rounds
        plain = weight if isinstance(weight, Tensor) else weight.dequantize(torch.bfloat16 if fast else self.dtype)
        of_heads = plain.unflatten(0, (c.num_heads, -1))
        keys = of_heads[:, : c.nope_head_dim].transpose(1, 2).flatten(0, 1)
        values: Weight | None = None
        if not isinstance(weight, Tensor):
            values = weight.part(c.num_heads, slice(c.nope_head_dim, None))
        if values is None:
            values = of_heads[:, c.nope_head_dim :].flatten(0, 1)
        return UpProjection(both, site.bind(keys.contiguous()), site.bind(values), see)

    def _bind_index(self, binder: Binder, p: str) -> TokenIndex:
        index = self.config.index
        assert index is not None, "only V3.2 has an index"
        return TokenIndex(
            binder.matrix(f"{p}.wq_b.weight"),
            binder.matrix(f"{p}.wk.weight"),
            binder.tensor(f"{p}.k_norm.weight"),
            binder.tensor(f"{p}.k_norm.bias"),
            binder.matrix(f"{p}.weights_proj.weight"),
            index.num_heads,
            index.head_dim,
            index.top_k,
        )

    def _bind_router(self, binder: Binder, prefix: str) -> GroupRouter:
        c = self.config
        bias = None
        if c.scoring == "sigmoid":
            bias = binder.tensor(f"{prefix}.mlp.gate.e_score_correction_bias")
        return GroupRouter(
            gate=binder.matrix(f"{prefix}.mlp.gate.weight"),
            top_k=c.experts_per_token,
            scale=c.routed_scaling_factor,
            normalize=c.norm_topk_prob,
            bias=bias,
            groups=c.num_groups,
            keep=c.topk_group,
        )

    def _expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        return expert_names(self.config, layer, expert)


def frequencies(config: MlaConfig) -> tuple[Tensor, float]:
    """inv_freq [dr / 2] float32, with YaRN at every length, and what cos and sin are multiplied with."""
    dim, theta, yarn = config.rope_head_dim, config.rope.theta, config.rope.yarn
    if yarn is None:
        return ops.rope_frequencies(dim, theta), 1.0
    inv_freq = ops.yarn_frequencies(dim, theta, yarn.factor, yarn.original_max_position, yarn.beta_fast, yarn.beta_slow)
    return inv_freq, yarn.turn_scale
