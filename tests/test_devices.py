"""Models whose layers are on devices: the same bits as on the CPU, whatever is where. Devices are simulated."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.cache import EntryPool
from localmoe.engine import Engine
from localmoe.errors import ResourceError
from localmoe.experts.carried import CarriedExperts
from localmoe.models.family import build, config_of
from localmoe.models.model import Model
from localmoe.session import Session
from localmoe.site import CPU, Site
from localmoe.snapshot import pack
from tests import tiny_mla, tiny_v4
from tests.simulated_devices import SIMULATED, simulated
from tests.tiny_engine import run, token_ids
from tests.tiny_v4 import CSA, HCA, SLIDING

A, B, C = SIMULATED
V4 = tiny_v4.tiny_config(layer_types=[SLIDING, CSA, HCA, CSA], num_hash_layers=1)
NAMES = ("v4", "v2-lite", "v3", "v3.2")
# Layers over devices: all on one, two devices, the first or last layers on the CPU, back and forth.
WHERE = {"one": (A,), "two": (A, B), "cpu first": (CPU, A), "cpu last": (A, CPU), "mixed": (A, CPU, B, A, C)}
IDS = token_ids(90)
CHUNKS = IDS[:50], IDS[50:53], IDS[53:54], IDS[54:55], IDS[55:]


def configured(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = V4 if name == "v4" else tiny_mla.tiny_config(name)
    return config, (tiny_v4 if name == "v4" else tiny_mla).random_state(config)


@functools.cache
def on_cpu(name: str) -> Engine:
    config, state = configured(name)
    return Engine(build(config_of(config), state.__getitem__))


def sites_of(model_layers: int, where: Sequence[torch.device]) -> list[Site]:
    """Neighbours together, as evenly as can be."""
    return [Site(where[i * len(where) // model_layers]) for i in range(model_layers)]


def on_devices(name: str, where: Sequence[torch.device], *, carried: bool = False) -> Engine:
    """carried: routed experts are on the CPU."""
    config, state = configured(name)
    parsed = config_of(config)
    sites = sites_of(parsed.num_layers, where)
    experts = CarriedExperts(on_cpu(name).model.experts, {}) if carried else None
    return Engine(build(parsed, state.__getitem__, sites=sites, experts=experts))


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with simulated():
        yield


@functools.cache
def by_the_cpu(name: str) -> list[Tensor]:
    """Logits after a long chunk, one that crosses windows, and single tokens."""
    session = on_cpu(name).new_session()
    return [run(on_cpu(name), chunk, session=session) for chunk in CHUNKS]


@pytest.mark.parametrize(("where", "carried"), [*((w, False) for w in WHERE), ("two", True), ("mixed", True)])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_cpu(name: str, where: str, carried: bool) -> None:
    """Fails if a tensor stays behind, meets one of another device, or something is left out there."""
    engine = on_devices(name, WHERE[where], carried=carried)
    session = engine.new_session()
    for chunk, expected in zip(CHUNKS, by_the_cpu(name), strict=True):
        assert torch.equal(run(engine, chunk, session=session), expected)


def tensors_of(part: Any) -> Iterator[Tensor]:
    """Of a block and all that it is made of; tables by token are the CPU's."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and field.name != "tid2eid":
            yield value
        elif dataclasses.is_dataclass(value):
            yield from tensors_of(value)


def test_a_layers_weights_and_state_are_on_its_device() -> None:
    """Fails if something of a layer is kept on the CPU, from which it would be copied in each step."""
    engine = on_devices("v4", (A, B))
    model: Model = engine.model
    session = engine.new_session()
    run(engine, IDS, session=session)
    for layer, (site, block) in enumerate(zip(model.sites, model.blocks, strict=True)):
        state = session.state.layers[layer]
        held = [*block.sample_weights(), *state.fixed_tensors(), *(pool.buffer for pool, _ in state.pools())]
        assert {t.device for t in held if isinstance(t, Tensor)} == {site.device}
        all_of_it = list(tensors_of(block))
        assert len(all_of_it) >= 20 and {t.device for t in all_of_it} == {site.device}
    assert model.norm.device == B and model.embed.device == CPU


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_sessions_move_between_devices_and_the_cpu(name: str) -> None:
    """Fails if a saved session holds what no other machine has, or a mark or a fork is on another device."""
    engine, cpu = on_devices(name, (A, B)), on_cpu(name)
    assert engine.fingerprint == cpu.fingerprint
    first = engine.new_session()
    run(engine, IDS[:30], session=first)
    first.mark()
    run(engine, IDS[30:60], session=first)
    straight = run(cpu, IDS)[60:]

    def saved(session: Session) -> io.BytesIO:
        return io.BytesIO(pack(session.snapshot()))

    there, again = cpu.new_session(), engine.new_session()
    there.restore(saved(first))
    again.restore(saved(there))
    assert torch.allclose(run(cpu, IDS[60:], session=there), straight, atol=2e-5)
    assert torch.allclose(run(engine, IDS[60:], session=again), straight, atol=2e-5)
    assert first.begin(IDS[:31]) == 30
    assert torch.allclose(run(engine, IDS[30:], session=first.fork(30)), run(cpu, IDS)[30:], atol=2e-5)


@pytest.mark.parametrize("where", ["one", "two", "cpu last"])
def test_faults_are_named_after_the_step(where: str) -> None:
    """Fails if what a device computed is not looked at, a later layer on the CPU is blamed, or a sound sequence is."""
    config, state = configured("v4")
    state = dict(state)
    state["layers.1.attn.wo_b.weight"] = state["layers.1.attn.wo_b.weight"] * float("nan")
    parsed = config_of(config)
    engine = Engine(build(parsed, state.__getitem__, sites=sites_of(parsed.num_layers, WHERE[where])))
    done = engine.advance([(engine.new_session(), IDS[:3]), (engine.new_session(), IDS[:1])])
    assert {i: str(fault) for i, fault in done.faults.items()} == {0: "layer 1, attention", 1: "layer 1, attention"}
    sound = on_devices("v4", WHERE[where])
    assert not sound.advance([(sound.new_session(), IDS[:3])]).faults


class Small:
    """A device that has room for steps of so many tokens."""

    def __init__(self, model: Model, tokens: int, layer: int) -> None:
        self.tokens, self.steps, block = tokens, list[int](), model.blocks[layer]
        attention = block.attention

        def limited(x: Tensor, *rest: Any) -> Tensor:
            self.steps.append(len(x))
            if len(x) > self.tokens:
                raise torch.OutOfMemoryError("no room")
            return attention(x, *rest)  # type: ignore[no-any-return]

        object.__setattr__(block, "attention", limited)
        limited.compressor = getattr(attention, "compressor", None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["v4", "v3"])
def test_a_device_out_of_memory_takes_the_step_in_halves(name: str) -> None:
    """Fails if the first layers' states keep what the step that failed wrote, or rows of logits change places."""
    engine, cpu = on_devices(name, (A, B)), on_cpu(name)
    small = Small(engine.model, 30, 2)
    work = [(engine.new_session(), IDS[:41]), (engine.new_session(), IDS[7:8]), (engine.new_session(), IDS[5:25])]
    done = engine.advance(work, all_logits=True)
    straight = torch.cat([run(cpu, chunk) for _, chunk in work])
    assert torch.allclose(done.logits, straight, atol=2e-5) and not done.faults
    assert max(small.steps) > 30 and [session.ids for session, _ in work] == [list(chunk) for _, chunk in work]
    # What has not fitted is not tried again.
    small.steps.clear()
    again = engine.advance([(engine.new_session(), IDS[:62])]).logits
    assert max(small.steps) <= 31 and torch.allclose(again, run(cpu, IDS[:62])[-1:], atol=2e-5)
    small.tokens = 0
    with pytest.raises(ResourceError, match="a device is out of memory"):
        engine.advance([(work[0][0], IDS[41:44])])


def test_devices_that_are_simulated_refuse_each_other() -> None:
    """Fails if the other tests could not see a tensor on the wrong device."""
    x = torch.ones(2, 2)
    for other in (x, x.to(B)):
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            x.to(A) @ other
    assert torch.equal((x.to(A) @ x.to(A)).to(B).cpu(), x @ x)


class Tight:
    """A device that has no room for more rows of caches until something has been given back so often."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, needed: int, given: int) -> None:
        """given: how often experts can give something back."""
        self.needed, self.given = needed, given
        monkeypatch.setattr(engine.model.experts, "give_back", self.give_back, raising=False)
        make_room = EntryPool._make_room

        def refused(pool: EntryPool, need: int) -> None:
            if need > len(pool.buffer) and self.needed:
                raise torch.OutOfMemoryError("no room")
            make_room(pool, need)

        monkeypatch.setattr(EntryPool, "_make_room", refused)

    def give_back(self) -> bool:
        self.given -= 1
        self.needed = max(self.needed - 1, 0)
        return self.given >= 0


@pytest.mark.parametrize("name", ["v4", "v3"])
def test_cached_experts_give_way_to_what_is_kept_of_a_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a step begins that the caches have no room for, or an error comes before all has been given back."""
    engine, cpu = on_devices(name, (A, B)), on_cpu(name)
    session, here = engine.new_session(), cpu.new_session()
    tight = Tight(engine, monkeypatch, needed=2, given=3)
    for ids in (IDS[:40], IDS[40:41]):
        assert torch.allclose(run(engine, ids, session=session), run(cpu, ids, session=here), atol=2e-5)
    assert tight.given == 1
    tight.needed = 9
    with pytest.raises(ResourceError, match="a device is out of memory"):
        engine.advance([(session, IDS * 20)])
    # Nothing has been begun.
    assert session.kept([*IDS[:41], 5]) == 41
    tight.needed = 0
    assert torch.allclose(run(engine, IDS[41:43], session=session), run(cpu, IDS[41:43], session=here), atol=2e-5)
