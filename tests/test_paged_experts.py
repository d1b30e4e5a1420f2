"""Experts read from disk on demand give the bits that experts in memory give, whatever fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe import backend
from localmoe.backend import KernelChoice
from localmoe.engine import Engine
from localmoe.errors import CheckpointError, ReadError, UsageError
from localmoe.experts.paged import PagedExperts
from localmoe.experts.paging import Paging
from localmoe.experts.policies import POLICIES
from localmoe.experts.policy import PolicyName
from localmoe.experts.simulate import replay
from localmoe.experts.trace import Counted, read_trace
from localmoe.kernels import native
from localmoe.pager import open_model
from tests.tiny_engine import run, token_ids
from tests.tiny_v4 import PUBLISHED_DIMS, random_state, tiny_config, write_published

CONFIG = tiny_config(**PUBLISHED_DIMS | {"n_routed_experts": 9, "num_experts_per_tok": 3})
STATE = random_state(CONFIG)
NATIVE = [] if isinstance(native.load(), str) else ["strict", "native"]
CHOICES: list[KernelChoice] = [*NATIVE, "reference"]  # type: ignore[list-item]
PROMPT = token_ids(37)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("model"), CONFIG, STATE, shards=3)


def opened(path: Path, paging: Paging, kernels: KernelChoice = "reference") -> Engine:
    return Engine(open_model(path, "tiny", paging, dtype=torch.float32, backend=backend.choose(kernels)))


def logits(engine: Engine) -> Tensor:
    """A prompt in two chunks, then single tokens."""
    session = engine.new_session()
    parts = [run(engine, PROMPT[:20], session=session), run(engine, PROMPT[20:31], session=session)]
    return torch.cat([*parts, run(engine, PROMPT[31:], chunk=1, session=session)])


def paged(engine: Engine) -> PagedExperts:
    experts = engine.model.experts
    assert isinstance(experts, PagedExperts)
    return experts


@pytest.fixture(scope="module")
def expected(published: Path) -> dict[KernelChoice, Tensor]:
    return {kernels: logits(opened(published, Paging(), kernels)) for kernels in CHOICES}


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(2, 60),
    policy=st.sampled_from(sorted(POLICIES)),
    prefetch=st.booleans(),
    guess=st.booleans(),
    kernels=st.sampled_from(CHOICES),
)
def test_logits_do_not_depend_on_what_fits_in_memory(
    published: Path,
    expected: dict[KernelChoice, Tensor],
    slots: int,
    policy: str,
    prefetch: bool,
    guess: bool,
    kernels: KernelChoice,
) -> None:
    """Fails if a slot is given away while it is computed from, terms are added in order of arrival, or an expert is
    computed before it is read."""
    engine = opened(published, Paging(slots=slots, policy=policy, prefetch=prefetch, guess=guess), kernels)  # type: ignore[arg-type]
    try:
        assert torch.equal(logits(engine), expected[kernels])
        paged(engine).check()
        assert paged(engine).capacity == min(slots, 6 * 9)
    finally:
        paged(engine).close()


def test_plain_experts_are_paged_as_well(tmp_path: Path) -> None:
    """Fails if float32 experts in one stack or shard are cut at the wrong byte."""
    path = write_published(tmp_path, CONFIG, STATE, quantized=False, shards=1)
    for kernels in CHOICES:
        engine = opened(path, Paging(slots=4), kernels)
        assert torch.equal(logits(engine), logits(opened(path, Paging(), kernels))), kernels
        paged(engine).close()


def test_guesses_come_true(published: Path) -> None:
    """Fails if layers are not foreseen at all, or true guesses are read again when they are asked for."""
    engine = opened(published, Paging(slots=17))
    logits(engine)
    stats = paged(engine).stats
    assert 0 < stats.true_guesses <= stats.guesses
    plain = opened(published, Paging(slots=17, guess=False))
    logits(plain)
    assert paged(plain).stats.guesses == 0
    assert (paged(plain).stats.hits, paged(plain).stats.misses) == (stats.hits, stats.misses)
    for each in (engine, plain):
        paged(each).close()


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slots", [2, 5, 17, 40])
def test_the_simulator_counts_what_the_pager_counted(
    published: Path, tmp_path: Path, slots: int, policy: PolicyName, prefetch: bool
) -> None:
    """Fails if a decision depends on when a read completes, or the replay orders anything differently."""
    file = tmp_path / "trace.jsonl"
    engine = opened(published, Paging(slots=slots, policy=policy, prefetch=prefetch, trace=file))
    logits(engine)
    stats = paged(engine).stats
    paged(engine).close()
    header, entries = read_trace(file)
    recorded = list(entries)
    counts = replay(header, recorded, slots, POLICIES[policy](6 * 9))
    assert recorded[-1] == Counted(stats.hits, stats.misses)
    assert (counts.hits, counts.misses, counts.first) == (stats.hits, stats.misses, stats.first)


def test_a_model_that_fits_is_traced_too(published: Path, tmp_path: Path) -> None:
    """Fails if only paged models can be recorded, or recording changes a bit."""
    file = tmp_path / "trace.jsonl.gz"
    engine = opened(published, Paging(trace=file))
    found = logits(engine)
    engine.model.experts.close()  # type: ignore[attr-defined]
    assert torch.equal(found, logits(opened(published, Paging())))
    header, entries = read_trace(file)
    assert header.capacity == 0
    assert sum(step.tokens for step in entries if hasattr(step, "tokens")) == len(PROMPT)


def test_a_shard_that_shrinks_is_an_error_with_its_name(tmp_path: Path) -> None:
    """Fails if missing bytes are computed with, or the process dies of them."""
    path = write_published(tmp_path, CONFIG, STATE, shards=1)
    engine, early = opened(path, Paging(slots=3)), opened(path, Paging(slots=3))
    logits(engine)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has been replaced or cut short"):
        logits(early)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte"):
        logits(engine)
    paged(engine).close()
    paged(early).close()


def test_a_disk_that_fails_once_is_asked_again(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one EIO ends a run, or a second one is passed over."""
    from localmoe.experts import file

    calls, real = [0], file.os.preadv
    fail_at = [5]

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls[0] += 1
        if calls[0] in fail_at:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    engine = opened(published, Paging(slots=4))
    good = logits(engine)
    monkeypatch.setattr(file.os, "preadv", preadv)
    assert torch.equal(logits(engine), good)
    fail_at.extend(range(calls[0] + 3, calls[0] + 100))
    with pytest.raises(ReadError, match="twice"):
        logits(engine)
    monkeypatch.setattr(file.os, "preadv", real)
    assert torch.equal(logits(engine), good), "after the disk has come back"
    paged(engine).check()
    paged(engine).close()


def test_a_step_broken_off_between_layers_holds_no_slots(published: Path) -> None:
    """Fails if the next step finds every slot in use by one that will never end."""
    engine = opened(published, Paging(slots=2))
    good = logits(engine)
    # As far as a step comes that is interrupted in the shared expert.
    paged(engine).announce(4, torch.tensor([[0, 5, 7]]))
    assert torch.equal(logits(engine), good)
    paged(engine).close()


def test_zero_filled_scales_are_refused_when_they_are_read(tmp_path: Path) -> None:
    """Fails if a half-written shard is computed with."""
    from localmoe.safetensors_io import open_shard

    path = write_published(tmp_path, CONFIG, STATE, shards=1)
    _, refs = open_shard(path / "model.safetensors")
    ref = refs["layers.3.ffn.experts.4.w2.scale"]
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(ref.offset)
        file.write(bytes(ref.nbytes))
    engine = opened(path, Paging(slots=3))
    with pytest.raises(CheckpointError, match="expert 4 of layer 3"):
        logits(engine)
    paged(engine).close()


@pytest.mark.parametrize("paging", [Paging(slots=1), Paging(slots=4, ram=1 << 33), Paging(policy="lfu")])  # type: ignore[arg-type]
def test_values_out_of_range_are_refused(published: Path, paging: Paging) -> None:
    with pytest.raises(UsageError):
        opened(published, paging)
