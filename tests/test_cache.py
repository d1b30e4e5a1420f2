"""Decode state: how the tokens are cut into chunks leaves no trace, and every remembered point can be returned to.

Rows hold their own position, so what must come out is known by heart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe.cache import Compressed, EntryPool, LayerState, OpenRows, Window
from localmoe.sequence import SequenceState

CHUNKS = st.lists(st.integers(1, 23), min_size=1, max_size=12)


def rows(position: int, count: int, width: int = 2) -> Tensor:
    """[count, width]: every element is its row's position."""
    return torch.arange(position, position + count, dtype=torch.float32)[:, None].expand(-1, width).clone()


def positions(tensor: Tensor) -> list[int]:
    assert (tensor == tensor[..., :1]).all()
    return [int(v) for v in tensor[..., 0].flatten()]


def cloned(state: SequenceState) -> dict[str, Tensor]:
    """What a file gives back of it."""
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


@settings(deadline=None)
@given(chunks=CHUNKS, size=st.integers(1, 9))
def test_the_window_gives_every_chunk_the_rows_it_may_see(chunks: list[int], size: int) -> None:
    """Fails if a chunk longer than the ring, or one that wraps around its end, loses or exchanges rows."""
    window, position = Window(size, 2, torch.float32), 0
    for count in chunks:
        seen, first = window.extend(rows(position, count), position)
        assert first == max(position - size + 1, 0)
        position += count
        assert positions(seen) == list(range(first, position))
    held = sorted(positions(window.ring))[-min(size, position) :]
    assert held == list(range(max(position - size, 0), position))


@pytest.mark.parametrize("size", [1, 4])
def test_rows_put_into_a_window_are_those_it_would_have(size: int) -> None:
    """Fails if a row lies where extend() does not look for it."""
    window, other = Window(size, 2, torch.float32), Window(size, 2, torch.float32)
    for position in range(3 * size):
        other.extend(rows(position, 1), position)
        assert torch.equal(window.put(rows(position, 1), torch.tensor([position % size])), other.ring)


def test_rows_put_into_a_pool_are_entries_when_the_step_is_complete() -> None:
    """Every second token makes an entry. Fails if a row is an entry before, or is lost when the buffer grows."""
    state = SequenceState([LayerState(Window(4, 2, torch.float32), compressed := Compressed(
        EntryPool(2, torch.float32), OpenRows(2, 2, overlap=False)
    ))])  # fmt: skip
    pool = compressed.pool
    for position in range(300):
        if position % 2:
            pool.put(rows(position // 2, 1), torch.tensor([position // 2]))
        assert pool.count == position // 2
        state.advance(1)
    assert pool.count == 150 and positions(pool.extend(None)) == list(range(150))
    before = pool.buffer
    state.reserve(2 * (len(before) - 150) - 1)
    assert pool.buffer is before
    state.reserve(2 * (len(before) - 150) + 1)
    assert len(pool.buffer) > len(before) and len(pool.buffer) % 16 == 0
    assert positions(pool.extend(None)) == list(range(150))


def test_the_window_keeps_its_dtype() -> None:
    window = Window(3, 2, torch.bfloat16)
    window.extend(rows(0, 5).bfloat16(), 0)
    assert window.ring.dtype == torch.bfloat16


@settings(deadline=None)
@given(chunks=st.lists(st.integers(0, 70), max_size=8))
def test_the_pool_keeps_all_entries_in_order(chunks: list[int]) -> None:
    """Fails if growing loses rows, or the reserve is given out with them."""
    pool = EntryPool(2, torch.float32)
    assert positions(pool.extend(None)) == []
    for count in chunks:
        found = pool.extend(rows(pool.count, count) if count else None)
        assert positions(found) == list(range(pool.count))
    assert pool.count == sum(chunks)


def test_the_pool_grows_by_a_sixteenth() -> None:
    """Fails if each entry is a new allocation, or if a long context holds much more than it was planned to."""
    pool, buffers = EntryPool(2, torch.float32), list[Tensor]()
    for i in range(1000):
        pool.extend(rows(i, 1))
        if not buffers or buffers[-1] is not pool.buffer:
            buffers.append(pool.buffer)
    assert [len(buffer) for buffer in buffers] == list(range(64, 1025, 64))
    pool.extend(rows(0, 30_000))
    pool.extend(rows(0, 1))
    # Sizes are multiples of 16.
    assert len(pool.buffer) == 31_008
    pool.extend(rows(0, 8))
    assert len(pool.buffer) == 31_008 + 31_008 // 16 + 14


@settings(deadline=None)
@given(chunks=CHUNKS, ratio=st.integers(1, 6), overlap=st.booleans())
def test_windows_close_the_same_however_the_rows_arrive(chunks: list[int], ratio: int, overlap: bool) -> None:
    """Fails if a row is lost between chunks, or a window forgets the one before it (the slow drift of many ports)."""
    open_rows, position, closed = OpenRows(ratio, 2, overlap=overlap), 0, 0
    for count in chunks:
        new = rows(position, count)
        done = open_rows.extend(new, -new, position)
        position += count
        if done is None:
            assert position // ratio == closed
            continue
        assert done.first == closed
        assert torch.equal(done.score, -done.kv)
        assert done.kv.shape[1] == ratio
        assert positions(done.kv) == list(range(closed * ratio, position // ratio * ratio))
        if overlap and closed:
            assert done.previous is not None
            assert positions(done.previous[0]) == list(range((closed - 1) * ratio, closed * ratio))
            assert torch.equal(done.previous[1], -done.previous[0])
        else:
            assert done.previous is None
        closed = position // ratio


def new_state(dtype: torch.dtype = torch.float32) -> SequenceState:
    """A sliding, an HCA-like and a CSA-like layer."""
    hca = LayerState(Window(5, 2, dtype), Compressed(EntryPool(2, dtype), OpenRows(6, 2, overlap=False)))
    csa = LayerState(
        Window(5, 2, dtype),
        Compressed(EntryPool(2, dtype), OpenRows(4, 4, overlap=True)),
        Compressed(EntryPool(3, dtype), OpenRows(4, 6, overlap=True)),
    )
    return SequenceState([LayerState(Window(5, 2, dtype)), hca, csa])


def feed(state: SequenceState, count: int, salt: int = 0) -> None:
    """Extend all layers as a forward does; entries are sums over everything a window gives."""
    for layer in state.layers:
        dtype = layer.window.ring.dtype
        layer.window.extend(rows(state.length, count).to(dtype) + salt, state.length)
        for c in filter(None, (layer.entries, layer.index)):
            raw = rows(state.length, count, c.open.kv.shape[1]) + salt
            closed = c.open.extend(raw, 2 * raw, state.length)
            if closed is not None:
                entries = closed.kv.sum(1)
                entries[0] += closed.previous[0].sum(0) if closed.previous else 0
                c.pool.extend(entries[:, : c.pool.buffer.shape[1]].to(dtype))
    state.length += count


def assert_same(a: SequenceState, b: SequenceState) -> None:
    assert a.length == b.length
    found, expected = a.tensors(), b.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("at", range(1, 14))
@pytest.mark.parametrize("beyond", [1, 3, 30])
def test_rewinding_forgets_what_came_after_the_mark(at: int, beyond: int) -> None:
    """Fails if a ring, an open row or an entry of the abandoned continuation survives, at and around all boundaries."""
    state, straight = new_state(), new_state()
    feed(state, at)
    mark = state.mark()
    feed(state, beyond, salt=1000)
    state.rewind(mark)
    feed(straight, at)
    assert_same(state, straight)
    for count in (1, 7):
        feed(state, count, salt=50)
        feed(straight, count, salt=50)
        assert_same(state, straight)


def test_a_mark_can_be_returned_to_twice() -> None:
    """Fails if rewinding hands out the mark's own buffers, to be overwritten by what follows."""
    state, straight = new_state(), new_state()
    feed(straight, 9)
    feed(state, 9)
    mark = state.mark()
    for salt in (100, 200):
        feed(state, 11, salt)
        state.rewind(mark)
        assert_same(state, straight)


def test_a_mark_does_not_copy_the_entries() -> None:
    """Fails if remembering a turn of a long conversation costs as much as the conversation."""
    state = new_state()
    feed(state, 10_000)
    assert sum(t.nbytes for t in state.mark().fixed) < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 4, 6, 12, 25])
def test_a_state_goes_on_from_its_tensors(length: int, dtype: torch.dtype) -> None:
    """Fails if something needed later is not among them."""
    state, copy = new_state(dtype), new_state(dtype)
    if length:
        feed(state, length)
    copy.load_tensors(cloned(state), length)
    assert_same(copy, state)
    for count in (1, 9):
        feed(state, count)
        feed(copy, count)
    assert_same(copy, state)


def test_a_loaded_state_takes_the_entries_over() -> None:
    """Fails if a long state would be in memory twice while it is loaded, or once for two that go on differently."""
    state, one = new_state(), new_state()
    feed(state, 12)
    saved = cloned(state)
    one.load_tensors(saved, 12)
    assert saved["entries.0"].data_ptr() == one.tensors()["entries.0"].data_ptr()
    other = new_state()
    other.load_tensors(cloned(one), 12)
    feed(one, 12, salt=100)
    assert_same(other, state)


def test_entries_are_saved_without_their_reserve() -> None:
    state = new_state()
    feed(state, 13)
    assert [len(t) for name, t in state.tensors().items() if name.startswith("entries.")] == [2, 3, 3]


@pytest.mark.parametrize("damage", ["length", "missing", "extra", "shape", "dtype"])
def test_tensors_that_do_not_fit_are_refused(damage: str) -> None:
    """Fails if a state of another model or length is taken over in part."""
    state, other = new_state(), new_state()
    feed(state, 13)
    saved = state.tensors()
    if damage == "missing":
        del saved["fixed.1"]
    elif damage == "extra":
        saved["fixed.99"] = torch.zeros(1)
    elif damage == "shape":
        saved["entries.1"] = torch.zeros(3, 9)
    elif damage == "dtype":
        saved["fixed.0"] = saved["fixed.0"].bfloat16()
    with pytest.raises(ValueError, match="differs in"):
        other.load_tensors(saved, 4 if damage == "length" else 13)
    assert_same(other, new_state())


def test_nbytes_counts_windows_open_rows_and_the_reserve() -> None:
    """Worked out by hand: 3 windows 5 x 2; open rows 6 x 2, 8 x 4 and 8 x 6, kv and score; pools of 64 x 2, 2 and 3."""
    state = new_state()
    fixed = 4 * (3 * 5 * 2 + 2 * (6 * 2 + 8 * 4 + 8 * 6))
    assert state.nbytes == fixed
    feed(state, 13)
    assert state.nbytes == fixed + 4 * 64 * (2 + 2 + 3)
