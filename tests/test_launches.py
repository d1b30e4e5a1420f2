"""How much a decode step launches on a device, a layer at a time, and that it waits for nothing. Devices are simulated,
their kernels interpreted."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.engine import Engine
from localmoe.experts.carried import CarriedExperts
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.family import build, config_of, expert_names
from localmoe.site import Site
from localmoe.step import Step
from tests import tiny_mla, tiny_v4
from tests.simulated_devices import SIMULATED, Seen, simulated, watched
from tests.tiny_engine import run, token_ids
from tests.tiny_v4 import CSA, HCA, PUBLISHED_DIMS, SLIDING
from tests.triton_kernels import HAS_GPU

# isort: split
from localmoe.experts.on_device import DeviceExperts
from localmoe.kernels.triton.ops import TritonOps

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are interpreted where there is no GPU only")
A = SIMULATED[0]
IDS = token_ids(24)
FEW = {"n_routed_experts": 24, "num_experts_per_tok": 2, "num_hash_layers": 1, "hc_sinkhorn_iters": 2}


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with simulated():
        yield


def configured(name: str, *layers: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Layers: of V4 their kinds; of others, that many, the first of them dense."""
    if name == "v4":
        config = tiny_v4.tiny_config(**PUBLISHED_DIMS | FEW | {"layer_types": list(layers)})
        return config, tiny_v4.random_state(config)
    config = tiny_mla.tiny_config(name, num_hidden_layers=len(layers), first_k_dense_replace=1)
    return config, tiny_mla.random_state(config)


def engine(name: str, *layers: str, exact: bool = True) -> Engine:
    """All of it on one device, experts too."""
    config, state = configured(name, *layers)
    parsed, ops = config_of(config), TritonOps(exact)
    stored = {
        layer: [[state[n] for n in expert_names(parsed, layer, e)] for e in range(parsed.num_experts)]
        for layer in range(parsed.num_moe_layers)
    }
    source = DeviceExperts(stored, dict.fromkeys(stored, A), ops, parsed.swiglu_limit)
    experts = CarriedExperts(None, dict.fromkeys(stored, source))
    return Engine(build(parsed, state.__getitem__, sites=[Site(A, ops=ops)] * parsed.num_layers, experts=experts))


def steps(loaded: Engine) -> Iterator[Tensor]:
    """Logits of a prompt, then of one step of one token."""
    session = loaded.new_session()
    # V4's window is full then.
    prompt = 16 if isinstance(loaded.model, DeepseekV4) else 4
    yield run(loaded, IDS[:prompt], session=session)
    yield run(loaded, IDS[prompt : prompt + 1], session=session)


@functools.cache
def decoded(name: str, *layers: str) -> tuple[Seen, list[Tensor]]:
    """What one step of one token does, and the logits of it and of the prompt before."""
    there = steps(engine(name, *layers))
    logits = [next(there)]
    with watched() as seen:
        logits.append(next(there))
    return seen, logits


def more(name: str, without: tuple[str, ...], layers: tuple[str, ...]) -> int:
    with_it, without_it = decoded(name, *layers)[0], decoded(name, *without)[0]
    return len(with_it.launches) - len(without_it.launches)


@pytest.mark.parametrize(
    ("name", "without", "layers", "most"),
    [
        ("v4", (SLIDING,), (SLIDING, SLIDING), 30),
        ("v4", (SLIDING,), (SLIDING, HCA), 37),
        ("v4", (SLIDING,), (SLIDING, CSA), 47),
        ("v2-lite", ("", ""), ("", "", ""), 31),
        ("v3", ("", ""), ("", "", ""), 33),
    ],
)
def test_launches_of_a_layer(name: str, without: tuple[str, ...], layers: tuple[str, ...], most: int) -> None:
    """Fails if something that a kernel does, or that is made once a step, is done by torch in every layer.

    The first layer with compressed entries turns the angles of its own rotation back, once a step."""
    assert more(name, without, layers) == most


@pytest.mark.parametrize("name", ["v4", "v2-lite"])
def test_a_decode_step_waits_once_for_the_device(name: str) -> None:
    """For the sums that say what is not finite, and then the logits. Fails if anything else is asked of the device, or
    a copy to it waits for what was launched before."""
    layers = (SLIDING, CSA, HCA) if name == "v4" else ("", "", "")
    seen, _logits = decoded(name, *layers)
    assert len(seen.waits) == 2
    # Nothing is launched between the two.
    assert seen.launches[-1] == "stack"


def test_what_waits_is_seen() -> None:
    """Fails if the test above could not see it."""
    x = torch.ones(3).to(A)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x[0] > 0),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: torch.ones(2).to(A),
    ):
        with watched() as seen:
            wait()
        assert seen.waits
    with watched() as seen:
        y = x + x
        y[1:] = x[1:]
        torch.ones(2).to(A, non_blocking=True)
    assert not seen.waits and seen.launches == ["add", "copy_", "to device"]


@pytest.mark.parametrize("name", ["v4", "v2-lite", "v3"])
def test_routing_in_one_launch_is_that_of_the_layer(name: str) -> None:
    """A recorded step routes op by op. Fails if the kernel is given another bias, scale or grouping than the layer
    has, or the record is left out."""
    loaded = engine(name, *((SLIDING, SLIDING) if name == "v4" else ("", "", "")))
    found = []
    for log in (None, []):
        state = loaded.model.new_state()
        step = Step.of([(state, IDS[:5])], router_log=log)
        with torch.inference_mode(), watched() as seen:
            found.append(loaded.model.forward(step).cpu())
        assert ("triton _route" in seen.launches) == (log is None)
        assert log is None or len(log) == loaded.model.config.num_moe_layers
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("name", ["v4", "v2-lite"])
def test_logits_are_those_of_the_cpu(name: str) -> None:
    """Fails if a launch that was left out was needed."""
    layers = (SLIDING, CSA, HCA) if name == "v4" else ("", "", "")
    config, state = configured(name, *layers)
    here = Engine(build(config_of(config), state.__getitem__))
    for found, expected in zip(decoded(name, *layers)[1], steps(here), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
