"""DeepSeek-V4: names of its tensors, and how the blocks are stacked. Source: spec of the official inference code and
the V4 technical report (arXiv 2606.19348), sections 2.1-2.3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack, cast

from torch import Tensor
from torch.nn import functional as F

from localmoe import ops
from localmoe.cache import Compressed, EntryPool, LayerState, OpenRows, SequenceState, Window
from localmoe.experts.resident import shared
from localmoe.layers.compressor import Compressor, Indexer
from localmoe.layers.hyper import HyperConnection, HyperHead
from localmoe.layers.linear import Lookup, tensor
from localmoe.layers.moe import MoE
from localmoe.layers.rotary import rotation
from localmoe.layers.router import BiasRouter
from localmoe.layers.sparse import SparseAttention
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_names import expert_names, mlp_names
from localmoe.models.model import Model, Options, Tables
from localmoe.step import Step, note_faults
from localmoe.weights import Weight, linear_float32


@dataclass(frozen=True)
class Block:
    """One layer: attention and MoE, each inside its own hyper-connection."""

    attention_site: HyperConnection
    attention: SparseAttention
    moe_site: HyperConnection
    moe: MoE

    def guess(self, streams: Tensor) -> None:
        """While attention runs, experts that will probably be chosen after it can be read."""
        if self.moe.wants_guess():
            self.moe.guess(self.moe_site.enter(streams))

    def sample_weights(self) -> tuple[Weight, ...]:
        """A few of this layer's weights, enough to tell two models apart."""
        return self.attention.wq_a, self.attention.wo_b, self.moe.router.gate, self.moe.shared.w1, self.moe.shared.w2


class DeepseekV4(Model):
    """A bound model."""

    config: DeepseekV4Config

    def __init__(self, config: DeepseekV4Config, get: Lookup, **options: Unpack[Options]) -> None:
        super().__init__(config, get, Tables("embed.weight", "norm.weight", "head.weight"), **options)
        strict = self.backend is not None and self.backend.mode == "strict"
        self.hyper_head = HyperHead.bind(get, config.rms_norm_eps, config.hc_eps, strict=strict)
        self._inv_freq = {False: plain_frequencies(config), True: compressed_frequencies(config)}
        self.blocks: list[Block] = [self._bind_block(layer) for layer in range(config.num_layers)]

    def new_state(self) -> SequenceState:
        return SequenceState([self._layer_state(i) for i in range(self.config.num_layers)])

    def forward(self, step: Step) -> Tensor:
        self.experts.prepare(step.token_ids.shape[0])
        for block in self.blocks:
            block.moe.announce_early(step.token_ids)
        turns = {kind: rotation(step.positions, inv_freq, self._library) for kind, inv_freq in self._inv_freq.items()}
        embedded = F.embedding(step.token_ids, self.embed).to(self.dtype)
        streams = embedded[:, None].expand(-1, self.config.hc_mult, -1)
        for i, block in enumerate(self.blocks):
            turn = turns[block.attention.compressor is not None]
            block.guess(streams)
            states = [cast(LayerState, span.state.layers[i]) for span in step.spans]
            streams = block.attention_site(streams, lambda x: block.attention(x, step, states, turn))  # noqa: B023
            note_faults(step, i, "attention", streams)
            streams = block.moe_site(streams, lambda x: block.moe(x, step))  # noqa: B023
            note_faults(step, i, "mixture of experts", streams)
        step.commit()
        hidden = self.hyper_head(streams[step.logit_rows])
        return linear_float32(
            ops.rms_norm(hidden, self.norm, self.config.rms_norm_eps, library=self._fast_library), self.head
        )

    def _layer_state(self, layer: int) -> LayerState:
        c, dtype = self.config, self.dtype
        ratio = c.compress_ratios[layer]
        csa = c.layer_kind(layer) == "csa"
        window = Window(c.sliding_window, c.head_dim, dtype)
        if not ratio:
            return LayerState(window)

        def compressed(width: int) -> Compressed:
            return Compressed(EntryPool(width, dtype), OpenRows(ratio, width * (2 if csa else 1), overlap=csa))

        return LayerState(window, compressed(c.head_dim), compressed(c.index_head_dim) if csa else None)

    def _bind_block(self, layer: int) -> Block:
        prefix = f"layers.{layer}"
        both = shared(self._bind_expert(mlp_names(f"{prefix}.ffn.shared_experts")))
        return Block(
            self._bind_site(prefix, "attn"),
            self._bind_attention(layer),
            self._bind_site(prefix, "ffn"),
            MoE(layer, self._bind_router(layer), self.experts, both),
        )

    def _bind_attention(self, layer: int) -> SparseAttention:
        c, p, get, matrix = self.config, f"layers.{layer}.attn", self._get, self._matrix
        kind, inv_freq = c.layer_kind(layer), self._inv_freq[True]
        compressor = indexer = None
        if kind != "sliding":
            compressor = Compressor.bind(get, matrix, f"{p}.compressor", inv_freq, c.rms_norm_eps)
        if kind == "csa":
            keys = Compressor.bind(get, matrix, f"{p}.indexer.compressor", inv_freq, c.rms_norm_eps)
            wq_b, weights = matrix(f"{p}.indexer.wq_b.weight"), matrix(f"{p}.indexer.weights_proj.weight")
            indexer = Indexer(wq_b, weights, keys, c.index_num_heads, c.index_head_dim, c.index_topk)
        return SparseAttention(
            wq_a=matrix(f"{p}.wq_a.weight"),
            q_norm=tensor(get, f"{p}.q_norm.weight"),
            wq_b=matrix(f"{p}.wq_b.weight"),
            wkv=matrix(f"{p}.wkv.weight"),
            kv_norm=tensor(get, f"{p}.kv_norm.weight"),
            wo_a=matrix(f"{p}.wo_a.weight"),
            wo_b=matrix(f"{p}.wo_b.weight"),
            sink=tensor(get, f"{p}.attn_sink"),
            compressor=compressor,
            indexer=indexer,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            rope_dim=c.rope_head_dim,
            o_groups=c.o_groups,
            window=c.sliding_window,
            eps=c.rms_norm_eps,
            quantize_kv=self.quantize_kv,
            library=self._library,
            norm_library=self._fast_library,
        )

    def _bind_site(self, prefix: str, site: str) -> HyperConnection:
        c = self.config
        fn, base, scale = (tensor(self._get, f"{prefix}.hc_{site}_{part}") for part in ("fn", "base", "scale"))
        norm = tensor(self._get, f"{prefix}.{site}_norm.weight")
        return HyperConnection(fn, base, scale, norm, c.hc_sinkhorn_iters, c.rms_norm_eps, c.hc_eps, self._library)

    def _bind_router(self, layer: int) -> BiasRouter:
        c, p = self.config, f"layers.{layer}.ffn.gate"
        hashed = c.is_hash(layer)
        bias = None if hashed else tensor(self._get, f"{p}.bias")
        tid2eid = tensor(self._get, f"{p}.tid2eid") if hashed else None
        return BiasRouter(
            gate=self._matrix(f"{p}.weight"),
            top_k=c.experts_per_token,
            scale=c.routed_scaling_factor,
            normalize=c.norm_topk_prob,
            tid2eid=tid2eid,
            bias=bias,
        )

    def _expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        return expert_names(self.config, layer, expert)


def plain_frequencies(config: DeepseekV4Config) -> Tensor:
    """Sliding layers: base rope_theta, never YaRN."""
    return ops.rope_frequencies(config.rope_head_dim, config.rope_theta)


def compressed_frequencies(config: DeepseekV4Config) -> Tensor:
    """Compressed layers: base compress_rope_theta with YaRN at every length; queries, keys and entries alike."""
    dim, base, yarn = config.rope_head_dim, config.compress_rope_theta, config.yarn
    if yarn is None:
        return ops.rope_frequencies(dim, base)
    return ops.yarn_frequencies(dim, base, yarn.factor, yarn.original_max_position, yarn.beta_fast, yarn.beta_slow)
