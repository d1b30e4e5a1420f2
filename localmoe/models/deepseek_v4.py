"""DeepSeek-V4: names of its tensors, and how the blocks are stacked. Source: spec of the official inference code and
the V4 technical report (arXiv 2606.19348), sections 2.1-2.3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack, cast

from torch import Tensor
from torch.nn import functional as F

from localmoe import ops
from localmoe.cache import Compressed, EntryPool, LayerState, OpenRows, Window
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
from localmoe.models.inputs import Inputs, Kept, Tables, named, turn_of
from localmoe.models.model import Binder, Model, Options, Outside
from localmoe.sequence import SequenceState
from localmoe.step import Places, Step, note_faults
from localmoe.weights import Weight, linear_float32

# Names of the tables of a step: angles without and with compression, and by ratio those of the first positions of
# compressed windows; by layer the experts that a token's id chooses.
_TURN, _FIRST, _CHOSEN = {False: "turn", True: "compressed"}, "first.{}", "chosen.{}"


@dataclass(frozen=True)
class Block:
    """One layer: attention and MoE, each inside its own hyper-connection."""

    attention_site: HyperConnection
    attention: SparseAttention
    moe_site: HyperConnection
    moe: MoE

    def guess(self, streams: Tensor, step: Step) -> None:
        """While attention runs, experts that will probably be chosen after it can be read."""
        self.moe.guess(lambda: self.moe_site.enter(streams), step)

    def sample_weights(self) -> tuple[Weight, ...]:
        """A few of this layer's weights, enough to tell two models apart."""
        return self.attention.wq_a, self.attention.wo_b, self.moe.router.gate, self.moe.shared.w1, self.moe.shared.w2


class DeepseekV4(Model):
    """A bound model."""

    config: DeepseekV4Config

    def __init__(self, config: DeepseekV4Config, get: Lookup, **options: Unpack[Options]) -> None:
        super().__init__(config, get, Outside("embed.weight", "norm.weight", "head.weight"), **options)
        last = self._at(config.num_layers - 1)
        self.hyper_head = HyperHead.bind(last.tensor, config.rms_norm_eps, config.hc_eps, strict=last.site.strict)
        self._ratios = sorted(set(config.compress_ratios) - {0})
        self._inv_freq = {False: plain_frequencies(config), True: compressed_frequencies(config)}
        self.blocks: list[Block] = [self._bind_block(layer) for layer in range(config.num_layers)]

    def new_state(self) -> SequenceState:
        return SequenceState([self._layer_state(i) for i in range(self.config.num_layers)])

    def _inputs(self, step: Step) -> Inputs:
        tables = {"positions": step.positions}
        # First, so that experts can be read meanwhile.
        for i, block in enumerate(self.blocks):
            if (chosen := block.moe.chosen_early(step.token_ids)) is not None:
                tables[_CHOSEN.format(i)] = chosen
        for compressed, inv_freq in self._inv_freq.items():
            tables |= named(_TURN[compressed], rotation(step.positions, inv_freq))
        if self._read_by_devices(step):
            tables["slots"] = step.positions % self.config.sliding_window
            for m in self._ratios:
                tables |= named(_FIRST.format(m), rotation(step.positions // m * m, self._inv_freq[True]))
        return Inputs(F.embedding(step.token_ids, self.embed).to(self.dtype), tables)

    def compute(self, step: Step, inputs: Inputs | Kept) -> Tensor:
        there = self._there(step, inputs)
        turns = {
            (device, compressed): turn_of(tables, name, self._libraries[device])
            for device, (_, tables) in there.items()
            for compressed, name in _TURN.items()
        }
        hidden = step.bring(inputs.hidden, self.sites[0].device)
        streams = hidden[:, None].expand(-1, self.config.hc_mult, -1).contiguous()
        for i, (block, site) in enumerate(zip(self.blocks, self.sites, strict=True)):
            streams = step.bring(streams, site.device)
            here, tables = there[site.device]
            turn, chosen = turns[site.device, block.attention.compressor is not None], tables.get(_CHOSEN.format(i))
            block.guess(streams, step)
            states = [cast(LayerState, span.state.layers[i]) for span in step.spans]
            streams = block.attention_site(streams, lambda x: block.attention(x, here, states, turn))  # noqa: B023
            note_faults(step, i, "attention", streams)
            streams = block.moe_site(streams, lambda x: block.moe(x, here, chosen))  # noqa: B023
            note_faults(step, i, "mixture of experts", streams)
        hidden = self.hyper_head(step.wanted(streams))
        library = self.sites[-1].fast_library
        normed = ops.rms_norm(hidden, self.norm, self.config.rms_norm_eps, library=library)
        return linear_float32(normed, self.head)

    def changes_at(self) -> list[int]:
        c = self.config
        return [(c.index_topk + 1) * m - 1 for m in self._ratios if m == c.csa_ratio]

    def _places(self, tables: Tables) -> Places:
        turns = {m: (tables[f"{_FIRST.format(m)}.cos"], tables[f"{_FIRST.format(m)}.sin"]) for m in self._ratios}
        return Places(tables["positions"], tables["slots"], turns)

    def _layer_state(self, layer: int) -> LayerState:
        c, dtype, device = self.config, self.dtype, self.sites[layer].device
        ratio = c.compress_ratios[layer]
        csa = c.layer_kind(layer) == "csa"
        window = Window(c.sliding_window, c.head_dim, dtype, device)
        if not ratio:
            return LayerState(window)

        def compressed(width: int) -> Compressed:
            rows = OpenRows(ratio, width * (2 if csa else 1), overlap=csa, device=device)
            return Compressed(EntryPool(width, dtype, device), rows)

        return LayerState(window, compressed(c.head_dim), compressed(c.index_head_dim) if csa else None)

    def _bind_block(self, layer: int) -> Block:
        prefix, binder = f"layers.{layer}", self._at(layer)
        both = shared(binder.expert(mlp_names(f"{prefix}.ffn.shared_experts"), self.config.swiglu_limit))
        return Block(
            self._bind_hyper(binder, prefix, "attn"),
            self._bind_attention(binder, layer),
            self._bind_hyper(binder, prefix, "ffn"),
            MoE(layer, self._bind_router(binder, layer), self.experts, both),
        )

    def _bind_attention(self, binder: Binder, layer: int) -> SparseAttention:
        c, p, matrix = self.config, f"layers.{layer}.attn", binder.matrix
        kind, inv_freq, library = c.layer_kind(layer), self._inv_freq[True].to(binder.site.device), binder.site.library
        compressor = indexer = None
        if kind != "sliding":
            compressor = Compressor.bind(binder, f"{p}.compressor", inv_freq, c.rms_norm_eps, library)
        if kind == "csa":
            keys = Compressor.bind(binder, f"{p}.indexer.compressor", inv_freq, c.rms_norm_eps, library)
            wq_b, weights = matrix(f"{p}.indexer.wq_b.weight"), matrix(f"{p}.indexer.weights_proj.weight")
            indexer = Indexer(wq_b, weights, keys, c.index_num_heads, c.index_head_dim, c.index_topk)
        return SparseAttention(
            wq_a=matrix(f"{p}.wq_a.weight"),
            q_norm=binder.tensor(f"{p}.q_norm.weight"),
            wq_b=matrix(f"{p}.wq_b.weight"),
            wkv=matrix(f"{p}.wkv.weight"),
            kv_norm=binder.tensor(f"{p}.kv_norm.weight"),
            wo_a=matrix(f"{p}.wo_a.weight"),
            wo_b=matrix(f"{p}.wo_b.weight"),
            sink=binder.tensor(f"{p}.attn_sink"),
            compressor=compressor,
            indexer=indexer,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            rope_dim=c.rope_head_dim,
            o_groups=c.o_groups,
            window=c.sliding_window,
            eps=c.rms_norm_eps,
            quantize_kv=self.quantize_kv,
            library=library,
            norm_library=binder.site.fast_library,
        )

    def _bind_hyper(self, binder: Binder, prefix: str, which: str) -> HyperConnection:
        c = self.config
        fn, base, scale = (binder.tensor(f"{prefix}.hc_{which}_{part}") for part in ("fn", "base", "scale"))
        norm = binder.tensor(f"{prefix}.{which}_norm.weight")
        return HyperConnection(
            fn, base, scale, norm, c.hc_sinkhorn_iters, c.rms_norm_eps, c.hc_eps, binder.site.library
        )

    def _bind_router(self, binder: Binder, layer: int) -> BiasRouter:
        c, p = self.config, f"layers.{layer}.ffn.gate"
        hashed = c.is_hash(layer)
        bias = None if hashed else binder.tensor(f"{p}.bias")
        tid2eid = tensor(self._get, f"{p}.tid2eid") if hashed else None
        return BiasRouter(
            gate=binder.matrix(f"{p}.weight"),
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
