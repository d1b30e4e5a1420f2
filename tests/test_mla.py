"""Multi-head latent attention: against transformers, and against itself in every order of work."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe import ops
from localmoe.engine import Engine
from localmoe.errors import CheckpointError, ConfigError, UsageError
from localmoe.formats import FORMATS
from localmoe.kernels import reference
from localmoe.loader import load_model
from localmoe.models import mla
from localmoe.models.family import (
    build,
    check_kv_format,
    config_of,
    expert_names,
    is_ignored,
    part_of,
    tensor_inventory,
)
from localmoe.models.mla_config import MlaConfig
from localmoe.models.sizes import sizes_of
from tests.tiny_engine import difference, run, token_ids
from tests.tiny_mla import CONFIGS, build_transformers, random_state, tiny_config
from tests.tiny_v4 import write_model

# Logits have a spread of about 1. An oracle adds up in another order; two runs of ours only in other chunks.
ORACLE, CHUNKING = 5e-5, 2e-5
# Beyond the original length of YaRN, 64, and beyond the 16 tokens that the index of V3.2 picks.
IDS = token_ids(310)


@functools.cache
def engine_of(name: str) -> Engine:
    config = tiny_config(name)
    return Engine(build(config_of(config), random_state(config).__getitem__))


@functools.cache
def at_once(name: str) -> Tensor:
    return run(engine_of(name), IDS)


@functools.cache
def by_transformers(name: str) -> Tensor:
    config = tiny_config(name)
    with torch.inference_mode():
        logits: Tensor = build_transformers(config, random_state(config))(torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str) -> None:
    """The oracle test: fails for any mistake in the forward that shows within 310 tokens."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install .[dev]")
    assert difference(at_once(name), by_transformers(name)) <= ORACLE


@pytest.mark.parametrize("chunk", [1, 7, 200])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_change_nothing(name: str, chunk: int) -> None:
    """Token by token is the absorbed form, 200 at once the expanded one; fails if they or their masks differ."""
    assert difference(run(engine_of(name), IDS, chunk), at_once(name)) <= CHUNKING


@pytest.mark.parametrize("name", ["v2-lite", "v3.2"])
def test_sequences_in_one_step_do_not_see_each_other(name: str) -> None:
    engine, other = engine_of(name), token_ids(90, seed=1)
    one, two = engine.new_session(), engine.new_session()
    engine.advance([(one, IDS[:50])])
    logits = engine.advance([(one, IDS[50:60]), (two, other)], all_logits=True).logits
    assert difference(logits[:10], at_once(name)[50:60]) <= CHUNKING
    assert difference(logits[10:], run(engine, other)) <= CHUNKING


def test_the_expanded_form_is_used_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one of the two forms were never reached, and so the tests above compared one with itself."""
    seen: list[str] = []
    for form in ("expanded_attention", "latent_attention"):
        real = getattr(ops, form)
        wrapped = functools.partial(lambda form, real, *a, **k: (seen.append(form), real(*a, **k))[1], form, real)
        monkeypatch.setattr(f"localmoe.layers.latent.ops.{form}", wrapped)
    run(engine_of("v3"), IDS[:200], mla.EXPAND_FROM)
    assert set(seen[:3]) == {"expanded_attention"}
    assert set(seen[3:]) == {"latent_attention"}


@pytest.mark.parametrize(("n", "first", "block"), [(1, 0, 4), (5, 0, 2), (9, 30, 8), (33, 1, 64)])
def test_both_forms_of_attention_agree(n: int, first: int, block: int) -> None:
    """Fails for a key hidden or shown that should not be, at any edge of a block."""
    g = torch.Generator().manual_seed(n)
    heads, dn, dr, rank, dv = 3, 6, 4, 8, 5
    q = torch.randn(n, heads, dn + dr, generator=g)
    cache = torch.randn(first + n, rank + dr, generator=g)
    wk, wv = torch.randn(heads, rank, dn, generator=g), torch.randn(heads, rank, dv, generator=g)
    both = torch.cat((wk, wv), dim=-1)
    expanded = reference.expanded_attention(
        q, cache, lambda rows: torch.einsum("mr,hrd->mhd", rows, both), width=rank, first=first, scale=0.3, block=block
    )
    absorbed = torch.cat((torch.einsum("nhd,hrd->nhr", q[..., :dn], wk), q[..., dn:]), dim=-1)
    seen = torch.arange(first + n) <= torch.arange(first, first + n)[:, None]
    latent = reference.latent_attention(absorbed, cache, seen, width=rank, scale=0.3)
    torch.testing.assert_close(expanded, torch.einsum("nhr,hrd->nhd", latent, wv), atol=1e-5, rtol=1e-5)


def test_groups_are_chosen_by_their_best() -> None:
    """Of two groups the first has the best expert, the second the better pair. Fails if V2 and V3 were mixed up."""
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    hidden = -torch.inf
    assert reference.choose_groups(scores, 2, 1, 1).tolist() == [pytest.approx([0.9, 0.1, hidden, hidden])]
    assert reference.choose_groups(scores, 2, 1, 2).tolist() == [pytest.approx([hidden, hidden, 0.6, 0.5])]
    tied = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert reference.choose_groups(tied, 2, 1, 1).isfinite().tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("name", ["v2-lite", "v2", "v3", "v3.2"])
def test_a_sequence_holds_what_the_cache_allocates(name: str) -> None:
    """Fails if plan would promise another context than there is room for."""
    session = engine_of(name).new_session()
    engine_of(name).advance([(session, IDS[:100])])
    pools = [pool for layer in session.state.layers for pool, _ in layer.pools()]
    sizes = sizes_of(tiny_config(name))
    assert sum(pool.buffer[: pool.count].nbytes for pool in pools) == 100 * sizes.kv_bytes_per_token
    assert sizes.kv_fixed_bytes == sum(t.nbytes for layer in session.state.layers for t in layer.fixed_tensors()) == 0


def published(name: str, **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A config with FP8 matrices, the tensors of its checkpoint, and the float32 values that these stand for.

    kv_a_proj has 136 + 16 rows: one block and a part of one. The last layer is an MTP layer, which is not used."""
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = tiny_config(
        name, hidden_size=136, kv_lora_rank=136, num_hidden_layers=2, first_k_dense_replace=1,
        quantization_config=quantization, **overrides,
    )  # fmt: skip
    values, stored = random_state(config), {}
    for tensor, spec in tensor_inventory(config_of(config)).items():
        if spec.published == "fp8_f32":
            packed = FORMATS["fp8_block"].quantize(values[tensor])
            scale = packed.scale * (1 + torch.rand(packed.scale.shape) / 8)
            stored[tensor], stored[f"{tensor}_scale_inv"] = packed.data, scale
            values[tensor] = FORMATS["fp8_block"].bind(packed.data, scale, tuple(spec.shape)).dequantize()
        else:
            stored[tensor] = values[tensor].bfloat16() if spec.published == "bf16" else values[tensor]
            values[tensor] = stored[tensor].float()
    stored["model.layers.2.eh_proj.weight"] = torch.zeros(4, 8)
    return config, stored, values


@pytest.mark.parametrize("name", ["v3", "v3.2"])
def test_a_published_checkpoint_loads_exactly(name: str, tmp_path: Path) -> None:
    """Fails if a scale would be divided by, read as E8M0, or be lost for a part of a block."""
    config, stored, values = published(name)
    loaded = load_model(write_model(tmp_path / "m", config, stored), torch.float32)
    engine = Engine(build(loaded.config, loaded.weights.get))
    twin = Engine(build(config_of(config), values.__getitem__))
    assert torch.equal(run(engine, IDS[:60]), run(twin, IDS[:60]))


@pytest.mark.parametrize("kernels", ["native", "strict"])
def test_the_compiled_kernels_compute_the_same(kernels: Any, tmp_path: Path) -> None:
    from localmoe.backend import choose

    if choose("auto", None) is None:
        pytest.skip("the compiled kernels were not built")
    backend = choose(kernels, None)
    config, stored, values = published("v3")
    loaded = load_model(write_model(tmp_path / "m", config, stored), torch.float32, compact=True)
    engine = Engine(build(loaded.config, loaded.weights.get, dtype=torch.float32, backend=backend))
    twin = Engine(build(config_of(config), values.__getitem__))
    expected = run(twin, IDS[:200])
    for chunk in (1, 60, 200):
        each = (run(engine, IDS[:200], chunk) - expected).abs().amax(1)
        # Activations in 8 bits may choose another expert for a token or two.
        assert each.max() <= CHUNKING if kernels == "strict" else each.quantile(0.9) <= 0.1


def test_experts_stay_on_disk_with_the_same_result(tmp_path: Path) -> None:
    """Fails if layers of experts were counted with the dense ones, or names of another family asked for."""
    from localmoe.experts.paging import Paging
    from localmoe.pager import open_model

    config, stored, _values = published("v3", n_routed_experts=16)
    path = write_model(tmp_path / "m", config, stored)
    whole = open_model(path, "tiny", Paging(), dtype=torch.float32)
    paged = open_model(path, "tiny", Paging(slots=9), dtype=torch.float32)
    assert torch.equal(run(Engine(paged), IDS[:40], 1), run(Engine(whole), IDS[:40], 1))
    paged.experts.close()  # type: ignore[attr-defined]


def test_names() -> None:
    config = config_of(tiny_config("v3"))
    assert expert_names(config, 0, 5)[1] == "model.layers.2.mlp.experts.5.down_proj.weight"
    assert is_ignored(config, "model.layers.3.eh_proj.weight")
    assert not is_ignored(config, "model.layers.4.eh_proj.weight")
    parts = {part_of(config, name) for name in tensor_inventory(config)}
    assert parts == {"routed experts", "shared experts", "attention", "routers", "dense layers",
                     "embedding and head", "norms and streams"}  # fmt: skip


def test_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    config, stored, _values = published("v3")
    stored["model.layers.4.input_layernorm.weight"] = torch.zeros(4)
    with pytest.raises(CheckpointError, match="is not a tensor of this model"):
        load_model(write_model(tmp_path / "m", config, stored), torch.float32)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("v3", {"scoring_func": "softmax"}, "scoring_func is softmax"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob is true"),
        ("v2", {"topk_method": "noaux_tc"}, "topk_method is noaux_tc"),
        ("v3", {"n_group": 3}, "n_group is 3, expected a divisor of n_routed_experts = 8"),
        ("v3", {"n_group": 8}, "groups of two experts or more"),
        ("v3", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, expected 1 to 4"),
        ("v3", {"topk_group": 5}, "topk_group is 5"),
        ("v3", {"qk_rope_head_dim": 15}, "expected an even number"),
        ("v3", {"rope_interleave": False}, "rope_interleave is false"),
        ("v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ("v3", {"rope_scaling": {"type": "linear", "factor": 2}}, "type is linear"),
        ("v3", {"rope_scaling": {"type": "yarn", "factor": 2, "magic": 1}}, "magic is not a field"),
        ("v3.2", {"q_lora_rank": None}, "q_lora_rank is missing"),
        ("v3.2", {"index_head_dim": 8}, "index_head_dim is 8, expected at least qk_rope_head_dim = 16"),
        ("v3", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3, expected 0 to 2"),
        ("glm-4.7-flash", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
        ("v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ],
)
def test_what_is_not_implemented_is_refused(name: str, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        MlaConfig.from_dict(tiny_config(name, **change))


def test_a_rounded_cache_is_refused() -> None:
    """Fails if kv_format would be taken and have no effect."""
    check_kv_format(config_of(tiny_config("v3")), "full")
    with pytest.raises(UsageError, match="deepseek_v3 keeps its cache in full"):
        check_kv_format(config_of(tiny_config("v3")), "fp8")


def test_a_lost_rotation_is_refused() -> None:
    """A converter that drops it gives fluent text that decays with length."""
    config = tiny_config("v3")
    del config["rope_scaling"]
    with pytest.raises(ConfigError, match="rope_scaling is missing"):
        MlaConfig.from_dict(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_that_transformers_writes_is_the_same(name: str) -> None:
    """Its rope_parameters hold the base and the scaling in one. Fails if one spelling would be read otherwise."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install .[dev]")
    config = tiny_config(name)
    if config["model_type"] == "kimi_k2":
        pytest.skip("transformers has no config class for Kimi-K2, it reads it as V3")
    model = build_transformers(config, random_state(config))
    written = json.loads(model.config.to_json_string(use_diff=False))
    written |= {"num_nextn_predict_layers": config.get("num_nextn_predict_layers", 0)}
    assert config_of(written) == config_of(config)
