"""What is computed at once, and the memory that is planned for it."""

from __future__ import annotations

import pytest

from localmoe.bench import shapes
from localmoe.step_size import (
    ATTENTION_TOKENS,
    BASE_BYTES,
    CHOSEN_ELEMENTS,
    SCORE_ELEMENTS,
    WorkBytes,
    query_block,
    streamed_tokens,
)

MIB = 1 << 20


def test_a_step_is_planned_at_its_larger_moment() -> None:
    """Fails if a block of scores, which is gone by the end of attention, would be added to all that is there then."""
    assert WorkBytes(10, 8, 100).of(50) == BASE_BYTES + 500 + 400
    assert WorkBytes(10, 8, 300).of(50) == BASE_BYTES + 500 + 200 + 300
    assert WorkBytes(10, 8, 0).of(2 * ATTENTION_TOKENS) == BASE_BYTES + 20 * ATTENTION_TOKENS + 8 * ATTENTION_TOKENS


@pytest.mark.parametrize("entries", [0, 100, 8192, 65_536, 262_144])
@pytest.mark.parametrize(("heads", "chosen"), [(1, 0), (64, 512 * 512), (128, 1024 * 512), (192, 0)])
def test_a_block_of_queries_stays_within_its_bounds(heads: int, entries: int, chosen: int) -> None:
    """Fails if scores, or the entries that are chosen, would grow with the context."""
    queries = query_block(heads, entries, chosen)
    assert 1 <= queries <= 128
    assert queries == 1 or queries * heads * entries <= SCORE_ELEMENTS
    assert queries * chosen <= CHOSEN_ELEMENTS


def test_queries_are_taken_one_by_one_where_even_two_would_be_too_many() -> None:
    assert query_block(64, 1 << 24) == 1


def test_blocks_of_published_models_take_little_beside_their_queries() -> None:
    """Fails if a layer kind would let its scores be planned, and so taken, without bound: 1M tokens are allowed."""
    for name in ("v4-flash", "v4-pro"):
        assert shapes.published(name).work.block <= 140 * MIB


def test_steps_are_longer_where_experts_cross_for_each() -> None:
    """10 bytes a token, of which a quarter of the room may be taken. Fails if a step takes more, or none is longer."""
    work = WorkBytes(10, 0, 0)
    rooms = 0, 4 * 20_480 - 4, 4 * 20_480, 4 * 61_440, 4 * 143_360, 1 << 40
    assert [streamed_tokens(work, 2048, 1 << 20, room) for room in rooms] == [2048, 2048, 4096, 8192, 16_384, 16_384]
    assert streamed_tokens(work, 2048, 5000, 1 << 40) == 5000
    assert streamed_tokens(work, 2048, 300, 1 << 40) == 2048
    assert streamed_tokens(work, 2048, 1 << 20, -5) == 2048
