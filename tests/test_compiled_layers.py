"""Layers in one call of the C++ kernels against the same layers op by op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from localmoe import backend
from localmoe.engine import Engine
from localmoe.kernels.native import Library, MoeLayer, Routing, Scoring
from localmoe.layers import compiled
from localmoe.layers.router import GroupRouter
from localmoe.models.family import build, config_of
from localmoe.step import Fault
from tests.loops import noise
from tests.native_kernels import bound, library, needs_native
from tests.test_native_experts import COUNT, LIMIT, D, experts_of, table_of
from tests.tiny_engine import difference, token_ids
from tests.tiny_mla import CONFIGS, random_state, tiny_config

pytestmark = needs_native

# As far as bf16 activations may drift apart if a router's weights differ in their last bit; logits are about 1.
FAST = 0.05


def state_of(config: dict[str, Any], kernels: str) -> dict[str, Tensor]:
    """Matrices in what each mode computes alike: float32, or bf16."""
    state = random_state(config)
    kept = torch.float32 if kernels == "strict" else torch.bfloat16
    return {n: t.to(kept) if t.dim() == 2 and "embed" not in n else t for n, t in state.items()}


def engine_of(config: dict[str, Any], kernels: Any, state: dict[str, Tensor] | None = None) -> Engine:
    get = (state or state_of(config, kernels)).__getitem__
    return Engine(build(config_of(config), get, dtype=torch.float32, backend=backend.choose(kernels, 2)))


@contextmanager
def op_by_op() -> Iterator[None]:
    with mock.patch.object(compiled, "_takes", lambda x, step: False):
        yield


def decode(engine: Engine) -> tuple[Tensor, dict[int, Fault]]:
    """Logits of some steps: sequences of different lengths alone, together, and going back."""
    sessions = [engine.new_session() for _ in range(3)]
    for i, session in enumerate(sessions):
        engine.advance([(session, token_ids(17 + 13 * i, i))])
        session.mark()
    found, faults = [], dict[int, Fault]()
    for step in range(4):
        together = sessions[: 1 + step % 3]
        done = engine.advance([(session, [7 + step]) for session in together])
        found.append(done.logits)
        faults |= done.faults
    sessions[0].rewind(17)
    found.append(engine.advance([(sessions[0], [3])]).logits)
    return torch.cat(found), faults


@pytest.mark.parametrize("kernels", ["strict", "native"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decode_step_is_the_same_in_one_call(name: str, kernels: str) -> None:
    """Fails if a layer, a cache's row or a sequence is taken for another; strict mode keeps every bit."""
    engine = engine_of(tiny_config(name), kernels)
    with mock.patch.object(Library, "latent_layers", autospec=True, side_effect=Library.latent_layers) as called:
        found, _ = decode(engine)
    with op_by_op():
        expected, _ = decode(engine)
    # V3.2 has an index, whose attention goes op by op.
    calls = 0 if name == "v3.2" else 5 if kernels == "native" else 5 * len(engine.model.blocks)
    assert called.call_count == calls
    assert difference(found, expected) <= (0 if kernels == "strict" else FAST)


def test_a_broken_expert_is_named_as_it_is_op_by_op() -> None:
    """Fails if a step that is not finite is neither done again nor leaves the sequences as long as they are."""
    config = tiny_config("v3")
    state = state_of(config, "native")
    for expert in range(8):
        state[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"][3] = float("nan")
    engine = engine_of(config, "native", state)
    found, faults = decode(engine)
    with op_by_op():
        expected, same = decode(engine)
    assert faults == same and faults[0].layer == 2 and "expert" in faults[0].site
    assert found.isnan().all() and expected.isnan().all()


# Of a norm: weight and eps.
ONES = torch.ones(D), 1e-5


def router(groups: int, *, normalize: bool, bias: bool) -> GroupRouter:
    # Few values, so that many scores are equal.
    gate = noise(COUNT * 4, D, seed=3).mul(0.5).round() * 0.1
    gate[5], gate[9] = gate[2], gate[2]
    added = noise(COUNT * 4, seed=4).round() if bias else None
    return GroupRouter(
        gate=gate, top_k=5, scale=2.5, normalize=normalize, bias=added, groups=groups, keep=max(groups // 2, 1)
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("scoring", "groups", "bias"),
    [
        ("softmax", 1, False),
        ("softmax", 4, False),
        ("sigmoid", 1, True),
        ("sigmoid", 4, True),
    ],
)
def test_experts_are_chosen_and_weighed_as_by_the_router(
    scoring: Scoring, groups: int, bias: bool, normalize: bool
) -> None:
    """Fails if ties, groups, bias or the sum of the weights are treated otherwise."""
    way, x = router(groups, normalize=normalize, bias=bias), noise(9, D)
    assert isinstance(way.gate, Tensor)
    gate = bound(way.gate)
    experts = table_of(experts_of("f32") * 4)
    routing = way.routing(gate, "strict")
    assert routing.scoring == scoring
    layer = MoeLayer.of((experts, routing), table_of(experts_of("f32")[:1]), norm=ONES)
    _, ids, weights = library().moe_layer(layer, x, mode="strict")
    x = library().rms_norm(x, *ONES)
    # The same logits, for torch's own differ in the last bit, which would tell equal ones apart.
    with mock.patch("localmoe.layers.router.linear_float32", lambda x, w: library().linear(x, gate, mode="strict")):
        scores = way.scores(x)
        expected = way.choose(scores)
    assert torch.equal(ids, expected)
    chosen = scores.gather(1, ids)
    chosen = chosen / chosen.sum(1, keepdim=True) if normalize else chosen
    assert difference(weights, chosen * 2.5) <= 2e-6


def test_a_score_that_is_no_number_is_taken() -> None:
    """Fails if an expert with a damaged row of the router were never chosen, so that nobody would find out."""
    way, x = router(1, normalize=True, bias=True), noise(3, D)
    assert isinstance(way.gate, Tensor)
    way.gate[7] = float("nan")
    layer = MoeLayer.of(
        (table_of(experts_of("f32") * 4), way.routing(bound(way.gate), "strict")),
        table_of(experts_of("f32")[:1]),
        norm=ONES,
    )
    _, ids, weights = library().moe_layer(layer, x, mode="strict")
    assert (ids[:, 0] == 7).all() and (way.choose(way.scores(x))[:, 0] == 7).all()
    assert weights.isnan().all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_half_layer_is_the_sum_of_its_parts(tokens: int) -> None:
    """Fails if the norm, the residual, the routed or the shared expert is left out or taken twice."""
    x = noise(tokens, D)
    experts, shared = table_of(experts_of("bf16")), table_of(experts_of("int4_g32")[:1])
    gate, weight = bound(noise(COUNT, D, seed=8) * D**-0.5), 1 + 0.1 * noise(D, seed=9)
    routing = Routing(gate, "strict", None, 2, "softmax", 1.5, True)
    layer = MoeLayer.of((experts, routing), shared, norm=(weight, 1e-5))
    y, ids, weights = library().moe_layer(layer, x, mode="strict")
    normed = library().rms_norm(x, weight, 1e-5)
    parts = library().experts(experts, normed, ids, weights, mode="strict")
    parts = parts + library().experts(
        shared, normed, torch.zeros(tokens, 1).long(), torch.ones(tokens, 1), mode="strict"
    )
    assert difference(y, parts + x) <= 1e-5


def test_a_shared_expert_of_another_limit_is_refused() -> None:
    """Fails if one expert is clamped with the limit of another."""
    other = table_of(experts_of("bf16")[:1])
    other.limit = 2 * LIMIT
    with pytest.raises(ValueError, match="one width and limit"):
        routing = Routing(bound(noise(COUNT, D)), "strict", None, 1, "softmax", 1.0, True)
        MoeLayer.of((table_of(experts_of("bf16")), routing), other, norm=ONES)
