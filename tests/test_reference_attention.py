"""The torch twins around attention, against the same equations written as plain loops in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe.kernels import codecs, reference
from tests.loops import assert_close, noise, softmax

INF = math.inf
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()


def pooled(rows: list[tuple[float, float]]) -> float:
    """One channel of a window: (kv, score) pairs to their softmax-weighted mean."""
    shares = softmax([score for _, score in rows])
    return sum(share * kv for share, (kv, _) in zip(shares, rows, strict=True))


@pytest.mark.parametrize(("windows", "rows", "d"), [(1, 1, 1), (3, 7, 5)])
def test_pooling_is_a_softmax_mean_of_each_channel(windows: int, rows: int, d: int) -> None:
    """Fails if the softmax runs over channels, or one weight serves all channels. Scores up to +-100."""
    kv, score = noise(windows, rows, d), 40 * noise(windows, rows, d, seed=1)
    k, s = kv.double().tolist(), score.double().tolist()
    expected = [[pooled([(k[w][j][c], s[w][j][c]) for j in range(rows)]) for c in range(d)] for w in range(windows)]
    assert_close(reference.pool_windows(kv, score), expected)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("windows", "m", "d"), [(1, 1, 1), (3, 4, 5)])
def test_overlapping_windows_take_the_first_half_of_the_window_before(
    windows: int, m: int, d: int, known: bool
) -> None:
    """Fails if the halves are exchanged, or the window before the first is lost or made up."""
    kv, score = noise(windows + 1, m, 2 * d), noise(windows + 1, m, 2 * d, seed=1)
    k, s = kv.double().tolist(), score.double().tolist()
    expected = []
    for w in range(1, windows + 1):
        older = range(m) if known or w > 1 else ()
        before = [[(k[w - 1][j][c], s[w - 1][j][c]) for j in older] for c in range(d)]
        own = [[(k[w][j][d + c], s[w][j][d + c]) for j in range(m)] for c in range(d)]
        expected.append([pooled(before[c] + own[c]) for c in range(d)])
    previous = (kv[0], score[0]) if known else None
    assert_close(reference.pool_overlapping(kv[1:], score[1:], previous), expected)


@pytest.mark.parametrize(("n", "heads", "entries"), [(1, 1, 1), (3, 7, 5), (2, 3, 0)])
def test_index_scores_apply_relu_per_head_before_the_weights(n: int, heads: int, entries: int) -> None:
    """Fails if ReLU is dropped or comes after the sum. Half of the weights are negative."""
    q, keys, weights = noise(n, heads, 4), noise(entries, 4, seed=1), noise(n, heads, seed=2)
    expected = np.zeros((n, entries))
    for t, e, h in np.ndindex(n, entries, heads):
        expected[t, e] += float(weights[t, h]) * max(float(q[t, h].double() @ keys[e].double()), 0)
    assert_close(reference.index_scores(q, keys, weights), expected)


def test_equal_scores_go_to_the_smaller_index() -> None:
    """Fails for an unstable sort: 100 equal scores around one larger."""
    scores = torch.zeros(2, 100)
    scores[0, 50] = 1
    scores[1, :3] = -INF
    assert reference.select_top(scores, 4).tolist() == [[50, 0, 1, 2], [3, 4, 5, 6]]


def test_selecting_more_than_there_are_gives_all() -> None:
    assert reference.select_top(torch.tensor([[1.0, 3.0, 2.0]]), 7).tolist() == [[1, 2, 0]]


def attention(q: Tensor, rows: list[Tensor], sink: float) -> list[float]:
    """One head's query over the rows it sees. The sink has no value."""
    scale = 1 / math.sqrt(len(q))
    shares = softmax([*(scale * float(q.double() @ row.double()) for row in rows), sink])
    values = [share * row.double() for share, row in zip(shares, rows, strict=False)]
    return sum(values, torch.zeros(len(q), dtype=torch.float64)).tolist()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    ("n", "heads", "window", "entries"), [(1, 1, 1, 0), (1, 3, 7, 5), (7, 2, 10, 1), (3, 3, 4, 63)]
)
def test_attention_equals_its_loops(n: int, heads: int, window: int, entries: int, gathered: bool) -> None:
    """Fails for another scale, a sink with a value, a mask that leaks, or entries of another query."""
    c = 9
    q, rows, sink = 3 * noise(n, heads, c), noise(window, c, seed=1), noise(heads, seed=2)
    pool = noise(n, entries, c, seed=3) if gathered else noise(entries, c, seed=3)
    mask, seen = noise(n, window, seed=4) > 0, noise(n, entries, seed=5) > 0
    bias = torch.zeros(n, entries).masked_fill(~seen, -INF)
    expected = [
        [
            attention(
                q[t, h],
                [rows[i] for i in range(window) if mask[t, i]]
                + [(pool[t] if gathered else pool)[e] for e in range(entries) if seen[t, e]],
                float(sink[h]),
            )
            for h in range(heads)
        ]
        for t in range(n)
    ]
    assert_close(reference.sparse_attention(q, rows, mask, pool, bias, sink), expected)


def test_attention_without_masks_sees_everything() -> None:
    """Fails if None is taken as nothing visible."""
    q, rows, pool, sink = noise(1, 2, 4), noise(3, 4, seed=1), noise(2, 4, seed=2), noise(2, seed=3)
    full = reference.sparse_attention(q, rows, torch.ones(1, 3, dtype=torch.bool), pool, torch.zeros(1, 2), sink)
    assert torch.equal(reference.sparse_attention(q, rows, None, pool, None, sink), full)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    """Fails with NaN if the softmax is taken without the sink."""
    hidden, none = torch.zeros(1, 3, dtype=torch.bool), torch.full((1, 2), -INF)
    out = reference.sparse_attention(noise(1, 2, 4), noise(3, 4), hidden, noise(2, 4), none, torch.zeros(2))
    assert torch.equal(out, torch.zeros(1, 2, 4))


def test_a_large_sink_takes_everything_and_does_not_overflow() -> None:
    """Fails if the sink is left out of the running maximum: exp(1e4) is infinite."""
    q, rows = noise(1, 2, 4), noise(3, 4, seed=1)
    out = reference.sparse_attention(q, rows, None, noise(0, 4), None, torch.tensor([1e4, -1e4]))
    assert torch.equal(out[0, 0], torch.zeros(4))
    assert_close(out[0, 1], attention(q[0, 1], list(rows), -INF))


def test_large_scores_do_not_overflow() -> None:
    """Fails if the largest score is not subtracted first. The best row of each head takes everything."""
    q, rows, pool = 1e4 * noise(1, 2, 4), noise(3, 4, seed=1), noise(5, 4, seed=2)
    out = reference.sparse_attention(q, rows, None, pool, None, torch.zeros(2))
    every = torch.cat((rows, pool))
    assert torch.equal(out[0], every[(q[0] @ every.t()).argmax(1)])


def test_bf16_attention_accumulates_in_float32() -> None:
    """Fails if scores or shares are rounded to bf16 on the way."""
    q, rows, pool, sink = (noise(*s, seed=i).bfloat16() for i, s in enumerate([(5, 2, 64), (63, 64), (7, 64), (2,)]))
    out = reference.sparse_attention(q, rows, None, pool, None, sink.float())
    exact = reference.sparse_attention(q.float(), rows.float(), None, pool.float(), None, sink.float())
    assert torch.equal(out, exact.bfloat16())


def rounded_e4m3(value: float) -> float:
    """The nearest number of the format, ties to the even code, saturating at 448."""
    size = min(abs(value), 448.0)
    code = min(range(127), key=lambda i: (abs(E4M3[i] - size), i % 2))
    return math.copysign(E4M3[code], value)


def fake_quantized(block: list[float]) -> list[float]:
    """Written from the definition: scale = 2 ** ceil(log2(max(|x|, 1e-4) / 448))."""
    largest = max(1e-4, *map(abs, block))
    scale = 2.0 ** math.ceil(math.log2(largest / 448))
    return [rounded_e4m3(v / scale) * scale for v in block]


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e4])
def test_fake_quantization_rounds_each_block_by_its_own_scale(size: float) -> None:
    """Fails for scales that are not powers of two, other blocks, or truncation. The floor of 1e-4 shows at 1e-6."""
    x = size * noise(3, 14) * torch.logspace(-3, 0, 14)
    blocks = x.double().reshape(-1, 7).tolist()
    expected = np.reshape([fake_quantized(block) for block in blocks], x.shape)
    assert torch.equal(reference.fake_quant_fp8(x, 7).double(), torch.from_numpy(expected))


def test_a_shorter_last_block_has_its_own_scale() -> None:
    """Fails if the rest of a width is refused, or rounded with its neighbours."""
    x = noise(2, 10) * torch.logspace(0, -3, 10)
    expected = [fake_quantized(row[:7]) + fake_quantized(row[7:]) for row in x.double().tolist()]
    assert torch.equal(reference.fake_quant_fp8(x, 7).double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("exponent", [-20, -3, 0, 1, 15])
def test_fake_quantization_keeps_blocks_whose_largest_fits_exactly(exponent: int) -> None:
    """Fails if 448 * 2 ** n gets twice the scale it needs: the smallest subnormal would be lost."""
    block = torch.tensor([448.0, 2.0**-9, -(2.0**-6), 0.0]) * 2.0**exponent
    assert torch.equal(reference.fake_quant_fp8(block, 4), block)


def test_fake_quantization_is_idempotent_and_keeps_the_dtype() -> None:
    """Fails if a rounded block gets another scale the second time."""
    for dtype in (torch.float32, torch.bfloat16):
        once = reference.fake_quant_fp8(noise(50, 64).to(dtype), 64)
        assert once.dtype == dtype
        assert torch.equal(reference.fake_quant_fp8(once, 64), once)


def test_fake_quantization_has_the_grid_of_the_weight_format() -> None:
    """Fails if the cache and the weights disagree on what FP8 with power-of-two scales is."""
    x = noise(128, 128)
    assert torch.equal(reference.fake_quant_fp8(x.view(1, -1), 128 * 128).view_as(x), codecs.fake_quantize_fp8_block(x))


def test_fake_quantization_of_zeros_is_zero() -> None:
    """Fails with 0 / 0."""
    assert torch.equal(reference.fake_quant_fp8(torch.zeros(2, 64), 64), torch.zeros(2, 64))


def test_gradients_pass_fake_quantization_unchanged() -> None:
    """Fails if the rounding is differentiated: its gradient is zero almost everywhere."""
    x = noise(3, 64).requires_grad_()
    (reference.fake_quant_fp8(x, 64) * noise(3, 64, seed=1)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, noise(3, 64, seed=1))
