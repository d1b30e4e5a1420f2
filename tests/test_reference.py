"""The torch twins of norms, rotation, hyper-connections and routing, against the same equations as plain loops."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe.kernels import reference
from tests.loops import assert_close, noise, sigmoid, softmax


@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (3, 2, 100)])
def test_rms_norm_divides_by_the_root_mean_square(shape: tuple[int, ...]) -> None:
    """Fails if the mean is subtracted, eps is added outside of the root, or all dimensions are averaged."""
    x, weight = noise(*shape), noise(shape[-1], seed=1)
    rows = x.double().reshape(-1, shape[-1]).tolist()
    plain = [[v / math.sqrt(sum(u * u for u in row) / len(row) + 0.01) for v in row] for row in rows]
    assert_close(reference.rms_norm(x, None, 0.01), np.reshape(plain, shape))
    assert_close(reference.rms_norm(x, weight, 0.01), np.reshape(plain, shape) * weight.double().numpy())


def test_rms_norm_of_zeros_is_zero() -> None:
    """Fails if eps is forgotten."""
    assert torch.equal(reference.rms_norm(torch.zeros(1, 5), None, 1e-6), torch.zeros(1, 5))


def test_rms_norm_rounds_bf16_once() -> None:
    """Fails if the normed value is rounded before the weight is applied."""
    x, weight = noise(7, 63).bfloat16(), noise(63, seed=1).bfloat16()
    expected = reference.rms_norm(x.float(), weight.float(), 1e-6).bfloat16()
    assert torch.equal(reference.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize(("dim", "base"), [(2, 10000.0), (16, 10000.0), (64, 160000.0)])
def test_rope_frequencies_fall_geometrically(dim: int, base: float) -> None:
    """Fails for another exponent, such as -i / dim."""
    assert_close(reference.rope_frequencies(dim, base), [base ** (-2 * i / dim) for i in range(dim // 2)])


def test_yarn_of_the_published_models_turns_over_between_pairs_15_and_25() -> None:
    """Fails for other borders, a ramp the wrong way round, or a factor applied to all pairs."""
    found = reference.yarn_frequencies(64, 160000.0, 16.0, 65536, 32.0, 1.0)
    plain = [160000.0 ** (-2 * i / 64) for i in range(32)]
    ramp = [min(max((i - 15) / 10, 0), 1) for i in range(32)]
    assert_close(found / torch.tensor(plain), [r / 16 + 1 - r for r in ramp])


def test_yarn_with_both_borders_at_one_pair_steps_there() -> None:
    """Fails with a division by zero."""
    found = reference.yarn_frequencies(8, 10000.0, 4.0, 1, 32.0, 1.0)
    plain = reference.rope_frequencies(8, 10000.0)
    assert_close(found / plain, [1, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("shape", [(1, 6), (7, 10), (5, 3, 9)])
def test_rope_turns_neighbouring_dimensions_at_the_end(shape: tuple[int, ...]) -> None:
    """Fails for half-split pairs, for the first dimensions instead of the last, or if heads are mixed up."""
    x, angle = noise(*shape), 3 * noise(shape[0], 3, seed=1)
    expected = x.double().numpy().copy()
    for place in np.ndindex(*shape[:-1]):
        for pair in range(3):
            i = shape[-1] - 6 + 2 * pair
            turned = complex(expected[place][i], expected[place][i + 1]) * cmath.exp(1j * float(angle[place[0], pair]))
            expected[place][i : i + 2] = turned.real, turned.imag
    assert_close(reference.rope(x, angle.cos(), angle.sin()), expected)


def test_rope_with_minus_sin_undoes_it() -> None:
    """Fails if the inverse rotation would need another formula."""
    x, angle = noise(4, 2, 8), noise(4, 4, seed=1)
    turned = reference.rope(x, angle.cos(), angle.sin())
    assert_close(reference.rope(turned, angle.cos(), -angle.sin()), x)


def mixed(streams: Tensor, fn: Tensor, eps: float) -> list[list[float]]:
    """fn times the flattened streams of each token over their root mean square."""
    rows = streams.double().flatten(1).tolist()
    roots = [math.sqrt(sum(v * v for v in row) / len(row) + eps) for row in rows]
    return [
        [sum(f * v for f, v in zip(weights, row, strict=True)) / root for weights in fn.double().tolist()]
        for row, root in zip(rows, roots, strict=True)
    ]


def sinkhorn(c: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    """Row softmax, then columns, then rows and columns in turn: columns are normalised `iterations` times."""
    s = range(len(c))
    c = [[p + eps for p in softmax(row)] for row in c]
    for i in range(iterations):
        if i:
            c = [[v / (sum(row) + eps) for v in row] for row in c]
        sums = [sum(c[j][k] for j in s) for k in s]
        c = [[c[j][k] / (sums[k] + eps) for k in s] for j in s]
    return c


@pytest.mark.parametrize(("tokens", "streams", "iterations"), [(1, 1, 1), (3, 2, 1), (7, 4, 20)])
def test_hyper_mix_equals_its_loops(tokens: int, streams: int, iterations: int) -> None:
    """Fails for exchanged gates, a softmax over the other axis, a missing step, or eps in another place."""
    s, eps = streams, 1e-3
    x, fn = noise(tokens, s, 5), noise((2 + s) * s, s * 5, seed=1)
    base, scale = noise((2 + s) * s, seed=2), torch.tensor([0.5, 0.7, 0.9])
    pre, post, comb = reference.hyper_mix(x, fn, base, scale, iterations=iterations, norm_eps=0.01, eps=eps)
    a, b, c = scale.double().tolist()
    z, base64 = mixed(x, fn, 0.01), base.double().tolist()
    assert_close(pre, [[sigmoid(a * row[j] + base64[j]) + eps for j in range(s)] for row in z])
    assert_close(post, [[2 * sigmoid(b * row[j] + base64[j]) for j in range(s, 2 * s)] for row in z])
    squares = [np.reshape([c * row[i] + base64[i] for i in range(2 * s, len(row))], (s, s)).tolist() for row in z]
    assert_close(comb, [sinkhorn(square, iterations, eps) for square in squares])


def test_the_mixing_matrix_is_doubly_stochastic() -> None:
    """Fails if rows or columns are left out of the iteration. Large logits are the hard case."""
    s = 4
    base = torch.cat((torch.zeros(2 * s), 10 * noise(s * s)))
    fn, scale = torch.zeros(len(base), s * 3), torch.ones(3)
    comb = reference.hyper_mix(noise(1, s, 3), fn, base, scale, iterations=200, norm_eps=1e-6, eps=1e-6)[2]
    assert_close(comb.sum(1), np.ones((1, s)), 1e-4)
    assert_close(comb.sum(2), np.ones((1, s)), 2e-2)


def test_collapse_weighs_the_streams() -> None:
    streams = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    assert_close(reference.hyper_collapse(streams, torch.tensor([[1.0, 0.5, -1.0]])), [[-1.0, -10.0]])


def test_expand_carries_stream_j_into_stream_k_by_comb_j_k() -> None:
    """Fails if comb is applied without the transposition, or post to the wrong stream."""
    streams = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])
    comb = torch.tensor([[[0.0, 3.0], [0.0, 0.0]]])  # only stream 0 into stream 1
    y, post = torch.tensor([[100.0, 200.0]]), torch.tensor([[1.0, 2.0]])
    assert_close(reference.hyper_expand(streams, y, post, comb), [[[100, 200], [203, 406]]])


@pytest.mark.parametrize(("tokens", "s"), [(1, 1), (7, 4)])
def test_hyper_head_equals_its_loops(tokens: int, s: int) -> None:
    """Fails if the last collapse is normalised like the others, or its eps is forgotten."""
    x, fn, base, scale = noise(tokens, s, 5), noise(s, s * 5, seed=1), noise(s, seed=2), torch.tensor([0.6])
    shares = [
        [sigmoid(0.6 * z + b) + 0.01 for z, b in zip(row, base.double().tolist(), strict=True)]
        for row in mixed(x, fn, 0.1)
    ]
    expected = np.einsum("ts,tsd->td", np.array(shares), x.double().numpy())
    assert_close(reference.hyper_head(x, fn, base, scale, norm_eps=0.1, eps=0.01), expected)


def test_router_scores_are_stable_at_the_extremes() -> None:
    """Fails for log(1 + exp(x)): infinite at 100, exactly 0 from -17 down."""
    logits = torch.tensor([[-60.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 1e30]])
    expected = [math.sqrt(math.log1p(math.exp(x)) if x < 50 else x) for x in logits.double()[0].tolist()]
    found = reference.router_scores(logits)
    assert (found.double() / torch.tensor([expected]) - 1).abs().max() < 1e-6


def test_router_scores_at_minus_100_are_tiny_and_finite() -> None:
    """Below about -87 the float32 exponential has few bits left, and then none."""
    low, zero = reference.router_scores(torch.tensor([[-100.0, -1e30]]))[0].tolist()
    assert 0 <= low < 3e-22
    assert zero == 0


def test_the_bias_selects_experts_and_ties_go_to_the_smaller_id() -> None:
    """Fails if the bias is ignored in the selection."""
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    assert reference.route(scores, torch.zeros(4), 2).tolist() == [[0, 1], [0, 1]]
    assert reference.route(scores, torch.tensor([-1.0, 0, 0.1, 0]), 2).tolist() == [[2, 1], [2, 1]]


def test_routing_weights_are_the_scores_of_the_chosen() -> None:
    """Fails if other experts count in the sum, or the scale is applied before or twice."""
    scores, ids = torch.tensor([[0.1, 0.2, 0.6, 5.0]]), torch.tensor([[2, 1]])
    assert_close(reference.routing_weights(scores, ids, 1.5, normalize=True), [[1.125, 0.375]])
    assert_close(reference.routing_weights(scores, ids, 1.5, normalize=False), [[0.9, 0.3]])


def test_a_repeated_expert_counts_twice() -> None:
    """Fails if a hash table's row with repeats is made distinct."""
    scores, ids = torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 1, 0]])
    assert_close(reference.routing_weights(scores, ids, 1.0, normalize=True), [[0.4, 0.4, 0.2]])


def test_scores_of_zero_give_weights_of_zero() -> None:
    """Fails with 0 / 0 = NaN, which hash layers meet."""
    weights = reference.routing_weights(torch.zeros(1, 3), torch.tensor([[0, 2]]), 2.5, normalize=True)
    assert torch.equal(weights, torch.zeros(1, 2))


def test_swiglu_clamps_the_gate_from_above_and_up_on_both_sides() -> None:
    """Fails if the gate is clamped from below too, or the product is clamped instead of its factors."""
    gate = torch.tensor([-12.0, -1.0, 0.0, 1.0, 12.0, 100.0, 1.0, 1.0])
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 100.0, -100.0])
    silu = [g * sigmoid(g) for g in (-12, -1, 0, 1, 10, 10, 1, 1)]
    clamped = [1, 1, 1, 1, 1, 1, 10, -10]
    expected = [s * u for s, u in zip(silu, clamped, strict=True)]
    assert_close(reference.swiglu(gate, up, 10.0), expected)


def test_swiglu_of_minus_infinity_or_so_is_zero() -> None:
    assert float(reference.swiglu(torch.tensor(-1e4), torch.tensor(10.0), 10.0)) == 0
