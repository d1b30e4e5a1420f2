"""A DeepSeek-V4 model that finds needles by construction: every weight is set by hand, nothing is trained.

A question's last token is a key; the answer is what followed that key in the haystack. Two routes lead there, and each
kind of key has only one of them, so that neither hides a fault of the other:

- CSA (layer 1). An entry holds, for each of its four tokens, the code of the token before it (for the first one that is
  the last of the previous window: the overlap) and its own code, in channels of their own, kept apart by the biases of
  the positions. Query head j, and index head j, look for the last token's code among the former ones of place j.
- HCA (layer 2). Layer 0 copies from each token to the next, by relative position, which key it is. The gate lets the
  token after a key outweigh all others of its 128, so the entry holds the key and what followed it.

Values are found by CSA as well, so an answer of several tokens is read one after the other. What is not found goes to
the sink, and the model says NOTHING. Experts are random and add noise. Knows weights; does not know haystacks.
Memory: about 3 MB."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from localmoe.bench.synthetic import Held, Source
from localmoe.formats import FORMATS
from localmoe.kernels.reference import rope_frequencies
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_names import tensor_inventory

# Token ids. Every other one is filler.
BOS, EOS, NOTHING = 0, 1, 2
VALUES = range(3, 131)
CSA_KEYS = range(131, 147)
HCA_KEYS = range(147, 163)
FILLER = range(163, 512)

# A token's code: so many signs; of two codes, one of a key or a value, at most three quarters of them agree.
_CODE = 24
_KINDS = len(HCA_KEYS) + 1
# Parts of the hidden state: a token's code; which HCA key it is, or none; a constant; which key the token before is;
# the answer.
_CODES = slice(0, 24)
_KIND = slice(24, 41)
_CONSTANT = 41
_BEFORE = slice(42, 59)
_ANSWER = slice(59, 83)
# How large a kind and the constant are beside the 24 ones of a code: well above the noise of experts.
_SIZE = 4.0
# Codes that are alike to half can come together four in an entry: 4 * (1/2 - 3/8) < 1 - 3/8.
_SIMILAR = 3 / 8
# A head's last dimension before the rotated ones: in queries alone, so that a query without a key stays small.
_IDLE = 192
# Scores of attention: about this for the entry sought, at most half of it for others, and the sink between.
_FOUND, _SINK = 60.0, 45.0
# The shares of the three fastest rotations in looking one token back: any other distance loses a fifth or more.
_BACK = (0.6, 0.25, 0.15)

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": FILLER.stop,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 224,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 48,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 128,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1 << 20,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}


def needle_config() -> DeepseekV4Config:
    return DeepseekV4Config.from_dict(CONFIG, "the needle model")


def needle_weights(held: Held, *, seed: int = 0) -> dict[str, Source]:
    """The weights in published formats, as the loader would give them."""
    inventory, state = tensor_inventory(needle_config()), needle_state(seed)
    weights: dict[str, Source] = {}
    for name, spec in inventory.items():
        packed = FORMATS.get(spec.published)
        weights[name] = state[name].to(held.of(spec)) if packed is None else packed.quantize(state[name])
    return weights


def needle_state(seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights (int64 tid2eid) by published name. The same seed gives the same weights."""
    config, generator = needle_config(), torch.Generator().manual_seed(seed)
    state = {name: torch.zeros(spec.shape) for name, spec in tensor_inventory(config).items()}
    codes = _codes(generator)
    _embedding_and_head(state, codes)
    for name in [name for name in state if name.endswith("norm.weight")]:
        state[name].fill_(1.0)
    for layer in range(config.num_layers):
        _streams(state, f"layers.{layer}.hc_", generator)
        _experts(state, f"layers.{layer}.ffn.", generator)
        _queries(state[f"layers.{layer}.attn.wq_a.weight"])
    _look_back(state, "layers.0.attn.")
    _csa(state, "layers.1.attn.")
    _hca(state, "layers.2.attn.")
    # Four equal streams make their mean.
    state["hc_head_base"].fill_(-math.log(3))
    state["hc_head_scale"].fill_(1.0)
    tokens = torch.arange(config.vocab_size)[:, None]
    state["layers.0.ffn.gate.tid2eid"] = (tokens + torch.arange(config.experts_per_token)) % config.num_experts
    return state


def _codes(generator: torch.Generator) -> Tensor:
    """[vocab, 24] of 1 and -1; zeros for what CSA must not find."""
    codes = torch.zeros(FILLER.stop, _CODE)
    for token in (*VALUES, *CSA_KEYS, *FILLER):
        others = codes[: token if token < FILLER.start else FILLER.start]
        while True:
            code = torch.randint(2, (_CODE,), generator=generator) * 2.0 - 1
            if float((others @ code).max()) <= _CODE / 2:
                break
        codes[token] = code
    return codes


def _embedding_and_head(state: dict[str, Tensor], codes: Tensor) -> None:
    embed, head = state["embed.weight"], state["head.weight"]
    embed[:, _CODES], embed[:, _CONSTANT] = codes, _SIZE
    kinds = torch.full((len(codes),), _KINDS - 1)
    kinds[HCA_KEYS.start : HCA_KEYS.stop] = torch.arange(len(HCA_KEYS))
    embed[:, _KIND] = _SIZE * torch.nn.functional.one_hot(kinds, _KINDS)
    head[:, _ANSWER] = codes
    # Half of what a found answer gives.
    head[NOTHING, _CONSTANT] = _CODE / 2 / _SIZE


def _streams(state: dict[str, Tensor], prefix: str, generator: torch.Generator) -> None:
    """Nearly the plain residual x + f(x) in every stream, each token a little differently."""
    for site in ("attn", "ffn"):
        fn, base = state[f"{prefix}{site}_fn"], state[f"{prefix}{site}_base"]
        fn.copy_(0.005 * torch.randn(fn.shape, generator=generator))
        base[:4], base[8:] = -math.log(3), torch.randn(16, generator=generator)
        state[f"{prefix}{site}_scale"].fill_(1.0)


def _experts(state: dict[str, Tensor], prefix: str, generator: torch.Generator) -> None:
    """Random ones; what they add is small beside the codes."""
    for name in [name for name in state if name.startswith(prefix) and name.endswith(".weight")]:
        small = 0.05 if name.endswith("w2.weight") else 1.0
        rows, cols = state[name].shape
        state[name] = small * cols**-0.5 * torch.randn(rows, cols, generator=generator)


# Of the query latent: a token's code, which HCA key it is, and 1.
_LATENT_CODE, _LATENT_KEY, _LATENT_ONE = slice(0, 24), slice(24, 40), 40


def _queries(wq_a: Tensor) -> None:
    wq_a[_LATENT_CODE, _CODES] = torch.eye(_CODE)
    wq_a[_LATENT_KEY, _KIND] = torch.eye(_KINDS)[:-1]
    wq_a[_LATENT_ONE, _CONSTANT] = 1 / _SIZE


def _look_back(state: dict[str, Tensor], prefix: str) -> None:
    """Head 0 attends to the token before, whatever it is, and brings its kind."""
    width, rope = CONFIG["head_dim"], CONFIG["qk_rope_head_dim"]
    angles = rope_frequencies(rope, CONFIG["rope_theta"])
    wq, wkv = state[f"{prefix}wq_b.weight"], state[f"{prefix}wkv.weight"]
    wkv[:_KINDS, _KIND] = torch.eye(_KINDS)
    for pair, share in enumerate(_BACK):
        size, even = math.sqrt(share), width - rope + 2 * pair
        # A key one token back has turned by one angle less.
        wq[even, _LATENT_ONE] = size * math.cos(angles[pair])
        wq[even + 1, _LATENT_ONE] = -size * math.sin(angles[pair])
        wkv[even, _CONSTANT] = size
    state[f"{prefix}kv_norm.weight"][width - rope :] = 16.0
    # Half of a row's square is its kind.
    norm = math.sqrt(width / (2 * _SIZE**2))
    _read(state, prefix, 0, slice(0, _KINDS), _BEFORE, norm)


def _csa(state: dict[str, Tensor], prefix: str) -> None:
    """Head j finds the last token's code before place j of a window, and brings the code that is there."""
    width, index_width = CONFIG["head_dim"], CONFIG["index_head_dim"]
    index_one = 4 * _CODE
    eye = torch.eye(_CODE)
    for place in range(4):
        key = slice(2 * _CODE * place, 2 * _CODE * place + _CODE)
        value = slice(key.stop, key.stop + _CODE)
        index_key = slice(_CODE * place, _CODE * place + _CODE)
        _collect(state, f"{prefix}compressor.", width, key, place - 1)
        _collect(state, f"{prefix}compressor.", width, value, place)
        _collect(state, f"{prefix}indexer.compressor.", index_width, index_key, place - 1)
        head = state[f"{prefix}wq_b.weight"][width * place : width * (place + 1)]
        head[key, _LATENT_CODE], head[_IDLE, _LATENT_ONE] = eye, 2.0
        index_head = state[f"{prefix}indexer.wq_b.weight"][index_width * place : index_width * (place + 1)]
        # Taken off before ReLU, so that an entry with four similar codes stays below the one with the same code.
        index_head[index_key, _LATENT_CODE], index_head[index_one, _LATENT_ONE] = eye, -_SIMILAR * _CODE
        _read(state, prefix, place, value, _ANSWER, math.sqrt(width / (8 * _CODE)))
        state[f"{prefix}compressor.norm.weight"][key] = _sharpness(_CODE, 4.0, 8 * _CODE)
    state[f"{prefix}indexer.compressor.wkv.weight"][index_width + index_one, _CONSTANT] = 1 / _SIZE
    state[f"{prefix}indexer.weights_proj.weight"][:, _CONSTANT] = 1.0
    state[f"{prefix}attn_sink"].fill_(_SINK)


def _collect(state: dict[str, Tensor], prefix: str, width: int, channels: slice, place: int) -> None:
    """Let these channels of an entry hold the code of the token at this place of its window; -1: the one before."""
    half = 0 if place < 0 else width
    into = slice(half + channels.start, half + channels.stop)
    state[f"{prefix}wkv.weight"][into, _CODES] = torch.eye(_CODE)
    state[f"{prefix}ape"][place % 4, into] = 20.0


def _hca(state: dict[str, Tensor], prefix: str) -> None:
    """Head 0 finds the entry of a window in which the last token, a key, was seen; it brings what followed."""
    width, keys = CONFIG["head_dim"], len(HCA_KEYS)
    wkv, wgate = state[f"{prefix}compressor.wkv.weight"], state[f"{prefix}compressor.wgate.weight"]
    value = slice(keys, keys + _CODE)
    wkv[:keys, _BEFORE] = torch.eye(_KINDS)[:-1]
    wkv[value, _CODES] = torch.eye(_CODE)
    wgate[: value.stop, _BEFORE.stop - 1] = -8.0
    wq = state[f"{prefix}wq_b.weight"]
    wq[:keys, _LATENT_KEY], wq[_IDLE, _LATENT_ONE] = torch.eye(keys), 2.0
    square = _SIZE**2 + _CODE
    state[f"{prefix}compressor.norm.weight"][:keys] = _sharpness(_SIZE**2, 4.0, square)
    _read(state, prefix, 0, value, _ANSWER, math.sqrt(width / square))
    state[f"{prefix}attn_sink"].fill_(_SINK)


def _sharpness(match: float, idle: float, square: float) -> float:
    """By how much keys must be larger for a score of _FOUND. match: square of what a query and its entry have in
    common; idle: of the query's rest; square: of the whole entry."""
    width = CONFIG["head_dim"]
    score = match * math.sqrt(width / (match + idle)) * math.sqrt(width / square) / math.sqrt(width)
    return _FOUND / score


def _read(state: dict[str, Tensor], prefix: str, head: int, channels: slice, into: slice, norm: float) -> None:
    """Add these channels of what a head brings to a part of the hidden state, divided by `norm`."""
    heads = CONFIG["num_attention_heads"] // CONFIG["o_groups"]
    group, at = divmod(head, heads)
    size, rank, begin = into.stop - into.start, CONFIG["o_lora_rank"], at * CONFIG["head_dim"]
    wo_a = state[f"{prefix}wo_a.weight"][group * rank : group * rank + size]
    wo_a[:, begin + channels.start : begin + channels.stop] = torch.eye(size) / norm
    state[f"{prefix}wo_b.weight"][into, group * rank : group * rank + size] = torch.eye(size)
