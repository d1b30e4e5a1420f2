"""Tiny random models bound and ready to run, and a model directory with a tokenizer for the API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.engine import Engine
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_names import tensor_inventory
from localmoe.session import Session
from tests.tiny_tokenizer import tiny_description, tiny_tokenizer
from tests.tiny_v4 import random_state, tiny_config, write_published


def bind(config: dict[str, Any], state: Mapping[str, Tensor], **options: Any) -> DeepseekV4:
    return DeepseekV4(DeepseekV4Config.from_dict(config), state.__getitem__, **options)


def tiny_engine(seed: int = 0, **overrides: Any) -> Engine:
    """An engine of a random float32 model; overrides go to its config."""
    config = tiny_config(**overrides)
    return Engine(bind(config, random_state(config, seed)))


def as_bf16(config: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as it is loaded for bf16 activations: what V4 keeps in float32 stays so."""
    inventory = tensor_inventory(DeepseekV4Config.from_dict(config))
    return {n: t.bfloat16() if inventory[n].kind in ("linear", "float") else t for n, t in state.items()}


def token_ids(count: int, seed: int = 0, vocab: int = 160) -> list[int]:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine: Engine, ids: Sequence[int], chunk: int | None = None, session: Session | None = None) -> Tensor:
    """Logits [len(ids), vocab] of every token, computed in chunks of one size (all at once if None)."""
    session, size = session or engine.new_session(), chunk or len(ids)
    chunks = [ids[at : at + size] for at in range(0, len(ids), size)]
    return torch.cat([engine.advance([(session, c)], all_logits=True).logits for c in chunks])


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference. NaN is larger than any tolerance."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def write_tiny_model(directory: Path, **overrides: Any) -> Path:
    """A model directory with a real tokenizer of 400 tokens, for LLM(directory)."""
    config = tiny_config(**{"vocab_size": tiny_tokenizer().vocab_size} | overrides)
    write_published(directory, config, random_state(config), quantized=False, shards=1)
    (directory / "tokenizer.json").write_text(json.dumps(tiny_description()))
    return directory
