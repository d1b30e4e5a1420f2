"""The compiled hyper-connections, norms, rotations and attention against their torch twins."""

from __future__ import annotations

import math

import pytest
import torch

from localmoe import ops
from localmoe.kernels import reference
from localmoe.kernels.native import MAX_STREAMS, HyperSite
from tests.loops import noise
from tests.native_kernels import ISAS, library, needs_native, using

pytestmark = needs_native


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("tokens", "s", "d", "iterations"), [(1, 4, 64, 20), (7, 4, 1500, 20), (3, 1, 33, 1), (2, 5, 7, 3)]
)
def test_entering_and_leaving_a_site_equal_their_twins(isa: str, tokens: int, s: int, d: int, iterations: int) -> None:
    """Fails for exchanged gates or axes, a missing Sinkhorn step, eps in another place, or a wrong partial block."""
    streams, y = noise(tokens, s, d), noise(tokens, d, seed=4)
    fn, base = noise((2 + s) * s, s * d, seed=1) * (s * d) ** -0.5, noise((2 + s) * s, seed=2)
    scale, norm = torch.tensor([0.5, 0.7, 0.9]), noise(d, seed=3)
    site = HyperSite.of(fn, base, scale, norm, iterations=iterations, norm_eps=1e-3, eps=1e-4)
    assert site is not None
    with using(isa) as lib:
        x, post, comb = lib.hyper_enter(site, streams)
        out = lib.hyper_leave(streams, y, post, comb)
    pre, expected_post, expected_comb = reference.hyper_mix(
        streams, fn, base, scale, iterations=iterations, norm_eps=1e-3, eps=1e-4
    )
    expected_x = reference.rms_norm(reference.hyper_collapse(streams, pre), norm, 1e-3)
    for found, expected in (
        (x, expected_x),
        (post, expected_post),
        (comb, expected_comb),
        (out, reference.hyper_expand(streams, y, expected_post, expected_comb)),
    ):
        assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_a_site_is_the_same_for_a_token_alone() -> None:
    """Fails if batch mates or threads change a bit."""
    s, d = 4, 256
    streams, fn, base = noise(9, s, d), noise((2 + s) * s, s * d, seed=1), noise((2 + s) * s, seed=2)
    site = HyperSite.of(fn, base, torch.ones(3), torch.ones(d), iterations=20, norm_eps=1e-6, eps=1e-6)
    assert site is not None
    with using(threads=3) as lib:
        together = lib.hyper_enter(site, streams)
    alone = library().hyper_enter(site, streams[5:6])
    assert all(torch.equal(a[5:6], b) for a, b in zip(together, alone, strict=True))


def test_what_the_library_cannot_mix_is_left_to_torch() -> None:
    s = MAX_STREAMS + 1
    parts = torch.zeros((2 + s) * s, s * 8), torch.zeros((2 + s) * s), torch.zeros(3), torch.zeros(8)
    assert HyperSite.of(*parts, iterations=1, norm_eps=0, eps=0) is None
    half = torch.zeros(24, 32), torch.zeros(24), torch.zeros(3), torch.zeros(8, dtype=torch.bfloat16)
    assert HyperSite.of(*half, iterations=1, norm_eps=0, eps=0) is None


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 40), (3, 5, 24), (70, 2, 129), (2, 64, 512)])
@pytest.mark.parametrize("norm", ["none", "plain", "weighted"])
def test_norm_and_rotation_equal_their_twins(isa: str, shape: tuple[int, ...], norm: str) -> None:
    """Fails if heads share a norm, a token takes another's angle, or other dimensions than the last are turned."""
    x, angle = noise(*shape), 3 * noise(shape[0], 10, seed=1)
    weight = noise(shape[-1], seed=2) if norm == "weighted" else None
    eps = None if norm == "none" else 1e-3
    with using(isa) as lib:
        found = ops.norm_rope(x, angle.cos(), angle.sin(), weight=weight, eps=eps, library=lib)
    expected = ops.norm_rope(x, angle.cos(), angle.sin(), weight=weight, eps=eps)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("heads", "width", "m", "count"), [(1, 16, 1, 0), (5, 40, 7, 3), (64, 512, 128, 300), (6, 33, 0, 9)]
)
@pytest.mark.parametrize("hidden", [False, True])
def test_attention_of_one_query_equals_its_twin(
    isa: str, heads: int, width: int, m: int, count: int, hidden: bool
) -> None:
    """Fails if a hidden entry is seen, the sink has a value, window and entries are exchanged, or scores overflow."""
    q, window, entries = 4 * noise(1, heads, width), noise(m, width, seed=1), noise(count, width, seed=2)
    bias = torch.zeros(1, count).masked_fill(torch.arange(count) % 3 == 1, -math.inf) if hidden else None
    sink = torch.linspace(-3, 90, heads)
    with using(isa) as lib:
        found = ops.sparse_attention(q, window, None, entries, bias, sink, library=lib)
    expected = ops.sparse_attention(q, window, None, entries, bias, sink)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-30


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 7), (3, 2, 512), (40, 129)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_norm_equals_its_twin(isa: str, shape: tuple[int, ...], weighted: bool) -> None:
    """Fails if rows share a norm, or anything is done to them but that."""
    x, weight = noise(*shape), noise(shape[-1], seed=2) if weighted else None
    with using(isa) as lib:
        found = ops.rms_norm(x, weight, 1e-3, library=lib)
    expected = ops.rms_norm(x, weight, 1e-3)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("heads", "width", "value_width", "rows"),
    [(1, 2, 1, 1), (3, 40, 33, 2), (16, 576, 512, 127), (5, 72, 64, 513), (9, 24, 24, 1700)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_attention_of_one_query_equals_its_twin(
    isa: str, heads: int, width: int, value_width: int, rows: int, dtype: torch.dtype
) -> None:
    """Fails if a row is left out at an edge of a block or of a piece, sums are not scaled to a new maximum, the rotated
    part becomes a value, or scores overflow."""
    q, cache = 4 * noise(1, heads, width), noise(rows, width, seed=1)
    # The maximum rises from block to block.
    cache *= torch.linspace(0.1, 2, rows)[:, None]
    q, cache = q.to(dtype), cache.to(dtype)
    expected = reference.latent_attention(q.float(), cache.float(), None, width=value_width, scale=0.7)
    found = []
    for threads in (1, 3):
        with using(isa, threads=threads) as lib:
            found.append(ops.latent_attention(q, cache, None, width=value_width, scale=0.7, library=lib))
    assert found[0].shape == expected.shape and found[0].dtype == dtype
    assert (found[0] - expected).norm() <= (1e-5 if dtype == torch.float32 else 3e-3) * expected.norm()
    assert torch.equal(*found)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_broken_breaks_every_head(value: float) -> None:
    """Fails if a fault would pass the maximum unseen; the step says where it came from."""
    cache = noise(300, 24)
    cache[200, 3] = value
    q = noise(1, 5, 24, seed=1).abs()
    found = ops.latent_attention(q, cache, None, width=16, scale=1.0, library=library())
    assert not found.isfinite().all(-1).any()


def test_what_the_library_does_not_attend_to_is_left_to_torch() -> None:
    """Fails if two dtypes, more queries than one, or rows that were picked would reach the kernel."""
    q, cache = noise(2, 3, 24), noise(6, 24, seed=1)
    seen = torch.ones(2, 6, dtype=torch.bool).tril(3)
    for parts in [(q, cache, seen), (q[:1].bfloat16(), cache, None), (q[:1], cache[None], None)]:
        found = ops.latent_attention(*parts, width=16, scale=1.0, library=library())
        assert torch.equal(found, reference.latent_attention(*parts, width=16, scale=1.0))
