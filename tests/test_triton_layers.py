"""Triton's attention, indexer, pooling, norms, hyper-connections and router against their twins in reference.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from localmoe.kernels import reference
from tests.loops import noise
from tests.triton_kernels import DEVICE, HAS_GPU, error

# isort: split
from localmoe.kernels.triton import attention, hyper, indexer, norm_rope, router
from localmoe.kernels.triton.router import Scoring

# BF16: the interpreter cuts off instead of rounding.
EXACT, ROUNDED, BF16 = 3e-6, 1.5e-2, 1.6e-2


def on(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


def attends(
    n: int, heads: int, width: int, near: int, far: int, *, mask: bool, bias: bool, own: bool, seed: int = 0
) -> tuple[float, float]:
    """Errors of the exact and the rounded kernel."""
    q, window, sink = noise(n, heads, width, seed=seed), noise(near, width, seed=seed + 1), noise(heads, seed=seed + 2)
    entries = noise(n, far, width, seed=seed + 3) if own else noise(far, width, seed=seed + 3)
    draw = torch.Generator().manual_seed(seed)
    window_mask = torch.rand(n, near, generator=draw) < 0.6 if mask else None
    entry_bias = None
    if bias:
        entry_bias = torch.zeros(n, far).masked_fill(torch.rand(n, far, generator=draw) < 0.5, -math.inf)
    expected = reference.sparse_attention(q, window, window_mask, entries, entry_bias, sink)
    parts = (on(q), on(window), on(window_mask), on(entries), on(entry_bias), on(sink))
    return tuple(error(attention.sparse_attention(*parts, exact=e), expected) for e in (True, False))  # type: ignore


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("near", "far"), [(5, 0), (1, 7), (33, 40), (64, 130)])
def test_attention_equals_its_twin(near: int, far: int, hidden: bool, own: bool) -> None:
    """Odd numbers of heads, keys and dimensions. Fails if a hidden key is seen, or one at a border is seen twice."""
    exact, rounded = attends(3, 5, 24, near, far, mask=hidden, bias=hidden and far > 0, own=own)
    assert exact <= EXACT
    assert rounded <= ROUNDED


def test_parts_of_a_long_context_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a part without any visible key turns into NaN, or the sink is counted once for each part."""
    monkeypatch.setattr(attention, "_PART", 32)
    exact, _ = attends(1, 17, 32, 20, 300, mask=True, bias=True, own=False)
    assert exact <= EXACT
    q, window, entries, sink = noise(1, 2, 16), noise(4, 16, seed=1), noise(90, 16, seed=2), noise(2, seed=3)
    bias = torch.full((1, 90), -math.inf)
    bias[0, 85] = 0.0
    found = attention.sparse_attention(on(q), on(window), None, on(entries), on(bias), on(sink), exact=True)  # type: ignore
    assert error(found, reference.sparse_attention(q, window, None, entries, bias, sink)) <= EXACT


def test_64k_entries() -> None:
    """Fails if an offset or a sum does not hold so many keys. On a GPU with the published head dimension."""
    width, heads = (512, 64) if HAS_GPU else (16, 3)
    q, window, entries = noise(1, heads, width), noise(128, width, seed=1), noise(1 << 16, width, seed=2)
    sink = noise(heads, seed=3)
    expected = reference.sparse_attention(q, window, None, entries, None, sink)
    found = attention.sparse_attention(on(q), on(window), None, on(entries), None, on(sink))  # type: ignore[arg-type]
    assert error(found, expected) <= 3e-2


def test_a_large_sink_takes_all() -> None:
    """Fails if exp(sink) overflows."""
    q, window, entries = noise(2, 2, 16), noise(3, 16), noise(4, 16, seed=1)
    found = attention.sparse_attention(on(q), on(window), None, on(entries), None, on(torch.full((2,), 1e4)))  # type: ignore
    assert not found.any()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("keys", [1, 50, 300])
def test_absorbed_mla_is_attention_whose_values_lack_the_rotary_part(keys: int, hidden: bool, own: bool) -> None:
    """Fails if the rotary part is left out of the scores, or comes into the sum, or a hidden row does."""
    q, cache = noise(2, 6, 40), noise(2, keys, 40, seed=1) if own else noise(keys, 40, seed=1)
    seen = torch.rand(2, keys, generator=torch.Generator().manual_seed(keys)) < 0.5 if hidden else None
    if seen is not None:
        seen[:, -1] = True
    expected = reference.latent_attention(q, cache, seen, width=32, scale=0.17)
    parts = q.to(DEVICE), cache.to(DEVICE), on(seen)
    assert error(attention.latent_attention(*parts, width=32, scale=0.17, exact=True), expected) <= EXACT
    assert error(attention.latent_attention(*parts, width=32, scale=0.17), expected) <= ROUNDED


@pytest.mark.parametrize(("n", "heads", "entries", "width"), [(1, 1, 1, 16), (3, 20, 70, 24), (2, 64, 129, 128)])
def test_index_scores_equal_their_twin(n: int, heads: int, entries: int, width: int) -> None:
    """Fails if relu is taken after the sum over heads, or a block of heads is left out."""
    q, keys, weights = noise(n, heads, width), noise(entries, width, seed=1), noise(n, heads, seed=2)
    expected = reference.index_scores(q, keys, weights)
    parts = (q.to(DEVICE), keys.to(DEVICE), weights.to(DEVICE))
    assert error(indexer.index_scores(*parts, exact=True), expected) <= EXACT
    assert error(indexer.index_scores(*parts), expected) <= ROUNDED
    assert indexer.index_scores(parts[0], parts[1][:0], parts[2]).shape == (n, 0)


def test_nan_makes_an_index_score_nan() -> None:
    """Fails if relu takes it for 0, so that a broken entry is only passed over."""
    q, keys, weights = noise(2, 3, 16), noise(5, 16, seed=1), noise(2, 3, seed=2)
    q[0, 1, 4] = keys[2, 7] = math.nan
    expected = reference.index_scores(q, keys, weights)
    for exact in (True, False):
        found = indexer.index_scores(q.to(DEVICE), keys.to(DEVICE), weights.to(DEVICE), exact=exact)
        assert torch.equal(found.isnan().cpu(), expected.isnan())


@pytest.mark.parametrize(("windows", "rows", "width"), [(1, 4, 8), (3, 128, 20), (5, 7, 100)])
def test_pooling_equals_its_twin(windows: int, rows: int, width: int) -> None:
    """Rows that are hidden, as those before the first window are. Fails if they count, or a channel is left out."""
    kv, score = noise(windows, rows, width), 3 * noise(windows, rows, width, seed=1)
    score[0, : rows // 2] = -math.inf
    found = indexer.pool_windows(kv.to(DEVICE), score.to(DEVICE))
    assert error(found, reference.pool_windows(kv, score)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("shape", "pairs"), [((5, 3, 20), 4), ((2, 64), 32), ((1, 1, 6), 1)])
def test_norm_and_rotation_equal_their_twins(
    shape: tuple[int, ...], pairs: int, weighted: bool, dtype: torch.dtype
) -> None:
    """Fails if another pair is turned, by another token's angle, or the mean is of padding too."""
    x, angle = noise(*shape).to(dtype), 3 * noise(shape[0], pairs, seed=1)
    weight = noise(shape[-1], seed=2) if weighted else None
    expected = reference.rope(reference.rms_norm(x, weight, 1e-6), angle.cos(), angle.sin())
    cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    found = norm_rope.norm_rope(x.to(DEVICE), cos, sin, weight=on(weight), eps=1e-6)
    assert found.dtype == dtype
    assert error(found, expected) <= (EXACT if dtype == torch.float32 else BF16)
    turned = norm_rope.norm_rope(x.to(DEVICE), cos, sin)
    assert error(turned, reference.rope(x, angle.cos(), angle.sin())) <= (EXACT if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("width", [1, 7, 100])
def test_the_norm_alone(width: int) -> None:
    """An odd width, which has no pairs. Fails if the last element is left out."""
    x, weight = noise(3, width), noise(width, seed=1)
    assert (
        error(norm_rope.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6), reference.rms_norm(x, weight, 1e-6)) <= EXACT
    )
    with pytest.raises(ValueError, match="even"):
        norm_rope.norm_rope(noise(1, 7), noise(1, 2), noise(1, 2))


@pytest.mark.parametrize(("tokens", "streams", "width"), [(1, 4, 64), (5, 4, 300), (2, 2, 33)])
def test_hyper_connections_equal_their_twins(tokens: int, streams: int, width: int) -> None:
    """Fails if a gate, a step of Sinkhorn's or a stream is exchanged with another."""
    x, norm = noise(tokens, streams, width), 1 + 0.1 * noise(width, seed=1)
    total = (2 + streams) * streams
    fn, base, scale = noise(total, streams * width, seed=2) * 0.1, noise(total, seed=3), noise(3, seed=4)
    how = {"iterations": 5, "norm_eps": 1e-6, "eps": 1e-6}
    pre, post, comb = reference.hyper_mix(x, fn, base, scale, **how)  # type: ignore[arg-type]
    entered = reference.rms_norm(reference.hyper_collapse(x, pre), norm, 1e-6)
    parts = [tensor.to(DEVICE) for tensor in (x, fn, base, scale, norm)]
    found = hyper.hyper_enter(*parts, **how)  # type: ignore[arg-type]
    for one, expected in zip(found, (entered, post, comb), strict=True):
        assert error(one, expected) <= 1e-5
    y = noise(tokens, width, seed=5)
    expected = reference.hyper_expand(x, y, post, comb)
    assert error(hyper.hyper_expand(parts[0], y.to(DEVICE), post.to(DEVICE), comb.to(DEVICE)), expected) <= EXACT


def test_three_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hyper.hyper_enter(noise(1, 3, 8), noise(15, 24), noise(15), noise(3), noise(8), iterations=1, norm_eps=0, eps=0)


def nan_at(*shape: int, at: tuple[int, ...], seed: int = 0) -> Tensor:
    values = noise(*shape, seed=seed)
    values[at] = math.nan
    return values


def test_other_kernels_keep_nan_where_their_twins_do() -> None:
    """One in a key, a sink, a score or a stream. Fails if a maximum passes it over and nothing else brings it back."""
    q, window, entries, sink = noise(2, 3, 16), noise(4, 16, seed=1), noise(6, 16, seed=2), noise(3, seed=3)
    for parts in (
        (q, nan_at(4, 16, at=(1, 2)), None, entries, None, sink),
        (nan_at(2, 3, 16, at=(0, 1, 2)), window, None, entries, None, sink),
        (q, window, None, entries, None, nan_at(3, at=(1,))),
    ):
        found = attention.sparse_attention(*(on(part) for part in parts), exact=True)  # type: ignore[arg-type]
        assert torch.equal(found.isnan().cpu(), reference.sparse_attention(*parts).isnan())
    kv, score = noise(3, 4, 8), nan_at(3, 4, 8, at=(1, 2, 3))
    score[2, :, 1] = math.nan
    found = indexer.pool_windows(kv.to(DEVICE), score.to(DEVICE))
    assert torch.equal(found.isnan().cpu(), reference.pool_windows(kv, score).isnan())
    x, fn, base, scale = nan_at(3, 2, 8, at=(1, 0, 3)), noise(8, 16), nan_at(8, at=(6,)), noise(3)
    how = {"iterations": 3, "norm_eps": 1e-6, "eps": 1e-6}
    _, post, comb = reference.hyper_mix(x, fn, base, scale, **how)  # type: ignore[arg-type]
    entered = hyper.hyper_enter(*(part.to(DEVICE) for part in (x, fn, base, scale, noise(8))), **how)  # type: ignore
    for one, expected in zip(entered[1:], (post, comb), strict=True):
        assert torch.equal(one.isnan().cpu(), expected.isnan())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (9, 3), (256, 6)])
def test_the_router_equals_its_twins(experts: int, top_k: int, normalize: bool) -> None:
    """Fails if the bias gets into the weights, or of equal scores the larger id is taken."""
    logits, bias = 4 * noise(7, experts), noise(experts, seed=1)
    logits[3] = 0.25
    bias[: experts // 2] = 0.5
    scores = reference.router_scores(logits)
    ids = reference.route(scores, bias, top_k)
    expected = reference.routing_weights(scores, ids, 1.5, normalize=normalize)
    found, weights = router.route(logits.to(DEVICE), bias.to(DEVICE), top_k, 1.5, normalize=normalize)
    assert torch.equal(found.cpu(), ids)
    assert error(weights, expected) <= EXACT


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize(("experts", "groups", "top_k"), [(12, (3, 2, 2), 5), (24, (8, 3, 1), 4), (7, (1, 1, 1), 7)])
def test_the_router_of_groups_equals_its_twins(
    experts: int, groups: tuple[int, int, int], top_k: int, scoring: Scoring
) -> None:
    """Odd numbers of groups and experts, equal scores, with a bias and without. Fails if an expert of a group that is
    left out is chosen, a group is judged by too few or too many, or of equal ones the later is taken."""
    logits = 4 * noise(9, experts)
    logits[3], logits[4, experts // 2 :] = 0.25, logits[4, : experts - experts // 2].clone()
    own = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "sqrtsoftplus": reference.router_scores}
    scores = own[scoring](logits)
    for bias in (None, 0.3 * noise(experts, seed=1)):
        ranked = scores if bias is None else scores + bias
        ids = reference.select_top(reference.choose_groups(ranked, *groups), top_k)
        expected = reference.routing_weights(scores, ids, 2.5, normalize=bias is None)
        how = {"normalize": bias is None, "scoring": scoring, "groups": groups}
        found, weights = router.route(logits.to(DEVICE), on(bias), top_k, 2.5, **how)  # type: ignore[arg-type]
        # Scores that torch works out otherwise in the last bit may change places where they are equal.
        assert torch.equal(found.cpu()[[0, 1, 2, 3, 5, 6, 7, 8]], ids[[0, 1, 2, 3, 5, 6, 7, 8]])
        assert error(weights.sort(1).values, expected.sort(1).values) <= EXACT
    with pytest.raises(ValueError, match="expected at least as many"):
        router.route(logits.to(DEVICE), None, experts + 1, 1.0, normalize=True, groups=groups)


def test_the_router_weighs_a_choice_that_is_given() -> None:
    """Fails if it chooses all the same, or the weights are another's."""
    logits = noise(5, 11)
    given = torch.tensor([[10, 0, 3]] * 4 + [[1, 2, 9]])
    scores = reference.router_scores(logits)
    expected = reference.routing_weights(scores, given, 1.5, normalize=True)
    found, weights = router.route(logits.to(DEVICE), None, 3, 1.5, normalize=True, given=given.to(DEVICE))
    assert torch.equal(found.cpu(), given) and error(weights, expected) <= EXACT


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("experts", [5, 8])
def test_the_router_chooses_what_is_nan_last_and_weighs_it_nan(experts: int, normalize: bool) -> None:
    """One NaN, all but one, and all. Fails if an id is none of an expert or comes twice, or a NaN leaves no trace."""
    logits, bias = noise(4, experts), noise(experts, seed=1)
    logits[1, 2], logits[2, 1:], logits[3] = math.nan, math.nan, math.nan
    ids, weights = (
        tensor.cpu() for tensor in router.route(logits.to(DEVICE), bias.to(DEVICE), 3, 1.5, normalize=normalize)
    )
    scores = reference.router_scores(logits)
    assert torch.equal(ids, reference.route(scores.nan_to_num(-math.inf), bias, 3))
    assert weights.isnan().all(1).tolist() == [False, True, True, True]
    expected = reference.routing_weights(scores, reference.route(scores, bias, 3), 1.5, normalize=normalize)
    assert torch.equal(weights.isfinite().all(1), expected.isfinite().all(1))
    assert error(weights[:1], expected[:1]) <= EXACT


def test_the_router_takes_experts_of_rank_minus_infinity_once() -> None:
    """A bias may rule experts out. Fails if one that was chosen is chosen again before those."""
    logits, bias = noise(2, 6), torch.full((6,), -math.inf)
    bias[3] = 0.0
    ids, weights = router.route(logits.to(DEVICE), bias.to(DEVICE), 4, 1.0, normalize=True)
    assert ids.tolist() == [[3, 0, 1, 2]] * 2
    assert weights.isfinite().all()
    with pytest.raises(ValueError, match="at least"):
        router.route(logits, bias, 7, 1.0, normalize=True)
