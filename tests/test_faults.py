"""Damaged weights: which sequences they stop, and what is named as the place."""

from __future__ import annotations

import functools

import pytest
import torch

from localmoe.engine import Engine
from localmoe.step import Fault, RouterRecord, Step
from tests.tiny_engine import bind, difference, token_ids
from tests.tiny_v4 import CSA, HCA, SLIDING, random_state, tiny_config

CONFIG = tiny_config(layer_types=[SLIDING, CSA, HCA], num_hash_layers=1)
TEXTS = [token_ids(1 + seed % 3, seed) for seed in range(12)]


@functools.cache
def engine() -> Engine:
    return Engine(bind(CONFIG, random_state(CONFIG)))


def routed_to(layer: int, expert: int) -> list[bool]:
    """Which of TEXTS use an expert, in a sound model."""
    used, model = [], engine().model
    for ids in TEXTS:
        log: list[RouterRecord] = []
        with torch.no_grad():
            model.forward(Step.of([(model.new_state(), ids)], router_log=log))
        used.append(expert in log[layer].ids)
    return used


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
@pytest.mark.parametrize(("layer", "expert"), [(0, 1), (1, 5), (2, 0)])
def test_a_broken_expert_stops_only_the_sequences_routed_to_it(layer: int, expert: int, damage: float) -> None:
    """Fails if the fault is blamed on another place, or reaches batch mates."""
    state = random_state(CONFIG)
    state[f"layers.{layer}.ffn.experts.{expert}.w2.weight"][3] = damage
    broken = Engine(bind(CONFIG, state))
    result = broken.advance([(broken.new_session(), ids) for ids in TEXTS])
    sound = engine().advance([(engine().new_session(), ids) for ids in TEXTS])
    used = routed_to(layer, expert)
    assert {True, False} == set(used)
    assert result.faults == {i: Fault(layer, f"expert {expert}") for i, hit in enumerate(used) if hit}
    assert not sound.faults
    mates = [i for i, hit in enumerate(used) if not hit]
    assert difference(result.logits[mates], sound.logits[mates]) <= 2e-5


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("layers.1.attn.kv_norm.weight", Fault(1, "attention")),
        ("layers.2.ffn.shared_experts.w3.weight", Fault(2, "mixture of experts")),
    ],
)
def test_a_broken_shared_weight_is_named_by_layer_and_part(name: str, fault: Fault) -> None:
    """Fails if later layers, which only inherit the damage, are blamed."""
    state = random_state(CONFIG)
    state[name].view(-1)[0] = float("nan")
    broken = Engine(bind(CONFIG, state))
    result = broken.advance([(broken.new_session(), ids) for ids in TEXTS[:2]])
    assert result.faults == {0: fault, 1: fault}
    assert str(fault) == f"layer {fault.layer}, {fault.site}"
