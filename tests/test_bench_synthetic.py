"""Made-up models: the shapes, formats and sizes of real ones, finite numbers, memory of their own."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor

from localmoe.bench import shapes, synthetic
from localmoe.bench.synthetic import Held, fill, plan, run_all, set_scale, synthetic_weights, weight_bytes
from localmoe.engine import Engine
from localmoe.errors import ResourceError
from localmoe.formats import QuantizedTensor
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.family import tensor_inventory
from tests.tiny_bench import PLAIN, tiny

__all__ = ["tiny"]
GIB = 1 << 30


def test_every_tensor_has_the_shape_and_format_of_the_inventory(tiny: str) -> None:
    """Fails if something would be measured in a form that no checkpoint has."""
    config = shapes.published(tiny)
    weights = synthetic_weights(config, PLAIN)
    inventory = tensor_inventory(config)
    assert set(weights) == set(inventory)
    for name, spec in inventory.items():
        weight = weights[name]
        assert tuple(weight.shape) == spec.shape, name
        found = weight.format.name if isinstance(weight, QuantizedTensor) else weight.dtype
        kinds = {"float": torch.float32, "float32": torch.float32, "int": torch.int64, "linear": torch.float32}
        assert found == (spec.published if spec.published in ("fp8_block", "fp4") else kinds[spec.kind]), name


@pytest.mark.parametrize("held", [PLAIN, Held(torch.bfloat16, False), Held(torch.float32, True)])
def test_the_size_is_known_before_anything_is_allocated(tiny: str, held: Held) -> None:
    """Fails if a model is refused, or not, by numbers that are not its own."""
    config = shapes.published(tiny)
    assert weight_bytes(config, held) == sum(w.nbytes for w in synthetic_weights(config, held).values())


def test_compact_weights_are_what_the_loader_keeps_for_kernels(tiny: str) -> None:
    """Fails if head and gate would be float32, twice the bytes that a loaded model reads."""
    weights = synthetic_weights(shapes.published(tiny), Held(torch.float32, compact=True))
    dtypes = {name: weights[name].dtype for name in ("head.weight", "layers.0.ffn.gate.weight", "norm.weight")
              if isinstance(weights[name], Tensor)}  # fmt: skip
    assert dtypes == {
        "head.weight": torch.bfloat16,
        "layers.0.ffn.gate.weight": torch.bfloat16,
        "norm.weight": torch.float32,
    }


def test_weights_have_a_deviation_of_one_over_the_root_of_their_inputs(tiny: str) -> None:
    """Fails for a scale that is off by a power of two or more: activations would vanish or explode with depth."""
    weights = synthetic_weights(shapes.published(tiny), PLAIN)
    for name in ("layers.1.ffn.experts.3.w2.weight", "layers.0.attn.wq_b.weight", "head.weight"):
        weight = weights[name]
        values = weight if isinstance(weight, Tensor) else weight.dequantize()
        assert 0.7 < float(values.std()) * values.shape[1] ** 0.5 < 1.45, name


def test_every_expert_has_memory_and_values_of_its_own(tiny: str) -> None:
    """Fails if the working set would be smaller than the model."""
    weights = synthetic_weights(shapes.published(tiny), PLAIN)
    experts = [w for name, w in weights.items() if ".experts." in name and isinstance(w, QuantizedTensor)]
    spans = sorted((w.data.data_ptr(), w.data.data_ptr() + w.data.nbytes) for w in experts)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert len({bytes(w.data.view(torch.uint8).flatten()[:512].tolist()) for w in experts}) == len(experts)


def test_hash_tables_name_distinct_experts_that_are_there(tiny: str) -> None:
    """Fails if a token would use one expert twice, or the kernel be asked for one that is not there."""
    table = synthetic_weights(shapes.published(tiny), PLAIN)["layers.0.ffn.gate.tid2eid"]
    assert isinstance(table, Tensor)
    assert int(table.min()) == 0 and int(table.max()) == 3
    assert all(len(set(row)) == len(row) for row in table.tolist())


def test_the_same_seed_gives_the_same_model_and_finite_logits(tiny: str) -> None:
    """Fails if two runs would route differently, or measure NaN."""
    config = shapes.published(tiny)
    logits = []
    for _ in range(2):
        engine = Engine(DeepseekV4(config, synthetic_weights(config, PLAIN).__getitem__))
        logits.append(engine.advance([(engine.new_session(), list(range(2, 40)))], all_logits=True).logits)
    assert torch.equal(logits[0], logits[1])
    assert bool(logits[0].isfinite().all())
    assert 0.1 < float(logits[0].std()) < 10


def test_what_was_not_asked_for_is_chosen_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the default would fill a machine, or leave most of it unused."""
    for gib, expected_layers in ((16, range(20, 43)), (40, range(43, 44)), (1000, range(43, 44))):
        monkeypatch.setattr(synthetic, "available_memory", lambda gib=gib: gib * GIB)
        config = plan("v4-flash", PLAIN)
        assert config.num_layers in expected_layers
        assert weight_bytes(config, PLAIN) + synthetic.HEADROOM <= 0.75 * gib * GIB
    assert config.num_experts == 256


def test_more_than_fits_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "available_memory", lambda: 8 * GIB)
    with pytest.raises(
        ResourceError, match=r"43 layers of v4-flash with 256 experts each need 1\d\d\.\d GiB.*8\.0 GiB"
    ):
        plan("v4-flash", PLAIN, 43, 256)


def test_fill_writes_every_byte_from_a_place_of_its_own() -> None:
    """Fails if the end of a tensor would keep what was in memory before."""
    block = torch.arange(7, dtype=torch.uint8)
    for size in (1, 6, 7, 20):
        target = torch.full((size,), 99, dtype=torch.uint8)
        fill(target, block, 3)
        begin = 3 * 64 * 1009 % 7
        assert target.tolist() == [(begin + i) % 7 for i in range(size)]


def test_a_scale_is_the_power_of_two_in_either_dtype() -> None:
    as_float, as_byte = torch.empty(2), torch.empty(2, dtype=torch.uint8)
    set_scale(as_float, -5)
    set_scale(as_byte, -5)
    assert as_float.tolist() == [2.0**-5] * 2
    assert as_byte.view(torch.float8_e8m0fnu).float().tolist() == [2.0**-5] * 2


def test_filling_stops_at_the_first_problem() -> None:
    """Fails if Ctrl-C or an error would be waited for until all memory is filled, or be lost."""
    done: list[int] = []

    def fail() -> None:
        raise MemoryError

    def work() -> None:
        time.sleep(0.001)
        done.append(1)

    with pytest.raises(MemoryError):
        run_all([(1, fail), *[(1, work)] * 10_000])
    assert len(done) < 10_000
