"""Sizes from config.json: the published totals to the byte, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from localmoe.bench.shapes import CONFIGS
from localmoe.config import load_config
from localmoe.errors import ConfigError
from localmoe.models.sizes import sizes_of, stored_bytes
from tests.conftest import shared_data
from tests.tiny_engine import run, tiny_engine, token_ids
from tests.tiny_v4 import PUBLISHED_DIMS, published_tensors, random_state, tiny_config


@pytest.mark.parametrize(
    ("name", "expert", "routed", "dense"),
    [
        # 43 layers of 3 422 552 064 bytes; 159 609 485 896 less the MTP stage and the experts.
        ("v4-flash", 13_369_344, 43 * 3_422_552_064, 8_845_959_388),
        ("v4-pro", 35_094_528, 61 * 384 * 35_094_528, 28_693_981_132),
    ],
)
def test_v4_weighs_what_is_published(name: str, expert: int, routed: int, dense: int) -> None:
    """Fails if a tensor would be forgotten or counted in the wrong format."""
    s = sizes_of(CONFIGS[name], name)
    assert (s.expert_bytes, s.experts_bytes, s.dense_bytes) == (expert, routed, dense)
    assert s.total_bytes == routed + dense


def test_v3_weighs_what_is_published() -> None:
    """Fails if a scale of V3 would count as one byte, or the partial block of kv_a_proj be lost."""
    s = sizes_of(CONFIGS["v3"], "v3")
    assert s.expert_bytes == 3 * (2048 * 7168 + 4 * 16 * 56) == 44_050_944
    assert round(s.total_bytes / 1e9, 2) == 673.15
    assert (s.moe_layers, s.experts) == (58, 58 * 256)


@pytest.mark.parametrize(("folder", "name"), [("flash", "v4-flash"), ("pro", "v4-pro")])
def test_the_published_config_gives_the_same(folder: str, name: str) -> None:
    """Fails if the MTP stage would be counted, or the built-in numbers differ from DeepSeek's."""
    assert sizes_of(load_config(shared_data(f"dsv4_official/{folder}")), name) == sizes_of(CONFIGS[name], name)


@pytest.mark.parametrize(("name", "billions"), [("v4-flash", 13.27), ("v4-pro", 48.85)])
def test_a_token_is_multiplied_with_the_active_weights(name: str, billions: float) -> None:
    """Fails if experts that a token does not use, or the embedding, would count as work."""
    assert sizes_of(CONFIGS[name]).flops_per_token / 2e9 == pytest.approx(billions, abs=0.01)


def test_a_step_reads_no_tables() -> None:
    """Fails if the embedding or the hash tables would be charged to every token."""
    s = sizes_of(CONFIGS["v4-flash"])
    assert s.dense_bytes - s.dense_bytes_per_token == 129280 * 4096 * 2 + 3 * 129280 * 6 * 8


def test_the_cache_of_v4_counts_entries_not_tokens() -> None:
    """21 CSA layers keep (512 + 128) / 4 numbers for a token, 20 HCA layers 512 / 128; the window is fixed."""
    s = sizes_of(CONFIGS["v4-flash"])
    assert s.kv_bytes_per_token == 4 * (21 * 160 + 20 * 4)
    assert s.kv_read_per_token == 4 * (21 * 32 + 20 * 4)
    assert sizes_of(CONFIGS["v4-flash"], entry_bytes=2).kv_bytes_per_token == s.kv_bytes_per_token / 2


def test_the_cache_of_v3_is_that_of_the_spec() -> None:
    assert sizes_of(CONFIGS["v3"], entry_bytes=2).kv_bytes_per_token == 70_272
    assert sizes_of(CONFIGS["v3"]).kv_fixed_bytes == 0


def test_a_checkpoint_in_the_published_layout_weighs_the_same() -> None:
    """Fails if a scale would be counted by another rule than the one it is written by."""
    config = tiny_config(**PUBLISHED_DIMS)
    tensors = published_tensors(config, random_state(config))
    assert sizes_of(config).total_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_sequence_holds_what_the_cache_allocates() -> None:
    """Fails if a window, an entry or an open row would be forgotten."""
    config = tiny_config()
    engine, tokens = tiny_engine(), 64
    session = engine.new_session()
    run(engine, token_ids(tokens), session=session)
    layers, s = session.state.layers, sizes_of(config)
    assert sum(t.nbytes for layer in layers for t in layer.fixed_tensors()) == s.kv_fixed_bytes
    pools = [pool for layer in layers for pool, _ in layer.pools()]
    assert sum(pool.buffer[: pool.count].nbytes for pool in pools) == tokens * s.kv_bytes_per_token


def test_every_started_block_has_a_scale() -> None:
    assert stored_bytes((130, 384), "fp8_block") == 130 * 384 + 2 * 3
    assert stored_bytes((130, 384), "fp8_f32") == 130 * 384 + 4 * 2 * 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "deepseek_v1"}, "model_type is deepseek_v1, localmoe implements only deepseek_v4 or"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": 0}, "hidden_size is 0, expected 1 to"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129, expected 1 to 128"),
        ({"first_k_dense_replace": 61}, "first_k_dense_replace is 61, expected 0 to 60"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is awq"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], problem: str) -> None:
    """Fails if a wrong number would be given instead of an error."""
    with pytest.raises(ConfigError, match=problem):
        sizes_of(CONFIGS["v3"] | change, "x")
