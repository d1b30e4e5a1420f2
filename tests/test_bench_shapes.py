"""Shapes to measure: the numbers of the published models."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from localmoe.bench import shapes
from localmoe.bench.bank import expert_bytes
from localmoe.errors import UsageError
from localmoe.models.family import tensor_inventory


@pytest.mark.parametrize(
    ("name", "nbytes"), [("v4-flash", 13_369_344), ("v4-pro", 35_094_528), ("v3", 23_396_352), ("v2-lite", 4_595_712)]
)
def test_an_fp4_expert_has_the_published_size(name: str, nbytes: int) -> None:
    """Fails for a width of another model, or scales left out."""
    assert expert_bytes(shapes.EXPERT_SHAPES[name], "fp4") == nbytes


def test_an_fp8_expert_of_v3_has_the_published_size() -> None:
    """Fails for scales that are not one float32 per 128 x 128 block."""
    assert expert_bytes(shapes.EXPERT_SHAPES["v3"], "fp8_block") == 44_050_944


@pytest.mark.parametrize(("name", "billions"), [("v4-flash", 284.33), ("v4-pro", 1573.00)])
def test_a_whole_model_has_the_published_number_of_parameters(name: str, billions: float) -> None:
    """Fails for any wrong size: every one of them is in this sum."""
    specs = tensor_inventory(shapes.published(name)).values()
    assert sum(math.prod(spec.shape) for spec in specs) / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_layers_are_of_the_published_kinds() -> None:
    """Fails if the pattern of compress_ratios is shifted, which the number of parameters would hardly show."""
    flash, pro = shapes.published("v4-flash"), shapes.published("v4-pro")
    assert Counter(map(flash.layer_kind, range(43))) == {"sliding": 2, "csa": 21, "hca": 20}
    assert Counter(map(pro.layer_kind, range(61))) == {"csa": 30, "hca": 31}
    assert [flash.layer_kind(i) for i in (1, 2, 3, 42)] == ["sliding", "csa", "hca", "csa"]
    assert [pro.layer_kind(i) for i in (1, 2, 3, 60)] == ["hca", "csa", "hca", "csa"]


def test_the_experts_to_time_are_those_of_the_models() -> None:
    for name in shapes.CONFIGS:
        config, shape = shapes.published(name), shapes.EXPERT_SHAPES[name]
        found = (config.hidden_size, config.moe_intermediate_size, config.experts_per_token, config.num_experts)
        assert found == (shape.hidden_size, shape.width, shape.top_k, shape.num_experts)


def test_a_cut_model_differs_in_layers_and_experts_only() -> None:
    """Fails if a smaller model would be measured with easier layers."""
    whole, small = shapes.published("v4-flash"), shapes.cut("v4-flash", 2, 8)
    assert (small.num_layers, small.num_experts, small.num_hash_layers) == (2, 8, 2)
    assert small.compress_ratios == whole.compress_ratios[:2]
    assert (small.hidden_size, small.num_heads, small.index_topk) == (4096, 64, 512)


@pytest.mark.parametrize(("layers", "experts"), [(0, 8), (44, 8), (2, 5), (2, 257)])
def test_sizes_a_model_does_not_have_are_refused(layers: int, experts: int) -> None:
    with pytest.raises(UsageError, match="expected"):
        shapes.cut("v4-flash", layers, experts)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="v4-flash, v4-pro"):
        shapes.published("v5")
