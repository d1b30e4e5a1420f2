"""Decode steps that are recorded as graphs and played give what the same steps give otherwise. Devices and their graphs
are simulated, kernels interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from localmoe import decoder
from localmoe.engine import Engine, Session
from localmoe.experts.carried import CarriedExperts
from localmoe.models.family import build, config_of, expert_names
from localmoe.models.model import Model
from localmoe.site import Site
from tests import tiny_mla, tiny_v4
from tests.simulated_devices import SIMULATED, simulated
from tests.simulated_graphs import SimulatedRecorder
from tests.tiny_engine import token_ids
from tests.tiny_v4 import CSA, HCA, SLIDING
from tests.torch_ops import TorchOps
from tests.triton_kernels import HAS_GPU

# isort: split
from localmoe.experts.on_device import DeviceExperts

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are interpreted where there is no GPU only")
A, B = SIMULATED[:2]
IDS = token_ids(64)
# Small, because the interpreter takes its time: entries after 2 and 4 tokens, of which 3 are chosen.
SMALL_V4 = {
    "layer_types": [SLIDING, CSA, HCA], "compress_rates": {CSA: 2, HCA: 4}, "index_topk": 3, "sliding_window": 4,
    "num_hash_layers": 1, "hc_sinkhorn_iters": 2, "index_n_heads": 2, "n_routed_experts": 4,
}  # fmt: skip
TORCH = TorchOps()
SMALL_MLA = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoder, "ROOM", 4)
    monkeypatch.setattr(decoder, "WARM_STEPS", 1)
    with simulated():
        yield


def model(name: str, where: list[torch.device], *, ops: Any = TORCH, here: bool = True) -> Model:
    """On devices in turn; its experts too, or in RAM."""
    config: dict[str, Any]
    if name == "v4":
        config = tiny_v4.tiny_config(**SMALL_V4)
        state = tiny_v4.random_state(config)
    else:
        config = tiny_mla.tiny_config(name, **SMALL_MLA | ({"index_topk": 6} if name == "v3.2" else {}))
        state = tiny_mla.random_state(config)
    parsed = config_of(config)
    if not where:
        return build(parsed, state.__getitem__)
    layers, dense = parsed.num_layers, parsed.num_layers - parsed.num_moe_layers
    devices = [where[layer * len(where) // layers] for layer in range(layers)]
    stored = {
        layer: [[state[n] for n in expert_names(parsed, layer, e)] for e in range(parsed.num_experts)]
        for layer in range(parsed.num_moe_layers)
    }
    of_layers = {layer: devices[layer + dense] for layer in stored}
    on_gpus = dict.fromkeys(stored, DeviceExperts(stored, of_layers, ops, parsed.swiglu_limit)) if here else {}
    ram = build(parsed, state.__getitem__).experts
    sites = [Site(device, ops=ops) for device in devices]
    return build(parsed, state.__getitem__, sites=sites, experts=CarriedExperts(ram, on_gpus))


def decode(engine: Engine, sessions: list[Session], ids: list[int]) -> torch.Tensor:
    """Logits of single tokens, each given to all of some sessions."""
    return torch.stack([engine.advance([(session, [token]) for session in sessions]).logits for token in ids])


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("name", ["v4", "v2-lite", "v3.2"])
def test_played_steps_give_the_same(name: str, prompt: int) -> None:
    """Windows fill, entries are made and chosen among, and buffers are outgrown while a recording is played. Fails if
    anything that depends on the position is recorded as it was, or a recording outlives what it was made for."""
    there, here = Engine(model(name, [A]), SimulatedRecorder()), Engine(model(name, []))
    steps, sessions = IDS[prompt : prompt + 14], (there.new_session(), here.new_session())
    for engine, session in zip((there, here), sessions, strict=True):
        engine.advance([(session, IDS[:prompt])])
    found, expected = decode(there, [sessions[0]], steps), decode(here, [sessions[1]], steps)
    assert there.decoder is not None and there.decoder.failed is None
    assert there.decoder.played >= 8
    assert torch.allclose(found, expected, atol=2e-5)
