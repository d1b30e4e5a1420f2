"""The torch twin of every op: fp32 accumulation, numbered steps, no cleverness. This file is the specification.

Knows tensors only: no layers, files or caches. Differentiable, because localmoe-mini is trained through it.
Memory: nothing is kept between calls; attention builds [queries, heads, keys] scores, so callers pass query blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.kernels.codecs import FP8_MAX, power_of_two_scale


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm of the last dimension, in fp32, rounded once to x's dtype.

    weight: [D] or None for the unweighted norm of query heads and hyper-connection inputs."""
    y = F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
    return y.to(x.dtype)


def rope_frequencies(dim: int, base: float) -> Tensor:
    """inv_freq [dim / 2] float32: base ** (-2i / dim). Source: RoFormer, eq. 15."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_frequencies(
    dim: int, base: float, factor: float, original_max_position: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """YaRN by parts: fast pairs keep their frequency, slow ones are divided by factor, a linear ramp between.

    No attention factor: V4 leaves both cos/sin and the softmax scale alone. Source: YaRN, section 3.2."""

    def pair_turning(rotations: float) -> float:
        return dim * math.log(original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_turning(beta_fast)), 0)
    high = min(math.ceil(pair_turning(beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    ramp = ramp.clamp(0, 1)
    inv_freq = rope_frequencies(dim, base)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs in the LAST 2 * P dimensions of x; the others pass through.

    x: [T, ..., D]; cos, sin: [T, P] float32. Pass -sin for the inverse rotation."""
    pairs = cos.shape[-1]
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (pairs,)
    cos, sin = cos.view(shape), sin.view(shape)
    head, tail = x[..., : -2 * pairs], x[..., -2 * pairs :]
    even, odd = tail.float().unflatten(-1, (pairs, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((head, turned.to(x.dtype)), dim=-1)


def hyper_mix(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three mixing weights of a manifold-constrained hyper-connection.

    streams: [T, S, D]; fn: [(2 + S) * S, S * D]; base: [(2 + S) * S]; scale: [3]; all weights float32.
    Returns pre [T, S], post [T, S] and comb [T, S, S] float32; comb[:, j, k] carries stream j into stream k and is
    doubly stochastic up to eps. Source: DeepSeek-V4 report, section 2.2, with the eps of the official code."""
    s = streams.shape[1]
    # 1. one projection of all streams, scaled by their common unweighted RMS
    mix = _project_streams(streams, fn, norm_eps)
    # 2. gates into and out of the sublayer
    pre = torch.sigmoid(mix[:, :s] * scale[0] + base[:s]) + eps
    post = 2 * torch.sigmoid(mix[:, s : 2 * s] * scale[1] + base[s : 2 * s])
    # 3. Sinkhorn: softmax over the row, one column step, then row and column in turn, ending on columns.
    #    Tokens are the last axis here: sums over an axis of 4 vectorise only when they are not the innermost.
    comb = (mix[:, 2 * s :] * scale[2] + base[2 * s :]).t().reshape(s, s, -1).softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return pre, post, comb.permute(2, 0, 1).contiguous()


def _project_streams(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """fn applied to all streams of a token, divided by their common RMS: [T, S, D] -> [T, rows of fn] float32."""
    v = streams.flatten(1).float()
    mean_square = torch.linalg.vector_norm(v, dim=-1, keepdim=True).square() / v.shape[-1]
    return F.linear(v, fn) * torch.rsqrt(mean_square + eps)


def hyper_collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """Sublayer input: sum over streams of pre * stream. [T, S, D], [T, S] -> [T, D]."""
    return torch.bmm(pre[:, None], streams.float())[:, 0].to(streams.dtype)


def hyper_expand(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Sublayer output back into the streams: X'_k = post_k * y + sum_j comb[j, k] * X_j. Returns [T, S, D]."""
    mixed = torch.bmm(comb.transpose(1, 2), streams.float())
    return torch.addcmul(mixed, post[:, :, None], y.float()[:, None]).to(streams.dtype)


def hyper_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    """Final collapse of the streams, [T, S, D] -> [T, D]. fn: [S, S * D]; base: [S]; scale: [1]."""
    mix = _project_streams(streams, fn, norm_eps)
    return hyper_collapse(streams, torch.sigmoid(mix * scale + base) + eps)


def pool_windows(kv: Tensor, score: Tensor) -> Tensor:
    """Softmax-weighted mean of each window, per channel. kv, score: [W, rows, d] float32 -> [W, d]."""
    return (score.softmax(dim=1) * kv).sum(dim=1)


def pool_overlapping(kv: Tensor, score: Tensor, previous: tuple[Tensor, Tensor] | None) -> Tensor:
    """Pool windows that reach back over the one before: previous rows give channels [0, d), own rows [d, 2d).

    kv, score: [W, m, 2d] float32; previous: (kv, score) [m, 2d] of the window before the first, None at position 0.
    Returns [W, d]. Source: DeepSeek-V4 report, section 2.3.1 (the two series of a CSA compressor)."""
    return pool_windows(*overlapping(kv, score, previous))


def overlapping(kv: Tensor, score: Tensor, previous: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The windows [W, 2m, d] that pool_overlapping pools: kv and score."""
    d = kv.shape[-1] // 2
    if previous is None:
        previous = (torch.zeros_like(kv[0]), torch.full_like(score[0], -math.inf))
    before_kv = torch.cat((previous[0][None], kv[:-1]))[..., :d]
    before_score = torch.cat((previous[1][None], score[:-1]))[..., :d]
    return torch.cat((before_kv, kv[..., d:]), 1), torch.cat((before_score, score[..., d:]), 1)


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Lightning indexer: sum over heads of weight * relu(q . key).

    q: [n, H, d]; keys: [E, d]; weights: [n, H], already scaled by (d * H) ** -0.5. Returns [n, E] float32.
    Source: DeepSeek-V4 report, eq. 15-16."""
    scores = (q.float().flatten(0, 1) @ keys.float().t()).relu_().unflatten(0, q.shape[:2])
    return torch.bmm(weights.float()[:, None], scores)[:, 0]


def select_top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dimension; equal scores go to the smaller index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def sparse_attention(
    q: Tensor, window: Tensor, window_mask: Tensor | None, entries: Tensor, entry_bias: Tensor | None, sink: Tensor
) -> Tensor:
    """Shared-latent attention (keys are the values) over window rows and compressed entries, with a sink per head.

    q: [n, H, c]; window: [m, c]; entries: [E, c] for all queries, or [n, E, c] gathered per query;
    window_mask: [n, m] bool, True where visible; entry_bias: [n, E] float32, -inf where hidden; None = all visible.
    sink: [H] float32 joins the softmax's denominator only. Returns [n, H, c] in q's dtype.
    Source: DeepSeek-V4 report, section 2.3; the sink is part of the maximum, so that a large one cannot overflow."""
    scale = q.shape[-1] ** -0.5
    qf, window, entries = q.float(), window.float(), entries.float()
    # 1. scores, hidden ones -inf
    z = qf @ window.t() * scale  # [n, H, m]
    if window_mask is not None:
        z = z.masked_fill(~window_mask[:, None], -math.inf)
    ze = qf @ entries.transpose(-1, -2) * scale  # [n, H, E]
    if entry_bias is not None:
        ze = ze + entry_bias[:, None]
    # 2. softmax over window, entries and the value-less sink
    p = torch.cat((z, ze, sink[None, :, None].expand(len(q), -1, 1)), dim=-1).softmax(dim=-1)
    # 3. weighted sum of the same rows
    m = window.shape[0]
    return (p[..., :m] @ window + p[..., m:-1] @ entries).to(q.dtype)


def latent_attention(q: Tensor, cache: Tensor, seen: Tensor | None, *, width: int, scale: float) -> Tensor:
    """Multi-head latent attention with its up-projections absorbed: all heads read the same rows.

    q: [n, H, c], the latent part first, then the rotated part; cache: [S, c] likewise, or [n, K, c] picked for each
    query; seen: [n, S] bool, None = all. width: of the latent part, which is the value. Returns [n, H, width].
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2 and appendix C."""
    cache = cache.float()
    z = q.float() @ cache.transpose(-1, -2) * scale
    if seen is not None:
        z = z.masked_fill(~seen[:, None], -math.inf)
    return (z.softmax(dim=-1) @ cache[..., :width]).to(q.dtype)


def expanded_attention(
    q: Tensor,
    cache: Tensor,
    expand: Callable[[Tensor], Tensor],
    *,
    width: int,
    first: int,
    scale: float,
    block: int = 512,
) -> Tensor:
    """The same for many queries, with keys and values of each head made from the rows again, a block at a time.

    q: [n, H, dn + dr] of consecutive tokens, each seeing cache rows up to its own, the first one cache row `first`;
    cache: [S, R + dr]; width: R; expand: the up-projection, [m, R] -> [m, H, dn + dv]. Returns [n, H, dv].
    Memory: keys, values and scores of one block.
    Source: as latent_attention; the running maximum and sum are those of Milakov and Gimelshein (arXiv 1805.02867)."""
    n, shared = len(q), cache.shape[-1] - width
    queries = q.float().transpose(0, 1) * scale  # [H, n, dn + dr]
    top = queries.new_full((*queries.shape[:2], 1), -math.inf)
    total, out = torch.zeros_like(top), queries.new_zeros(())
    last = torch.arange(first, first + n, device=q.device)
    for at in range(0, first + n, block):
        # 1. this block's keys and values
        rows = cache[at : min(at + block, first + n)]
        expanded = expand(rows[:, :width]).float().transpose(0, 1)  # [H, m, dn + dv]
        dn = q.shape[-1] - shared
        keys = torch.cat((expanded[..., :dn], rows[:, width:].float().expand(len(expanded), -1, -1)), dim=-1)
        # 2. scores; only blocks past the first query hide anything
        z = torch.bmm(queries, keys.transpose(1, 2))
        if at + len(rows) > first + 1:
            z = z.masked_fill(torch.arange(at, at + len(rows), device=q.device) > last[:, None], -math.inf)
        # 3. what was summed so far is scaled to the new maximum
        higher = torch.maximum(top, z.amax(-1, keepdim=True))
        p, kept = (z - higher).exp(), (top - higher).exp()
        total = total * kept + p.sum(-1, keepdim=True)
        out = out * kept + torch.bmm(p, expanded[..., dn:])
        top = higher
    return (out / total).transpose(0, 1).to(q.dtype)


def half_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + P) of the FIRST 2 * P dimensions of x; the others pass through. Shapes as of rope()."""
    pairs = cos.shape[-1]
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (pairs,)
    cos, sin = cos.view(shape), sin.view(shape)
    one, two = x[..., :pairs].float(), x[..., pairs : 2 * pairs].float()
    turned = torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * pairs :]), dim=-1)


def router_scores(logits: Tensor) -> Tensor:
    """sqrt(softplus(logit)), stable for any finite logit. [T, E] float32."""
    return torch.sqrt(F.relu(logits) + torch.log1p(torch.exp(-logits.abs())))


def route(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """Expert ids [T, K] of the largest score + bias; the bias only selects. Ties go to the smaller id."""
    return select_top(scores + bias, top_k)


def choose_groups(scores: Tensor, groups: int, keep: int, best: int) -> Tensor:
    """Hide all experts but those of the best groups: scores [T, E] with -inf elsewhere.

    A group's score is the sum of its `best` largest. Ties go to the first group.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.2.2, best = 1; V3 (2412.19437), section 2.1.2, best = 2."""
    grouped: Tensor = scores.unflatten(-1, (groups, -1))
    of_groups = grouped.topk(best, dim=-1).values.sum(-1)
    kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter(-1, select_top(of_groups, keep), True)
    return grouped.masked_fill(~kept[..., None], -math.inf).flatten(-2)


def routing_weights(scores: Tensor, ids: Tensor, scale: float, *, normalize: bool) -> Tensor:
    """Unbiased scores of the chosen experts, normalised to sum to 1 when asked, times scale. Returns [T, K] float32."""
    chosen = scores.gather(1, ids)
    if normalize:
        chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return chosen * scale


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in fp32, returned in gate's dtype."""
    hidden = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)
    return hidden.to(gate.dtype)


def fake_quant_fp8(x: Tensor, block: int) -> Tensor:
    """Round the last dimension to e4m3 with one power-of-two scale per block, and back: what an FP8 cache would hold.

    A last, shorter block has its own scale. Straight-through for gradients.
    Source: official V4 inference code (act_quant with ue8m0 scales)."""
    size = x.shape[-1]
    blocks = F.pad(x.detach().float(), (0, -size % block)).unflatten(-1, (-1, block))
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4), FP8_MAX)
    rounded: Tensor = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return (x + (rounded.flatten(-2)[..., :size] - x.detach())).to(x.dtype)


def fake_quant_int8(x: Tensor) -> Tensor:
    """Round every 32 numbers of the last dimension to 127 steps of their largest magnitude, and back, in float32.

    What the AVX2 and VNNI kernels multiply weights of codes with (LM_FAST). Groups whose largest magnitude is below
    1e-30 become zeros; one with NaN or infinity becomes NaN. The last group may be shorter."""
    size = x.shape[-1]
    groups = F.pad(x.float(), (0, -size % 32)).unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    # A tensor, because torch divides a plain number by multiplying it with a rounded reciprocal.
    inverse = torch.tensor(127.0) / largest
    codes = (groups * inverse).round().where(largest >= 1e-30, 0)
    rounded: Tensor = codes * (largest / 127).where(largest.isfinite(), math.nan)
    return rounded.flatten(-2)[..., :size]
