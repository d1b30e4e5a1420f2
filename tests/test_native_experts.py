"""A compiled MoE layer against the sum worked out in float64 on dequantized experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe.experts.resident import Expert, resident
from localmoe.formats import QuantizedTensor
from localmoe.kernels import native
from localmoe.kernels.native import Mode
from localmoe.weights import bind_native
from tests.loops import noise
from tests.native_kernels import (
    ISAS,
    bound,
    library,
    needs_native,
    packed,
    rounds_to_bf16,
    rounds_to_int8,
    using,
    values,
)

pytestmark = needs_native

LIMIT, COUNT, D, F = 0.8, 6, 288, 160
KINDS = ["fp4", "fp8_block", "int8_g32", "int4_g32", "int4_g32 asymmetric", "bf16", "f32"]
Matrices = tuple[Tensor | QuantizedTensor, ...]


def experts_of(kind: str) -> list[Matrices]:
    return [
        (
            packed(kind, noise(F, D, seed=e) * D**-0.5),
            packed(kind, noise(D, F, seed=e + 50) * F**-0.5),
            packed(kind, noise(F, D, seed=e + 90) * D**-0.5),
        )
        for e in range(COUNT)
    ]


def table_of(experts: list[Matrices]) -> native.Experts:
    return native.Experts([(bound(w1), bound(w2), bound(w3)) for w1, w2, w3 in experts], LIMIT)


def by_hand(experts: list[Matrices], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros(len(x), D, dtype=torch.float64)
    for t in range(len(x)):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            w1, w2, w3 = (values(w) for w in experts[e])
            gate, up = (w1 @ x[t].double()).clamp(max=LIMIT), (w3 @ x[t].double()).clamp(-LIMIT, LIMIT)
            y[t] += weight * (w2 @ (gate * torch.sigmoid(gate) * up))
    return y


def routed(tokens: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, ids (with repeats, and one expert that nobody chooses) and weights."""
    ids = torch.randint(COUNT - 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    return noise(tokens, D, seed=seed), ids, noise(tokens, top_k, seed=seed + 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["strict", "fast"])
def test_each_token_gets_the_weighted_sum_of_its_experts(isa: str, kind: str, mode: Mode) -> None:
    """Fails if tokens, weights or matrices are exchanged, or the clamp is forgotten."""
    experts = experts_of(kind)
    rounded = rounds_to_bf16(kind, isa, mode) or rounds_to_int8(kind, isa, mode)
    tolerance = 1.5e-2 if rounded else 1e-5
    for tokens, top_k in ((1, 1), (1, 3), (4, 2), (33, 3)):
        x, ids, weights = routed(tokens, top_k)
        expected = by_hand(experts, x, ids, weights)
        with using(isa) as lib:
            found = lib.experts(table_of(experts), x, ids, weights, mode=mode)
        assert (found - expected).norm() <= tolerance * expected.norm(), (tokens, top_k)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 30),
    top_k=st.integers(1, 4),
    threads=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    isa=st.sampled_from(ISAS or ["none"]),
    seed=st.integers(0, 99),
)
def test_strict_sums_do_not_depend_on_batch_mates_or_threads(
    tokens: int, top_k: int, threads: int, kind: str, isa: str, seed: int
) -> None:
    """Fails if an expert's other tokens, or who computes which rows, change a bit."""
    table = table_of(experts_of(kind))
    x, ids, weights = routed(tokens, top_k, seed)
    with using(isa, threads) as lib:
        together = lib.experts(table, x, ids, weights, mode="strict")
    t = slice(seed % tokens, seed % tokens + 1)
    with using(isa, 1) as lib:
        assert torch.equal(together[t], lib.experts(table, x[t], ids[t], weights[t], mode="strict"))


@pytest.mark.parametrize("mode", ["strict", "fast"])
def test_the_order_of_a_tokens_experts_does_not_matter(mode: Mode) -> None:
    """Fails if terms are added in the order of the routing: equal scores would then change the sum."""
    table = table_of(experts_of("fp4"))
    x, weights = noise(1, D), torch.tensor([[0.3, 0.2, 0.5]])
    one = library().experts(table, x, torch.tensor([[3, 0, 1]]), weights, mode=mode)
    assert torch.equal(one, library().experts(table, x, torch.tensor([[1, 0, 3]]), weights.flip(1), mode=mode))


def test_a_token_that_is_not_a_number_harms_only_itself() -> None:
    """Fails if the clamp turns NaN into a number, or tokens of one expert share anything."""
    x, ids, weights = routed(9, 2)
    sound = library().experts(table_of(experts_of("fp4")), x, ids, weights, mode="strict")
    x[4, 7] = float("nan")
    found = library().experts(table_of(experts_of("fp4")), x, ids, weights, mode="strict")
    assert found[4].isnan().all()
    others = [t for t in range(9) if t != 4]
    assert torch.equal(found[others], sound[others])


@pytest.mark.parametrize("bad", [-2, COUNT, 1 << 40])
def test_an_id_outside_the_table_is_refused(bad: int) -> None:
    """Fails if memory beyond the table is read as an expert."""
    x, ids, weights = routed(2, 2)
    ids[1, 0] = bad
    with pytest.raises(ValueError, match="expert ids"):
        library().experts(table_of(experts_of("fp4")), x, ids, weights)


def test_experts_of_different_shapes_are_refused() -> None:
    """Fails if a matrix is read with another's shape."""
    experts = experts_of("f32")
    experts[1] = (noise(F + 32, D), noise(D, F + 32), noise(F + 32, D))
    x, ids, weights = routed(8, 3)
    with pytest.raises(ValueError, match="fit together"):
        library().experts(table_of(experts), x, ids, weights)


@pytest.mark.parametrize("mode", ["strict", "fast"])
@pytest.mark.parametrize("tokens", [1, 7, 15, 17, 40])
def test_ascending_parts_of_a_layer_add_up_to_the_same_bits(tokens: int, mode: Mode) -> None:
    """Fails if the sum begins anew in every call, or an expert computed apart is rounded otherwise."""
    table = table_of(experts_of("fp4"))
    x, ids, weights = routed(tokens, 3)
    parts = torch.zeros(tokens, D)
    for low, high in ((0, 0), (1, 3), (4, COUNT)):
        some = ids.where((ids >= low) & (ids <= high), -1)
        library().experts(table, x, some, weights, mode=mode, out=parts)
    assert torch.equal(parts, library().experts(table, x, ids, weights, mode=mode))


def test_no_tokens_give_no_rows() -> None:
    x, ids, weights = routed(0, 2)
    assert library().experts(table_of(experts_of("fp4")), x, ids, weights).shape == (0, D)


def test_a_gate_far_below_zero_is_silent() -> None:
    """Fails if exp overflows into NaN: silu(-1e4) is 0."""
    experts = experts_of("f32")
    x, ids, weights = noise(1, D), torch.tensor([[0]]), torch.ones(1, 1)
    found = library().experts(table_of(experts), 1e6 * x, ids, weights, mode="strict")
    expected = by_hand(experts, 1e6 * x, ids, weights)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_experts_of_another_width_than_the_inputs_are_refused() -> None:
    """Fails if x and y are taken to be as wide as the chosen expert, beyond their end."""
    narrow = (noise(32, 32), noise(32, 32), noise(32, 32))
    wide = (noise(32, 4096), noise(4096, 32), noise(32, 4096))
    x, ids = noise(1, 32), torch.tensor([[1]])
    with pytest.raises(ValueError, match="fit together"):
        library().experts(table_of([narrow, wide]), x, ids, torch.ones(1, 1))


def test_a_layer_of_mixed_formats_is_computed_one_by_one() -> None:
    """Fails if it breaks off at the first token that chooses experts of two formats."""
    experts = [experts_of("fp4")[0], experts_of("bf16")[1]]
    x, ids, weights = noise(3, D), torch.tensor([[0, 1]] * 3), noise(3, 2, seed=1)
    bound_ones = [Expert(*(bind_native(w, library(), "strict") for w in e), limit=LIMIT) for e in experts]
    found = resident([bound_ones]).apply(0, x, ids, weights)
    expected = by_hand(experts, x, ids, weights)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_one_strict_matrix_makes_a_layer_strict() -> None:
    """Fails if a float32 down projection is rounded because gate and up are bf16."""
    w1, w2, w3 = experts_of("bf16")[0][0], experts_of("f32")[0][1], experts_of("bf16")[0][2]
    bound_one = Expert(*(bind_native(w, library(), "fast") for w in (w1, w2, w3)), limit=LIMIT)
    x, ids, weights = noise(1, D), torch.tensor([[0]]), torch.ones(1, 1)
    expected = by_hand([(w1, w2, w3)], x, ids, weights)
    found = resident([[bound_one]]).apply(0, x, ids, weights)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
