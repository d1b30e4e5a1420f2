"""Prompts of models on GPUs that cannot hold all experts: longer steps, and the numbers of the CPU. Devices are
simulated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe import LLM, gpus, step_size
from localmoe.experts.carried import CarriedExperts
from localmoe.experts.flow import STREAMED_TOKENS
from localmoe.experts.paging import Paging
from localmoe.experts.vram import SPARE
from localmoe.library import EMBEDDED
from localmoe.loader import Loaded, bytes_held, load_model
from localmoe.marks import LEAST_MARKS
from localmoe.models.family import tensor_inventory
from localmoe.models.shares import _with_long_steps, shares_of
from localmoe.models.sizes import sizes_of_config
from localmoe.pager import open_model
from localmoe.spread import GPU_BASE_BYTES, Gpu, Share
from tests.fake_accelerator import FakeAccelerator
from tests.simulated_devices import SIMULATED, simulated
from tests.test_gpu_models import MANY, PLENTY, agrees, opened, pager_of, taken
from tests.tiny_engine import token_ids
from tests.tiny_mla import write_published_mla
from tests.tiny_v4 import random_state, write_published

A, B, _ = SIMULATED


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "v4": write_published(folder / "v4", MANY, random_state(MANY), shards=2),
        "v2-lite": write_published_mla(folder / "v2-lite", "v2-lite", n_routed_experts=24),
    }


def fake(layout: Any, host: Any, slots: int, device: torch.device, *, limit: float) -> FakeAccelerator:
    made = FakeAccelerator(slots, layout, host, limit, seconds=1e-7, copy_seconds=1e-7)
    MADE.append(made)
    return made


MADE: list[FakeAccelerator] = []


@pytest.mark.parametrize("name", ["v4", "v2-lite"])
def test_a_prompts_experts_pass_through(models: dict[str, Path], name: str) -> None:
    """Two GPUs with a few slots each. Fails if experts pass through the other's, or give other numbers."""
    MADE.clear()
    slot = taken(models[name])[2]
    with simulated():
        alone = load_model(models[name], torch.float32, gpus=[Gpu(A, PLENTY), Gpu(B, PLENTY)], context=512).shares
        on = (Gpu(share.gpu.device, PLENTY - share.left + (SPARE + 3) * slot) for share in alone)
        engine, cpu = opened(models[name], *on, accelerate=fake, context=512), opened(models[name])
        ids = token_ids(STREAMED_TOKENS + 30)
        assert all(agrees(engine, cpu, 1e-4, ids=ids) for _ in range(2))
    pager, layers = pager_of(engine), engine.model.config.num_layers
    pager.check()
    dense = layers - engine.model.config.num_moe_layers
    on_a = {layer for layer, site in enumerate(engine.model.sites) if site.device == A}
    for made, there in zip(MADE, (True, False), strict=True):
        assert {layer + dense in on_a for layer, _ in made.passed} == {there}
    pager.close()


def sized(path: Path, part: float) -> tuple[Loaded, Gpu]:
    """A model on a GPU with room for this part of its experts, and no other."""
    with simulated():
        loaded = load_model(path, torch.float32, gpus=[Gpu(A, PLENTY)])
        layout = load_model(path, torch.float32, experts="paged").layout
        assert layout is not None
        return loaded, Gpu(A, PLENTY - loaded.shares[0].left + int(layout.total_bytes * part))


@pytest.mark.parametrize(("part", "longer"), [(0.9, True), (0.01, False), (1.0, False)])
def test_steps_are_longer_where_there_is_room(part: float, longer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model. Fails if they are as long where nothing crosses, or take the room of what they need."""
    monkeypatch.setattr(step_size, "_FEW", 16)
    _loaded, gpu = sized(EMBEDDED, part)
    monkeypatch.setattr(gpus, "find", lambda device, vram: [gpu])
    monkeypatch.setattr(gpus, "kernels_for", lambda found, kernels: (None, fake))
    with simulated():
        llm = LLM(kernels="reference", device="cuda")
        experts = llm.engine.model.experts
        assert isinstance(experts, CarriedExperts) and experts.prompt_tokens == llm.engine.prefill_tokens
        assert (llm.engine.prefill_tokens > 16) is longer
        llm.close()


def test_what_a_longer_step_takes_is_kept_free(models: dict[str, Path]) -> None:
    """Fails if its memory is given to experts as well."""
    path = EMBEDDED
    loaded, gpu = sized(path, 0.9)
    with simulated():
        found = load_model(path, torch.float32, gpus=[gpu])
    ordinary = step_size.prefill_tokens(found.config.expert_weights)
    more = found.config.work.of(found.prompt_tokens) - found.config.work.of(ordinary)
    assert found.prompt_tokens >= ordinary
    assert gpu.nbytes - found.shares[0].left == PLENTY - loaded.shares[0].left + more


def test_a_longer_step_takes_no_small_caches_last_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with room for so many slots. Fails if a few are given up, without which none of the others is of use."""
    monkeypatch.setattr(step_size, "_FEW", 16)
    config, held = bytes_held(EMBEDDED, torch.float32)
    layout = load_model(EMBEDDED, torch.float32, experts="paged").layout
    assert layout is not None
    (alone,), _ = shares_of(config, held, torch.float32, [Gpu(A, PLENTY)], None)
    tokens = []
    for slots in (0, 1, SPARE, 9, 11, 12, 13, 16, 20, 24):
        room = PLENTY - alone.left + slots * layout.slot_bytes
        (share,), found = shares_of(config, held, torch.float32, [Gpu(A, room)], None)
        assert share.left // layout.slot_bytes >= min(slots, SPARE + 3)
        tokens.append(found)
    assert tokens == sorted(tokens) and tokens[0] == 16 < tokens[-1]


@pytest.mark.parametrize("context", [None, 100])
@pytest.mark.parametrize("name", ["v4", "v2-lite"])
def test_what_is_left_for_experts_is_what_nothing_else_takes(
    models: dict[str, Path], name: str, context: int | None
) -> None:
    """Added up by hand. Fails if memory is promised twice: for weights, decode state or the work of a step."""
    config, held = bytes_held(models[name], torch.float32)
    (share,), tokens = shares_of(config, held, torch.float32, [Gpu(A, PLENTY)], context)
    length, sizes = min(context or 1 << 15, config.max_position_embeddings), sizes_of_config(config, "", 4)
    looked_up = "embed.weight", "embed_tokens.weight", "tid2eid"
    weights = sum(n for at, n in held.items() if ".experts." not in at and not at.endswith(looked_up))
    inventory = tensor_inventory(config)
    weights += sum(4 * math.prod(inventory[at].shape) for at in held if at.endswith("kv_b_proj.weight"))
    state = (sizes.kv_bytes(length) + LEAST_MARKS * sizes.kv_fixed_bytes) // config.num_layers * config.num_layers
    taken = GPU_BASE_BYTES + config.work.of(min(512, length)) + weights + state
    assert (PLENTY - share.left, tokens) == (taken, 512)


def test_the_gpu_with_the_least_room_decides() -> None:
    """Fails if a step is longer than one of several GPUs has room for, or one does not leave that room."""
    config, _held = bytes_held(EMBEDDED, torch.float32)

    def of(*left: int, least: int = 0) -> tuple[list[int], int]:
        spread = [Share(Gpu(A, PLENTY), i, i + 1, nbytes, whole=False) for i, nbytes in enumerate(left)]
        shares, tokens = _with_long_steps(config, spread, 512, 1024, least)
        return [share.left for share in shares], tokens

    more = config.work.of(1024) - config.work.of(512)
    assert of(9 * more, 4 * more) == ([8 * more, 3 * more], 1024)
    for left in ((9 * more, 4 * more - 4), (4 * more - 4, 9 * more)):
        assert of(*left) == (list(left), 512)
    assert of(9 * more, 4 * more, least=4) == ([9 * more, 4 * more], 512)


def test_loading_tells_how_far_it_is_until_experts_are_there(models: dict[str, Path]) -> None:
    """Fails if it says that all is read before the GPU has its experts, or goes back."""
    for path in models.values():
        calls: list[tuple[int, int]] = []
        with simulated():
            open_model(
                path, "tiny", Paging(), dtype=torch.float32, gpus=[Gpu(A, PLENTY)],
                progress=lambda done, total, calls=calls: calls.append((done, total)),
            )  # fmt: skip
        done = [each for each, _ in calls]
        assert len({total for _, total in calls}) == 1 and calls[-1][0] == calls[-1][1]
        assert done == sorted(set(done))
        assert sum(each < calls[-1][1] for each in done) >= 24
