"""What tests of the benchmarks share: a model of half a megabyte among the published shapes."""

from __future__ import annotations

import pytest
import torch

from localmoe.bench import shapes
from localmoe.bench.synthetic import Held
from tests.tiny_v4 import tiny_config

PLAIN = Held(torch.float32, compact=False)
TINY = tiny_config(
    compress_ratios=[0, 4, 128, 4], hidden_size=64, moe_intermediate_size=64, num_attention_heads=4, n_routed_experts=4
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name."""
    monkeypatch.setitem(shapes.CONFIGS, "tiny", TINY)
    return "tiny"
