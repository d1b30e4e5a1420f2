"""Routed experts in memory: the sum over a token's experts, worked out one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from localmoe.experts.resident import Expert, ResidentExperts
from localmoe.formats import FORMATS
from localmoe.weights import Weight
from tests.loops import noise

LIMIT = 0.8
WEIGHTS = [[noise(96, 64, seed=e), noise(64, 96, seed=e + 50), noise(96, 64, seed=e + 90)] for e in range(5)]


def experts(convert: Callable[[Tensor], Weight]) -> list[Expert]:
    return [Expert(convert(w1), convert(w2), convert(w3), LIMIT) for w1, w2, w3 in WEIGHTS]


EXPERTS = ResidentExperts([experts(lambda w: w)])


def by_hand(x: Tensor, ids: list[int], weights: list[float]) -> Tensor:
    """One token in double precision."""
    y = torch.zeros(64, dtype=torch.float64)
    for e, weight in zip(ids, weights, strict=True):
        w1, w2, w3 = (w.double() for w in WEIGHTS[e])
        gate, up = (w1 @ x.double()).clamp(max=LIMIT), (w3 @ x.double()).clamp(-LIMIT, LIMIT)
        y += weight * (w2 @ (gate * torch.sigmoid(gate) * up))
    return y


@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_each_token_gets_the_weighted_sum_of_its_experts(tokens: int) -> None:
    """Fails if tokens, weights or matrices are exchanged, or the clamp is forgotten. Some ids repeat, some are idle."""
    x, weights = noise(tokens, 64), noise(tokens, 3, seed=1)
    ids = torch.randint(4, (tokens, 3), generator=torch.Generator().manual_seed(2))
    found = EXPERTS.apply(0, x, ids, weights)
    expected = torch.stack([by_hand(x[t], ids[t].tolist(), weights[t].tolist()) for t in range(tokens)])
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4


def test_a_repeated_expert_is_added_twice() -> None:
    x, ids = noise(1, 64), torch.tensor([[2, 2]])
    twice = EXPERTS.apply(0, x, ids, torch.tensor([[0.25, 0.5]]))
    assert torch.allclose(twice, EXPERTS.apply(0, x, ids[:, :1], torch.tensor([[0.75]])), atol=1e-5)


def test_the_order_of_a_tokens_experts_does_not_matter() -> None:
    """Fails if terms are added in the order of the routing: equal scores would then change the sum."""
    x, ids, weights = noise(1, 64), torch.tensor([[3, 0, 1]]), torch.tensor([[0.3, 0.2, 0.5]])
    assert torch.equal(EXPERTS.apply(0, x, ids, weights), EXPERTS.apply(0, x, ids.flip(1), weights.flip(1)))


def test_bf16_terms_are_added_in_float32() -> None:
    """Fails if the weighted sum is rounded after every expert."""
    rounded = experts(Tensor.bfloat16)
    x, ids = noise(1, 64).bfloat16(), torch.tensor([[0, 1, 4]])
    weights = torch.tensor([[0.3, 0.2, 0.5]])
    found = ResidentExperts([rounded]).apply(0, x, ids, weights)
    expected = sum(float(w) * rounded[int(e)](x).float() for w, e in zip(weights[0], ids[0], strict=True))
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.as_tensor(expected), atol=1e-5)


def test_packed_experts_compute_as_their_values() -> None:
    quantize = FORMATS["fp4"].quantize
    packed = ResidentExperts([experts(quantize)])
    plain = ResidentExperts([experts(lambda w: quantize(w).dequantize())])
    x, ids, weights = noise(7, 64), torch.tensor([[0, 4]] * 7), noise(7, 2, seed=1)
    assert torch.equal(packed.apply(0, x, ids, weights), plain.apply(0, x, ids, weights))
