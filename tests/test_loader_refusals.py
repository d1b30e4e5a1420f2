"""Loader refusals: tensors that do not fit config.json, before anything is allocated; broken scales and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.errors import CheckpointError
from localmoe.loader import load_weights
from tests.tiny_v4 import (
    CSA,
    HCA,
    PUBLISHED_DIMS,
    SLIDING,
    published_tensors,
    random_state,
    tiny_config,
    to_transformers_state,
    write_model,
)

CONFIG = tiny_config(**PUBLISHED_DIMS | {"layer_types": [SLIDING, CSA, HCA], "num_hash_layers": 1})
STATE = random_state(CONFIG)
WQ_A, W1 = "layers.0.attn.wq_a", "layers.2.ffn.experts.1.w1"
ONES_E8M0 = torch.full((128, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
# The tensor that is changed, what it becomes (None: it goes), and what the message must say.
MISFITS: dict[str, tuple[str, Tensor | None, str]] = {
    "missing": ("layers.1.attn.attn_sink", None, "layers.1.attn.attn_sink is missing, expected [4]"),
    "wrong shape": ("norm.weight", torch.ones(7), "norm.weight is [7] F32 in model.safetensors, expected [128]"),
    "wrong rank": ("embed.weight", torch.ones(160 * 128), "embed.weight is [20480] F32"),
    "wrong dtype": (
        "norm.weight",
        torch.ones(128).long(),
        "norm.weight is [128] I64 in model.safetensors, expected",
    ),
    "float hash table": (
        "layers.0.ffn.gate.tid2eid",
        torch.ones(160, 2),
        "[160, 2] F32 in model.safetensors, expected",
    ),
    "extra": (
        "layers.3.attn_norm.weight",
        torch.ones(1),
        "layers.3.attn_norm.weight is not a tensor of this model",
    ),
    "extra in a hash layer": ("layers.0.ffn.gate.bias", torch.ones(4), "layers.0.ffn.gate.bias is not a tensor"),
    "extra with an escape": ("a\x1b]0;pwn", torch.ones(1), r"a\x1b]0;pwn is not a tensor of this model"),
    "too many experts": (
        "layers.0.ffn.experts.4.w1.weight",
        torch.ones(1),
        "layers.0.ffn.experts.4.w1.weight is not",
    ),
    "fp8 without scale": (f"{WQ_A}.scale", None, f"{WQ_A}.weight is F8_E4M3 with no scales, expected one of [1, 1]"),
    "fp4 without scale": (f"{W1}.scale", None, f"{W1}.weight is I8 with no scales, expected one of [128, 4]"),
    "fp4 with fp8's scale": (
        f"{W1}.scale",
        torch.ones(1, 1).to(torch.float8_e8m0fnu),
        f"{W1}.weight is [128, 64] I8; its scale is [1, 1] F8_E8M0 in model.safetensors, expected [128, 4] F8_E8M0",
    ),
    "fp4 with half the scales": (f"{W1}.scale", ONES_E8M0, "its scale is [128, 2] F8_E8M0"),
    "int8 that is not packed": (
        f"{W1}.weight",
        torch.ones(128, 128).char(),
        "[128, 128] I8 in model.safetensors, expected [128, 64]",
    ),
    "unknown packing": (f"{W1}.weight", torch.ones(128, 32).int(), f"{W1}.weight is I32, expected one of"),
    "scale of a plain weight": (f"{W1}.weight", torch.ones(128, 128), f"{W1}.scale is not a tensor of this model"),
    "two scales": (f"{WQ_A}.weight_scale_inv", torch.ones(1, 1), f"{WQ_A}.weight is F8_E4M3 with 2 scales"),
    "two names": ("lm_head.weight", torch.ones(160, 128), "head.weight is there twice, also as lm_head.weight"),
}


def refusal(model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a refusal that came before anything was read."""

    def read(*_: Any) -> Tensor:
        raise AssertionError("a tensor was read before all of them were checked")

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, torch.float32)
    message = str(caught.value)
    assert message.startswith(f"{model}: tensors do not fit config.json: ")
    assert message.isprintable()
    return message


@pytest.mark.parametrize("name", list(MISFITS))
def test_a_misfit_is_named_before_anything_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a wrong tensor is broadcast, guessed at or ignored. Both shapes are in the message."""
    changed, value, expected = MISFITS[name]
    tensors = published_tensors(CONFIG, STATE)
    tensors.pop(changed, None)
    if value is not None:
        tensors[changed] = value
    assert expected in refusal(write_model(tmp_path, CONFIG, tensors), monkeypatch)


def test_many_misfits_are_counted_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a wrong config floods the terminal. 384 experts on disk, 256 in config.json look like this."""
    tensors = published_tensors(CONFIG, STATE)
    model = write_model(tmp_path, CONFIG | {"vocab_size": 170, "n_routed_experts": 3}, tensors)
    message = refusal(model, monkeypatch)
    assert "embed.weight is [160, 128] BF16 in model.safetensors, expected [170, 128]" in message
    assert " more; get config.json" in message
    assert len(message) < 700


def test_a_stack_with_another_number_of_experts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a slice beyond the stack is read from whatever follows it."""
    tensors = to_transformers_state(CONFIG, STATE)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = tensors[name][:3].contiguous()
    message = refusal(write_model(tmp_path, CONFIG, tensors), monkeypatch)
    assert "is [3, 256, 128] F32 in model.safetensors, expected [4, 256, 128]" in message


@pytest.mark.parametrize(
    ("name", "bad", "expected"),
    [
        (f"{WQ_A}.scale", torch.full((1, 1), torch.nan), "NaN"),
        (f"{WQ_A}.scale", torch.zeros(1, 1), "all zero"),
        (f"{W1}.scale", torch.full((128, 4), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu), "NaN"),
        (f"{W1}.scale", torch.zeros(128, 4, dtype=torch.uint8).view(torch.float8_e8m0fnu), "all zero"),
    ],
)
def test_broken_scales_are_refused_on_loading(tmp_path: Path, name: str, bad: Tensor, expected: str) -> None:
    """Fails if NaN or the zeros of a file lost in a crash reach the model."""
    model = write_model(tmp_path, CONFIG, published_tensors(CONFIG, STATE) | {name: bad})
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_weights(model, torch.float32)
    assert name.removesuffix(".scale") in str(caught.value)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_hash_table_naming_an_absent_expert_is_refused(tmp_path: Path, bad: int) -> None:
    """Fails if an id indexes from the end, or past the experts while a token is produced."""
    table = STATE["layers.0.ffn.gate.tid2eid"].clone()
    table[7, 1] = bad
    model = write_model(tmp_path, CONFIG, STATE | {"layers.0.ffn.gate.tid2eid": table})
    with pytest.raises(CheckpointError, match="tid2eid names experts"):
        load_weights(model, torch.float32)
