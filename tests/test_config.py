"""config.json: the official files, transformers' spelling of them, and everything that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localmoe.config import Reader, load_config
from localmoe.errors import ConfigError
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_plan import YarnConfig
from tests.conftest import shared_data
from tests.tiny_v4 import CSA, HCA, SLIDING, tiny_config


def official(name: str) -> dict[str, Any]:
    return load_config(shared_data(f"dsv4_official/{name}"))


def refusal(**overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        DeepseekV4Config.from_dict(tiny_config() | overrides, "dir/config.json")
    message = str(caught.value)
    assert message.startswith("dir/config.json: ")
    assert message.isprintable()
    return message


def test_v4_flash_reads_as_published() -> None:
    """Fails if the MTP entry of compress_ratios is taken for a layer, or YaRN or a theta is lost."""
    config = DeepseekV4Config.from_dict(official("flash"))
    assert (config.num_layers, config.num_experts, config.index_topk) == (43, 256, 512)
    kinds = [config.layer_kind(i) for i in range(43)]
    assert kinds == ["sliding"] * 2 + ["csa", "hca"] * 20 + ["csa"]
    assert [i for i in range(43) if config.is_hash(i)] == [0, 1, 2]
    assert (config.rope_theta, config.compress_rope_theta) == (10000.0, 160000.0)
    assert config.yarn == YarnConfig(16.0, 65536, 32.0, 1.0)
    assert (config.rope_head_dim, config.eos_token_ids, config.swiglu_limit) == (64, (1,), 10.0)


def test_v4_pro_reads_as_published() -> None:
    """Fails if anything of Flash is hard-coded."""
    config = DeepseekV4Config.from_dict(official("pro"))
    assert (config.num_layers, config.num_experts, config.index_topk, config.o_groups) == (61, 384, 1024, 16)
    assert [config.layer_kind(i) for i in (0, 1, 2, 3, 60)] == ["hca", "hca", "csa", "hca", "csa"]
    assert config.routed_scaling_factor == 2.5


def test_v4_flash_0731_with_three_stages_reads_like_flash() -> None:
    """Fails if 46 ratios, or num_nextn_predict_layers = 1 beside three DSpark stages, are refused."""
    flash = official("flash")
    dspark = {
        "dspark_block_size": 5,
        "dspark_markov_rank": 256,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [40, 41, 42],
        "expert_dtype": "fp4",
        "compress_ratios": [*flash["compress_ratios"], 0, 0],
    }
    assert DeepseekV4Config.from_dict(flash | dspark) == DeepseekV4Config.from_dict(flash)


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_config_transformers_saves_reads_the_same(name: str, tmp_path: Path) -> None:
    """Fails if layer_types, mlp_layer_types, partial_rotary_factor or nested rope_parameters are misread."""
    transformers = pytest.importorskip("transformers")
    raw = official(name)
    transformers.DeepseekV4Config(**raw).save_pretrained(tmp_path)
    saved = load_config(tmp_path)
    assert "compress_ratios" not in saved
    assert DeepseekV4Config.from_dict(saved) == DeepseekV4Config.from_dict(raw)


def test_a_tiny_config_reads_the_same_as_transformers_saves_it(tmp_path: Path) -> None:
    """Fails if a ratio other than 4 and 128 is lost."""
    transformers = pytest.importorskip("transformers")
    transformers.DeepseekV4Config(**tiny_config()).save_pretrained(tmp_path)
    config = DeepseekV4Config.from_dict(load_config(tmp_path))
    assert config == DeepseekV4Config.from_dict(tiny_config())
    assert config.compress_ratios == (0, 4, 16, 4, 16, 0)


@pytest.mark.parametrize("model_type", ["deepseek_v41", "deepseek_v3", "llama", None, 4, "x\x1b[2J"])
def test_an_unknown_model_type_is_refused(model_type: Any) -> None:
    """Fails if V4.1 tensors run through V4 rules: plausible garbage."""
    assert "model_type" in refusal(model_type=model_type)
    assert "deepseek_v4" in refusal(model_type=model_type)


@pytest.mark.parametrize("field", sorted(set(tiny_config()) - {"architectures"}))
def test_a_field_of_another_kind_is_refused(field: str) -> None:
    """Fails if any field that is read is not checked for its type."""
    assert field in refusal(**{field: {"x": 1}})


OPTIONAL = {
    "architectures",
    "attention_bias",
    "compress_rates",
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "tie_word_embeddings",
    "topk_method",
}


@pytest.mark.parametrize("field", sorted(set(tiny_config()) - OPTIONAL))
def test_a_missing_field_is_named(field: str) -> None:
    """Fails if a default is guessed for a field that decides what is computed."""
    raw = tiny_config()
    del raw[field]
    with pytest.raises(ConfigError, match="is missing"):
        DeepseekV4Config.from_dict(raw)


UNIMPLEMENTED = {
    "scoring_func": "sigmoid",
    "num_key_value_heads": 8,
    "n_shared_experts": 2,
    "topk_method": "greedy",
    "hidden_act": "gelu",
    "n_group": 8,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "quantization_config": {"quant_method": "gptq"},
}


@pytest.mark.parametrize("field", list(UNIMPLEMENTED))
def test_what_is_not_implemented_is_refused(field: str) -> None:
    """Fails if a model would run with one of its settings ignored."""
    assert "localmoe implements only" in refusal(**{field: UNIMPLEMENTED[field]})


WRONG = {
    "vocab_size": 0,
    "hidden_size": -4,
    "head_dim": True,
    "q_lora_rank": 1.5,
    "hc_eps": float("inf"),
    "rms_norm_eps": 10**400,
    "bos_token_id": 160,
    "eos_token_id": [1, 160],
    "num_hidden_layers": 10**9,
    "n_routed_experts": 10**9,
    "num_experts_per_tok": 9,
    "o_groups": 3,
    "qk_rope_head_dim": 15,
    "index_head_dim": 8,
    "swiglu_limit": 0,
    "sliding_window": 10**6,
    "num_hash_layers": 7,
}


@pytest.mark.parametrize("field", list(WRONG))
def test_a_value_out_of_range_is_refused(field: str) -> None:
    """Fails if a nonsense size gets as far as an allocation."""
    assert "expected" in refusal(**{field: WRONG[field]})


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "ratios and types": {"compress_ratios": [0, 4, 16, 16, 4, 0]},
    "ratios and rates": {"compress_ratios": [0, 4, 128, 4, 128, 0]},
    "ratios too many": {"compress_ratios": [0, 4, 16, 4, 16, 0, 0]},
    "ratios too few": {"compress_ratios": [0, 4, 16, 4, 16]},
    "MTP slot not sliding": {"compress_ratios": [0, 4, 16, 4, 16, 0, 4], "num_nextn_predict_layers": 1},
    "types too few": {"layer_types": [SLIDING, CSA]},
    "types unknown": {"layer_types": ["full_attention"] * 6},
    "rates equal": {"compress_rates": {CSA: 4, HCA: 4}},
    "rate missing": {"compress_rates": {CSA: 4}},
    "hash layers": {"mlp_layer_types": ["hash_moe"] + ["moe"] * 5},
    "hash layers later": {"mlp_layer_types": ["moe"] * 5 + ["hash_moe"]},
    "rotary dimensions": {"partial_rotary_factor": 0.25},
    "two scalings": {"rope_parameters": None},
    "theta": {
        "rope_scaling": None,
        "rope_parameters": {"main": {"rope_type": "default", "rope_theta": 1}, "compress": {}},
    },
}


@pytest.mark.parametrize("name", list(CONTRADICTIONS))
def test_a_contradiction_is_refused(name: str) -> None:
    """Fails if one of two fields silently wins."""
    assert "expected" in refusal(**CONTRADICTIONS[name]) or "implements" in refusal(**CONTRADICTIONS[name])


@pytest.mark.parametrize(
    ("field", "value"),
    [("type", "linear"), ("mscale", 1.0), ("attention_factor", 1.277), ("truncate", False), ("factor", 0.5)],
)
def test_a_scaling_v4_does_not_have_is_refused(field: str, value: Any) -> None:
    """Fails if cos and sin would be scaled, or another scaling than YaRN ignored."""
    assert field in refusal(rope_scaling=tiny_config()["rope_scaling"] | {field: value})


def test_several_end_tokens_are_read() -> None:
    """Fails if only a single id is understood; transformers writes lists too."""
    assert DeepseekV4Config.from_dict(tiny_config(eos_token_id=[1, 7])).eos_token_ids == (1, 7)


def test_load_config_names_the_directory_or_file(tmp_path: Path) -> None:
    """Fails if a wrong --model gives a traceback."""
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(ConfigError, match=r"config\.json: is not valid JSON"):
        load_config(tmp_path)


def test_a_field_name_from_a_file_is_escaped() -> None:
    """Fails if a key of config.json can write to the terminal."""
    with pytest.raises(ConfigError) as caught:
        Reader({}, "config.json", "a\x1b[2J.").required("b", int)
    assert str(caught.value).startswith(r"config.json: a\x1b[2J.b is missing")
