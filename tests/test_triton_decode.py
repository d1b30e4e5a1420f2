"""What Triton's kernels do for a token whose position only the device knows, against the same with everything known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from localmoe.cache import Compressed, EntryPool, OpenRows
from localmoe.kernels import reference, reference_decode
from tests.loops import noise
from tests.triton_kernels import DEVICE, HAS_GPU, error

# isort: split
from localmoe.kernels.triton import attention, compress, indexer
from localmoe.kernels.triton.depth import Depth

EXACT, ROUNDED, BF16 = 3e-6, 1.5e-2, 1.6e-2


def depth(position: int, ratio: int) -> Depth:
    return Depth(torch.tensor([position], device=DEVICE), ratio)


def there(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


# The first, before and at the end of a window, after it, and where buffers are full.
POSITIONS = [0, 2, 3, 4, 18, 19, 20, 47]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("ratio", [0, 4])
def test_attention_sees_what_is_there(position: int, ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of 20 rows, a pool of 12. Fails if a row that is not written yet is seen, or one that is is not; parts
    without a key are among them."""
    monkeypatch.setattr(attention, "_PART", 8)
    q, ring, pool, sink = noise(1, 3, 24), noise(20, 24, seed=1), noise(12, 24, seed=2), noise(3, seed=3)
    rows, entries = min(position + 1, 20), (position + 1) // 4 if ratio else 12
    expected = reference.sparse_attention(q, ring[:rows], None, pool[:entries], None, sink)
    ring[rows:], pool[entries:] = math.nan, math.nan
    for exact, limit in ((True, EXACT), (False, ROUNDED)):
        parts = there(q, ring), there(pool, sink)
        found = attention.sparse_attention(
            *parts[0], None, parts[1][0], None, parts[1][1], exact=exact, depth=depth(position, ratio)
        )
        assert error(found, expected) <= limit


@pytest.mark.parametrize("position", [0, 6, 7, 8, 39])
def test_latent_attention_sees_what_is_there(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the buffer's other rows are seen, or the rotated part is left out."""
    monkeypatch.setattr(attention, "_PART", 8)
    q, cache = noise(1, 5, 24), noise(40, 24, seed=1)
    expected = reference.latent_attention(q, cache[: position + 1], None, width=16, scale=0.3)
    cache[position + 1 :] = math.nan
    found = attention.latent_attention(
        *there(q, cache), None, width=16, scale=0.3, exact=True, depth=depth(position, 1)
    )
    assert error(found, expected) <= EXACT


@pytest.mark.parametrize(("position", "ratio", "count"), [(0, 1, 1), (2, 4, 0), (3, 4, 1), (70, 1, 71), (319, 4, 80)])
def test_index_scores_of_keys_that_are_there(position: int, ratio: int, count: int) -> None:
    """Fails if a key that is not there can be chosen."""
    q, keys, weights = noise(1, 5, 16), noise(80, 16, seed=1), noise(1, 5, seed=2)
    expected = reference.index_scores(q, keys[:count], weights)
    keys[count:] = math.nan
    found = indexer.index_scores(*there(q, keys, weights), exact=True, depth=depth(position, ratio)).cpu()
    assert found[0, count:].eq(-math.inf).all() and found.shape == (1, 80)
    assert not count or error(found[:, :count], expected) <= EXACT


def test_a_depth_is_of_one_query() -> None:
    """Fails if several queries are given one position, as if they were one."""
    two, cache, weights = noise(2, 3, 16), noise(8, 16), noise(2, 3)
    with pytest.raises(ValueError, match="2 queries with a depth"):
        attention.latent_attention(*there(two, cache), None, width=16, scale=1.0, depth=depth(3, 1))
    with pytest.raises(ValueError, match="2 queries with a depth"):
        indexer.index_scores(*there(two, cache, weights), depth=depth(3, 1))


def states(ratio: int, width: int, dtype: torch.dtype, *, overlap: bool) -> Compressed:
    rows = OpenRows(ratio, width * (2 if overlap else 1), overlap=overlap)
    return Compressed(EntryPool(width, dtype), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ratio", "overlap", "width", "pairs"), [(3, True, 12, 2), (4, True, 24, 4), (5, False, 20, 10)]
)
def test_entries_of_tokens_that_come_one_by_one(
    ratio: int, overlap: bool, width: int, pairs: int, dtype: torch.dtype
) -> None:
    """Four windows, beside the twin, and beside the cache that cuts rows where windows end. Fails if a row lies
    elsewhere, a window closes at another token, or the one before it is forgotten or not moved."""
    limit = EXACT if dtype == torch.float32 else 1e-2 if HAS_GPU else BF16
    norm, eps = noise(width, seed=1) + 1.0, 1e-6
    cut, opened = states(ratio, width, dtype, overlap=overlap), states(ratio, width, dtype, overlap=overlap).open
    pool = torch.full((5, width), math.nan, dtype=dtype)
    here = [opened.kv.clone(), opened.score.clone(), pool.clone()]
    on_device = there(opened.kv.clone(), opened.score.clone(), pool.clone())
    for position in range(4 * ratio):
        kv, score = noise(1, opened.kv.shape[1], seed=position), noise(1, opened.kv.shape[1], seed=100 + position)
        angle = noise(1, pairs, seed=200 + position // ratio)
        turn = angle.cos(), angle.sin()
        closed = cut.open.extend(kv, score, position)
        if closed is not None:
            pooled = (
                reference.pool_overlapping(closed.kv, closed.score, closed.previous)
                if overlap
                else reference.pool_windows(closed.kv, closed.score)
            )
            cut.pool.extend(reference.rope(reference.rms_norm(pooled.to(dtype), norm, eps), *turn))
        reference_decode.append_entry(
            kv, score, (here[0], here[1]), Depth(torch.tensor([position]), ratio), norm, eps, turn, here[2]
        )
        compress.append_entry(
            *there(kv, score), (on_device[0], on_device[1]), depth(position, ratio), norm.to(DEVICE), eps,
            (turn[0].to(DEVICE), turn[1].to(DEVICE)), on_device[2],
        )  # fmt: skip
        count = cut.pool.count
        assert count == (position + 1) // ratio
        assert torch.equal(here[2][:count], cut.pool.buffer[:count]) and here[2][count:].isnan().all()
        found = on_device[2].cpu()
        assert found[count:].isnan().all()
        assert not count or error(found[:count], here[2][:count]) <= limit
        # What the cache has is cut at other places, but what is needed again is the same.
        kept = position + 1 - cut.open._start(position + 1)
        for rows, others, ours in zip((cut.open.kv, cut.open.score), here, on_device, strict=False):
            assert torch.equal(rows[:kept], others[:kept]) and torch.equal(others[:kept], ours[:kept].cpu())


def test_entries_that_no_kernel_knows_are_refused() -> None:
    """Fails if rows are read as what they are not."""
    one = torch.zeros(1, 8)
    for kv, pool in ((one, torch.zeros(2, 7)), (one, torch.zeros(2, 6)), (one.double(), torch.zeros(2, 8))):
        with pytest.raises(ValueError, match="rows"):
            compress.append_entry(kv, kv, (kv, kv), depth(0, 2), one[0], 1e-6, (one, one), pool)
