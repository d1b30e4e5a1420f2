"""Triton's MoE layer against the sum worked out in float64 on dequantized experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.loops import noise
from tests.test_triton_linear import packed
from tests.triton_kernels import DEVICE, error

# isort: split
from localmoe.kernels.triton.experts import experts
from localmoe.kernels.triton.groups import FEW_PAIRS, Groups, group, group_few, group_many
from localmoe.kernels.triton.matrix import Matrix
from localmoe.kernels.triton.slab import Experts

LIMIT, COUNT, D, F = 0.8, 5, 160, 96
KINDS = ["fp4", "fp8_block", "int8 32", "int4 32", "int4 32 zeros", "nf4 32", "bf16"]


def made(kind: str) -> tuple[Experts, list[tuple[Tensor, Tensor, Tensor]]]:
    """Experts of one kind, and the matrices they stand for."""
    shapes = ((F, D), (D, F), (F, D))
    pairs = [
        [packed(kind, noise(*shape, seed=10 * e + i) * shape[1] ** -0.5) for i, shape in enumerate(shapes)]
        for e in range(COUNT)
    ]
    values = [tuple(value for _, value in each) for each in pairs]
    return Experts.of([tuple(m for m, _ in each) for each in pairs], COUNT, LIMIT), values  # type: ignore[misc, return-value]


def by_hand(values: list[tuple[Tensor, Tensor, Tensor]], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros(len(x), D, dtype=torch.float64)
    for t in range(len(x)):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            if e < 0:
                continue
            w1, w2, w3 = (value.double() for value in values[e])
            gate, up = (w1 @ x[t].double()).clamp(max=LIMIT), (w3 @ x[t].double()).clamp(-LIMIT, LIMIT)
            y[t] += weight * (w2 @ (gate * torch.sigmoid(gate) * up))
    return y


def routed(tokens: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, ids (with repeats, one expert that nobody chooses, and choices that are not meant) and weights."""
    ids = torch.randint(-1, COUNT - 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    return noise(tokens, D, seed=seed), ids, noise(tokens, top_k, seed=seed + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_each_token_gets_the_weighted_sum_of_its_experts(kind: str, tokens: int) -> None:
    """Fails if an expert reads another's weights or scales, a pair is lost, or a clamp or weight is."""
    table, values = made(kind)
    x, ids, weights = routed(tokens, 3)
    expected = by_hand(values, x, ids, weights)
    found = experts(table, x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), exact=True)
    assert error(found, expected) <= 3e-6
    rounded = experts(table, x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE))
    assert error(rounded, expected) <= 1.5e-2


def test_more_tokens_of_one_expert_than_a_tile_holds() -> None:
    """Fails if tiles of the same expert overlap, or their rows are told apart wrongly."""
    table, values = made("fp4")
    x, _, weights = routed(40, 2, seed=5)
    ids = torch.tensor([[1, 3]] * 37 + [[0, 1]] * 3)
    found = experts(table, x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), exact=True)
    assert error(found, by_hand(values, x, ids, weights)) <= 3e-6


def test_the_same_token_gives_the_same_bits_in_any_company() -> None:
    """Fails if terms are added in the order in which programs end, or of the batch."""
    table, _ = made("fp4")
    x, ids, weights = (tensor.to(DEVICE) for tensor in routed(9, 3, seed=8))
    together = experts(table, x, ids, weights)
    for t in range(9):
        alone = experts(table, x[t : t + 1], ids[t : t + 1], weights[t : t + 1])
        assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize("matrix", [0, 2])
def test_nan_outlives_the_clamps(matrix: int) -> None:
    """A NaN in one row of an expert's gate or up. Fails if it comes out as the limit, or for another expert's."""
    weights = [[0.1 * noise(*shape, seed=i) for i, shape in enumerate(((F, D), (D, F), (F, D)))] for _ in range(2)]
    weights[1][matrix][5, 3] = float("nan")
    made_of = [tuple(Matrix.of("plain", (w.shape[0], w.shape[1]), w.to(DEVICE)) for w in each) for each in weights]
    table = Experts.of(made_of, 2, LIMIT)  # type: ignore[arg-type]
    x, ids = noise(3, D, seed=9), torch.tensor([[0], [1], [0]])
    for exact in (True, False):
        found = experts(table, x.to(DEVICE), ids.to(DEVICE), torch.ones(3, 1, device=DEVICE), exact=exact)
        assert found.isnan().all(1).tolist() == [False, True, False]
        assert found.isfinite().all(1).tolist() == [True, False, True]


def test_tokens_without_experts_are_zero() -> None:
    table, _ = made("fp4")
    x, ids, weights = (tensor.to(DEVICE) for tensor in routed(3, 2))
    assert not experts(table, x, torch.full_like(ids, -1), weights).any()
    assert experts(table, x[:0], ids[:0], weights[:0]).shape == (0, D)


@pytest.mark.parametrize("none", [-1, COUNT, COUNT + 1])
def test_ids_of_no_expert_add_nothing(none: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written holds NaN here. Fails if it is added, or an id past the last reads another table."""
    table, values = made("fp4")
    x, ids, weights = routed(7, 3, seed=2)
    expected = by_hand(values, x, ids, weights)
    empty = Tensor.new_empty

    def unwritten(self: Tensor, *size: int, **how: Any) -> Tensor:
        found = empty(self, *size, **how)
        return found.fill_(math.nan) if found.is_floating_point() else found

    monkeypatch.setattr(Tensor, "new_empty", unwritten)
    ids = torch.where(ids < 0, none, ids)
    assert (ids == none).any()
    found = experts(table, x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), exact=True)
    assert error(found, expected) <= 3e-6


@pytest.mark.parametrize("block", [1, 2, 16])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 6), (13, 3), (85, 3)])
def test_groups_in_one_launch_are_those_of_many(tokens: int, top_k: int, block: int) -> None:
    """Ids that are no expert's too. Fails if pairs of an expert change their order, or a tile is lost."""
    ids = torch.randint(-1, COUNT + 2, (tokens, top_k), generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    weights = noise(tokens, top_k, seed=1).to(DEVICE)
    few, many = (how(ids, weights, COUNT, block) for how in (group_few, group_many))
    assert torch.equal(few.token, many.token) and torch.equal(few.weight, many.weight)
    assert torch.equal(few.place, many.place)

    def tiles(groups: Groups) -> list[list[int]]:
        return [tile for tile in groups.tiles.tolist() if tile[0] >= 0]

    assert tiles(few) == tiles(many)
    assert len(group(ids, weights, COUNT, block).tiles) == ids.numel() <= FEW_PAIRS


@pytest.mark.parametrize("group", [group_few, group_many])
@pytest.mark.parametrize("block", [1, 2, 16])
@pytest.mark.parametrize("seed", range(4))
def test_tiles_cover_every_pair_once(seed: int, block: int, group: Callable[..., Groups]) -> None:
    """Fails if a tile mixes experts, is longer than a block, or a pair has no tile or two."""
    _, ids, weights = routed(13, 3, seed)
    found = group(ids.to(DEVICE), weights.to(DEVICE), COUNT, block)
    covered: dict[int, int] = {}
    for expert, first, last in found.tiles.tolist():
        if expert >= 0:
            assert 0 < last - first <= block
            covered |= {pair: expert for pair in range(first, last)}
    places = found.place.cpu()
    for t in range(13):
        for k in range(3):
            pair = int(places[t, k])
            assert covered.get(pair, -1) == int(ids[t, k])
            assert int(found.token[pair]) == t
            assert float(found.weight[pair]) == float(weights[t, k])
