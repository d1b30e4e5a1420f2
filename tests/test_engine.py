"""Engine and sessions: what is kept between turns, and what an interruption leaves."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.engine import Engine
from localmoe.errors import CheckpointError, GenerationError, ResourceError
from localmoe.experts.resident import ExpertSource
from localmoe.marks import LATEST, MAX_MARKS
from localmoe.models.mla import Mla
from localmoe.models.mla_config import MlaConfig
from localmoe.session import Session, common_prefix
from localmoe.snapshot import Snapshot, pack
from tests import tiny_mla
from tests.tiny_engine import as_bf16, bind, difference, run, tiny_engine, token_ids
from tests.tiny_v4 import CSA, HCA, SLIDING, random_state, tiny_config

CONFIG = tiny_config(layer_types=[SLIDING, CSA, HCA], num_hash_layers=1)
IDS = token_ids(60)


@functools.cache
def engine() -> Engine:
    return Engine(bind(CONFIG, random_state(CONFIG)))


def session_of(ids: Sequence[int], marks: Sequence[int] = ()) -> Session:
    """A session that has computed ids, with marks at these lengths."""
    session = engine().new_session()
    for end in [*marks, len(ids)]:
        if end > session.length:
            run(engine(), ids[session.length : end], session=session)
        if end in marks:
            session.mark()
    return session


def assert_goes_on_like_new(session: Session) -> None:
    """The session's next logits are those of a fresh one with its ids."""
    ids = token_ids(9, seed=5)
    straight = run(engine(), [*session.ids, *ids])[-len(ids) :]
    assert difference(run(engine(), ids, session=session), straight) <= 2e-5


def test_common_prefix_counts_equal_beginnings() -> None:
    found = [common_prefix(a, [1, 2, 3]) for a in ([], [2], [1], [1, 2, 4], [1, 2, 3], [1, 2, 3, 4])]
    assert found == [0, 0, 1, 2, 3, 3]


def test_a_longer_prompt_keeps_all_that_was_computed() -> None:
    """Fails if a second turn pays for the first again."""
    session = session_of(IDS[:30])
    assert session.begin(IDS[:31]) == 30
    assert session.ids == IDS[:30]
    assert_goes_on_like_new(session)


@pytest.mark.parametrize(("marks", "shared", "kept"), [((), 20, 0), ((8,), 20, 8), ((8, 20), 20, 20), ((8, 21), 20, 8)])
def test_another_prompt_keeps_the_last_mark_in_the_common_beginning(
    marks: tuple[int, ...], shared: int, kept: int
) -> None:
    """Fails if a mark after the first difference is used, or one before it is missed."""
    session = session_of(IDS[:30], marks)
    other = [*IDS[:shared], (IDS[shared] + 1) % 160, 7]
    assert session.begin(other) == kept
    assert session.ids == other[:kept]
    assert_goes_on_like_new(session)


def test_a_prompt_computed_already_leaves_a_token_to_compute() -> None:
    """Fails if there is nothing left to get logits from: the same prompt again, and a shorter one."""
    assert session_of(IDS[:30], [8, 30]).begin(IDS[:30]) == 8
    assert session_of(IDS[:30], [8, 20, 30]).begin(IDS[:20]) == 8
    assert session_of(IDS[:30]).begin(IDS[:30]) == 0


def test_marks_of_an_abandoned_path_are_forgotten() -> None:
    """Fails if a mark could bring back tokens that are no longer in the session."""
    session = session_of(IDS[:30], [8, 20])
    session.begin([*IDS[:10], 159, 158])
    run(engine(), token_ids(22, seed=3), session=session)
    with pytest.raises(ValueError, match=r"no mark at 20 tokens; marks are at \[8\]"):
        session.rewind(20)


@pytest.mark.parametrize("length", [0, 8, 30])
def test_rewinding_goes_to_a_marked_length_or_the_start(length: int) -> None:
    session = session_of(IDS[:30], [8, 30])
    session.rewind(length)
    assert session.ids == IDS[:length]
    assert session.state.length == length
    assert_goes_on_like_new(session)


def test_rewinding_to_anywhere_else_is_refused() -> None:
    """Fails if a state is rebuilt from buffers that have been overwritten."""
    session = session_of(IDS[:30], [8])
    with pytest.raises(ValueError, match="no mark at 9"):
        session.rewind(9)
    assert session.length == 30


def test_a_bounded_number_of_marks_is_kept() -> None:
    """Fails if a long conversation keeps a copy of its windows per turn, or goes wrong after one was given up."""
    ids = token_ids(2 * MAX_MARKS + 1)
    session = session_of(ids, range(1, len(ids)))
    assert len(session.marks) == MAX_MARKS
    assert session.marks[-LATEST:] == list(range(len(ids) - LATEST, len(ids)))
    given_up = next(length for length in range(1, len(ids)) if length not in session.marks)
    with pytest.raises(ValueError, match=f"no mark at {given_up} tokens"):
        session.rewind(given_up)
    session.rewind(session.marks[2])
    assert_goes_on_like_new(session)


def test_what_begin_would_keep_is_what_it_keeps() -> None:
    session = session_of(IDS[:30], [8, 20])
    for ids in (IDS[:31], IDS[:30], [*IDS[:25], 159, 158], IDS[:5]):
        expected = session.kept(ids)
        assert session.length >= expected == session.begin(ids)


def test_latent_attention_goes_back_to_anywhere() -> None:
    """Fails if a model whose state only grows reads again what it has, or keeps rows of what was taken back."""
    config = tiny_mla.tiny_config("v3.2")
    latent = Engine(Mla(MlaConfig.from_dict(config), tiny_mla.random_state(config).__getitem__))
    session = latent.new_session()
    run(latent, IDS[:30], session=session)
    other = [*IDS[:20], 159, *IDS[:9]]
    assert session.kept(other) == session.begin(other) == 20
    assert difference(run(latent, other[20:], session=session), run(latent, other)[20:]) <= 2e-5
    assert session.begin(other) == len(other) - 1


def test_the_beginning_of_a_session_is_saved_without_what_came_after() -> None:
    """Fails if what is kept for other conversations holds tokens of this one, or rows of a later state."""
    session = session_of(IDS[:37], [8, 20])
    beginning, alone = session.snapshot(20), session_of(IDS[:20]).snapshot()
    assert beginning.tensors["ids"].tolist() == IDS[:20]
    assert (beginning.facts, beginning.tensors.keys()) == (alone.facts, alone.tensors.keys())
    straight = engine().new_session()
    for end in (8, 20):
        run(engine(), IDS[straight.length : end], session=straight)
    assert pack(beginning) == pack(straight.snapshot())


def saved(session: Session) -> io.BytesIO:
    return io.BytesIO(pack(session.snapshot()))


def test_a_restored_session_goes_on_bit_by_bit() -> None:
    """Fails if anything that decides the next token is missing from the snapshot."""
    session = session_of(IDS[:37], [8])
    restored = engine().new_session()
    restored.restore(saved(session))
    assert restored.ids == session.ids
    for chunk in (1, 6, 1):
        ids = token_ids(chunk, seed=chunk)
        assert torch.equal(run(engine(), ids, session=restored), run(engine(), ids, session=session))
    restored.rewind(37)
    assert_goes_on_like_new(restored)


def test_an_empty_session_can_be_saved() -> None:
    restored = session_of(IDS[:5])
    restored.restore(saved(engine().new_session()))
    assert restored.length == 0
    assert_goes_on_like_new(restored)


def test_a_snapshot_of_another_model_dtype_or_kv_format_is_refused() -> None:
    """Fails if a state is read with weights it was not made with."""
    state = random_state(CONFIG)
    tuned = random_state(CONFIG)
    tuned["layers.1.attn.wq_a.weight"][0, 0] += 1
    others = [
        Engine(bind(CONFIG, random_state(CONFIG, seed=1))),
        Engine(bind(CONFIG, tuned)),
        Engine(bind(CONFIG, as_bf16(CONFIG, state))),
        tiny_engine(layer_types=[SLIDING, CSA, HCA], num_hash_layers=1, index_topk=8),
        tiny_engine(),
    ]
    file = saved(session_of(IDS[:20]))
    for other in others:
        with pytest.raises(CheckpointError, match="another model"):
            other.new_session().restore(file)
    Engine(bind(CONFIG, state)).new_session().restore(file)


def test_a_damaged_snapshot_leaves_the_session_as_it_was() -> None:
    """Fails if it is taken over before it has been checked."""
    session, damaged = session_of(IDS[:20]), bytearray(pack(session_of(IDS[:30]).snapshot()))
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(CheckpointError, match="damaged"):
        session.restore(io.BytesIO(damaged))
    assert session.ids == IDS[:20]
    assert_goes_on_like_new(session)


@pytest.mark.parametrize(
    "facts",
    [{"ends": [[4, "x"]]}, {"ends": []}, {"ends": None}, {"ends": [[8, "x"], [8, "x"]]}, {"ends": [["a", 1]]}],
    ids=["short", "none", "null", "twice", "text"],
)
def test_a_snapshot_whose_lengths_are_wrong_is_refused(facts: dict[str, Any]) -> None:
    """Fails with a traceback: whoever wrote it can also make its digest."""
    session = session_of(IDS[:20], [8])
    saved = session.snapshot()
    with pytest.raises(CheckpointError, match="does not fit this model"):
        session.restore(io.BytesIO(pack(Snapshot(saved.facts | facts, saved.tensors))))
    assert session.ids == IDS[:20]
    assert_goes_on_like_new(session)


@pytest.mark.parametrize("damage", ["ids", "shape", "dtype", "missing", "extra"])
def test_a_snapshot_whose_tensors_are_wrong_is_refused(damage: str) -> None:
    """Fails if a mark, or the ids, would be taken over unchecked."""
    session = session_of(IDS[:20], [8])
    saved = session.snapshot()
    name = "mark.0.0"
    if damage == "ids":
        saved.tensors["ids"] = saved.tensors["ids"] + 160
    elif damage == "shape":
        saved.tensors[name] = saved.tensors[name][:-1]
    elif damage == "dtype":
        saved.tensors[name] = saved.tensors[name].bfloat16()
    elif damage == "missing":
        del saved.tensors[name]
    else:
        saved.tensors["mark.1.0"] = saved.tensors[name]
    with pytest.raises(CheckpointError, match="does not fit this model"):
        session.restore(io.BytesIO(pack(saved)))
    assert session.ids == IDS[:20]


def test_a_restored_session_can_return_to_its_marks() -> None:
    """Fails if a reply with its reasoning left out means reading the whole conversation again."""
    restored = engine().new_session()
    restored.restore(saved(session_of(IDS[:30], [8, 20])))
    assert restored.begin([*IDS[:25], 159, 158]) == 20
    assert_goes_on_like_new(restored)
    restored.rewind(8)
    assert_goes_on_like_new(restored)


def test_running_out_of_memory_is_told_as_such() -> None:
    """Fails if the user sees torch's words, or if any other error is taken for it."""

    class Full(ExpertSource):
        problem = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"

        def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            raise RuntimeError(self.problem)

    source = Full()
    full = Engine(bind(CONFIG, random_state(CONFIG), experts=source))
    with pytest.raises(ResourceError, match="out of memory"):
        run(full, IDS)
    source.problem = "shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="multiplied"):
        run(full, IDS)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


class Fuse(ExpertSource):
    """An expert source that breaks off once, in a chosen layer."""

    def __init__(self, source: ExpertSource) -> None:
        self.source = source
        self.layer: int | None = None

    def announce(self, layer: int, ids: Tensor, *, early: bool = False) -> None:
        self.source.announce(layer, ids, early=early)

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if layer == self.layer:
            self.layer = None
            raise Interrupted
        return self.source.apply(layer, hidden, ids, weights)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("marks", "kept"), [((), 0), ((16,), 16)])
def test_an_interrupted_step_leaves_a_usable_session(layer: int, marks: tuple[int, ...], kept: int) -> None:
    """Fails if rows of the torn step, written in some layers only, are ever read."""
    fuse = Fuse(engine().model.blocks[0].moe.experts)
    torn = Engine(bind(CONFIG, random_state(CONFIG), experts=fuse))
    sessions = [torn.new_session(), torn.new_session()]
    for session in sessions:
        for end in (*marks, 30):
            run(torn, IDS[session.length : end], session=session)
            if end in marks:
                session.mark()
    fuse.layer = layer
    with pytest.raises(Interrupted):
        torn.advance([(session, token_ids(21, seed=1)) for session in sessions])
    for session in sessions:
        assert session.begin(IDS) == kept
        assert difference(run(torn, IDS[kept:], session=session), run(engine(), IDS)[kept:]) <= 2e-5


class Uneasy(list[int]):
    """Token ids that are interrupted once, when they are to grow."""

    calm = False

    def extend(self, ids: Iterable[int]) -> None:
        if not self.calm:
            self.calm = True
            raise Interrupted
        super().extend(ids)


def test_an_interruption_after_the_forward_leaves_a_usable_session() -> None:
    """Fails if the state can be longer than the session's tokens without the session knowing."""
    session = session_of(IDS[:20], [8])
    session.ids = Uneasy(session.ids)
    with pytest.raises(Interrupted):
        run(engine(), IDS[20:30], session=session)
    assert session.begin(IDS) == 8
    assert_goes_on_like_new(session)


def test_an_interrupted_session_is_not_saved() -> None:
    """Fails if a torn state could be restored later as if it were sound."""
    fuse = Fuse(engine().model.blocks[0].moe.experts)
    torn = Engine(bind(CONFIG, random_state(CONFIG), experts=fuse))
    session, fuse.layer = torn.new_session(), 1
    with pytest.raises(Interrupted):
        run(torn, IDS, session=session)
    with pytest.raises(GenerationError, match="interrupted"):
        session.snapshot()
