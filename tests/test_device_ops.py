"""What layers on a device are computed with, against the twins; without a GPU, by Triton's interpreter."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from localmoe import ops
from localmoe.errors import ResourceError
from localmoe.experts.on_device import DeviceExperts, Stored
from localmoe.experts.resident import Expert, ResidentExperts
from localmoe.formats import FORMATS, QuantizedTensor
from localmoe.kernels import reference
from localmoe.weights import (
    DeviceWeight,
    Observed,
    Weight,
    bind_device,
    grouped_linear,
    linear,
    linear_float32,
    observed,
    stored,
)
from tests.loops import noise
from tests.triton_kernels import DEVICE, error

# isort: split
from localmoe.kernels.triton import ops as triton_ops
from localmoe.kernels.triton.ops import TritonOps

# BF16: results are rounded to it, which the interpreter does by cutting off.
EXACT, ROUNDED, BF16 = 3e-6, 1.5e-2, 1.6e-2
TRITON = TritonOps(exact=True)
KINDS = ["f32", "bf16", "fp8_block", "fp4", "int8_g32", "int4_g64 zeros", "nf4"]
BFLOAT16 = torch.bfloat16
LIMIT, D, F = 0.8, 192, 128


def on(part: Any) -> Any:
    """Tensors, or pairs of them, on the device; anything else as it is."""
    if isinstance(part, tuple):
        return tuple(map(on, part))
    return part.to(DEVICE) if isinstance(part, Tensor) else part


def same(name: str, *parts: Any, tolerance: float = EXACT, **how: Any) -> None:
    """An op gives the same by the device's kernels, called directly and through localmoe.ops, as its twin."""
    expected = getattr(ops, name)(*parts, **how)
    moved = [on(part) for part in parts], {key: on(part) for key, part in how.items()}
    for found in (
        getattr(TRITON, name)(*moved[0], **moved[1]),
        getattr(ops, name)(*moved[0], **moved[1], library=TRITON),
    ):
        assert found.dtype == expected.dtype and found.device.type == DEVICE.type
        assert error(found.float(), expected.float()) <= tolerance


def made(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor | QuantizedTensor:
    """A weight as it is stored."""
    weight = noise(rows, cols, seed=seed) * cols**-0.5
    if kind in ("f32", "bf16", "f64"):
        return weight.to({"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}[kind])
    return FORMATS[kind.removesuffix(" zeros")].quantize(weight, symmetric=not kind.endswith("zeros"))


def values(weight: Tensor | QuantizedTensor) -> Tensor:
    return weight.double() if isinstance(weight, Tensor) else weight.dequantize().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "pairs"), [((1, 6), 1), ((5, 3, 20), 4), ((2, 7), 0), ((0, 8), 2)])
def test_norm_and_rotation(shape: tuple[int, ...], pairs: int, dtype: torch.dtype) -> None:
    """float64 is left to torch. Fails if a norm is made without one being asked for, or the other way round."""
    x, weight, tolerance = noise(*shape).to(dtype), noise(shape[-1], seed=1), EXACT if dtype != torch.bfloat16 else BF16
    same("rms_norm", x, weight, 1e-6, tolerance=tolerance)
    same("rms_norm", x, None, 1e-6, tolerance=tolerance)
    if pairs:
        angle = noise(shape[0], pairs, seed=2)
        for how in ({}, {"eps": 1e-6}, {"eps": 1e-6, "weight": weight}):
            same("norm_rope", x, angle.cos(), angle.sin(), tolerance=tolerance, **how)


def test_one_angle_for_all_tokens_is_left_to_torch() -> None:
    """Fails if the kernel reads the angles of tokens that have none of their own."""
    angle = noise(1, 2)
    same("norm_rope", noise(3, 2, 6), angle.cos(), angle.sin(), eps=1e-6)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("n", "near", "far"), [(1, 5, 0), (1, 1, 7), (3, 33, 40), (0, 4, 4)])
def test_attention(n: int, near: int, far: int, own: bool) -> None:
    """One query, several, none; masked or not; entries of all queries, of each, and none at all."""
    q, window, sink = noise(n, 5, 24), noise(near, 24, seed=1), noise(5, seed=2)
    entries = noise(n, far, 24, seed=3) if own else noise(far, 24, seed=3)
    draw = torch.Generator().manual_seed(near)
    mask = torch.rand(n, near, generator=draw) < 0.6
    bias = torch.zeros(n, far).masked_fill(torch.rand(n, far, generator=draw) < 0.5, -math.inf)
    for hidden in (None, None), (mask, None), (mask, bias):
        same("sparse_attention", q, window, hidden[0], entries, hidden[1], sink)
    # As a state in bfloat16 has them, and entries of another dtype, which only torch takes.
    half = [part.bfloat16() for part in (q, window, entries)]
    same("sparse_attention", half[0], half[1], mask, half[2], bias, sink, tolerance=BF16)
    same("sparse_attention", half[0], half[1], mask, entries, bias, sink, tolerance=BF16)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("n", "keys"), [(1, 1), (3, 50), (0, 4)])
def test_latent_attention(n: int, keys: int, own: bool) -> None:
    """Rows of all queries and of each, all seen or some. Fails if what is hidden counts."""
    q, cache = noise(n, 6, 40), noise(n, keys, 40, seed=1) if own else noise(keys, 40, seed=1)
    seen = torch.rand(n, keys, generator=torch.Generator().manual_seed(keys)) < 0.5
    seen[:, 0] = True
    for visible in (None, seen):
        same("latent_attention", q, cache, visible, width=32, scale=0.2)
        same("latent_attention", q.double(), cache, visible, width=32, scale=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", [4, 3])
@pytest.mark.parametrize("tokens", [1, 5, 0])
def test_hyper_connections(tokens: int, streams: int, dtype: torch.dtype) -> None:
    """Three streams are left to torch. Fails if weights are exchanged on the way."""
    x, norm, total = noise(tokens, streams, 33).to(dtype), 1 + 0.1 * noise(33, seed=1), (2 + streams) * streams
    fn, base, scale = noise(total, streams * 33, seed=2) * 0.1, noise(total, seed=3), noise(3, seed=4)
    how: Any = {"iterations": 5, "norm_eps": 1e-6, "eps": 1e-6}
    pre, post, comb = reference.hyper_mix(x, fn, base, scale, **how)
    entered = reference.rms_norm(reference.hyper_collapse(x, pre), norm, 1e-6), post, comb
    tolerance = 1e-5 if dtype == torch.float32 else BF16
    for found, expected in zip(TRITON.hyper_enter(*map(on, (fn, base, scale, norm, x)), **how), entered, strict=True):
        assert found.dtype == expected.dtype
        assert error(found.float(), expected.float()) <= tolerance
    y = noise(tokens, 33, seed=5).to(dtype)
    left = TRITON.hyper_leave(*map(on, (x, y, post, comb)))
    assert left.dtype == dtype
    assert error(left.float(), reference.hyper_expand(x, y, post, comb).float()) <= tolerance


@pytest.mark.parametrize(("n", "entries"), [(1, 1), (3, 70), (2, 0), (0, 3)])
def test_index_scores(n: int, entries: int) -> None:
    same("index_scores", noise(n, 5, 24), noise(entries, 24, seed=1), noise(n, 5, seed=2))


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling(windows: int, dtype: torch.dtype) -> None:
    """Windows that overlap and do not, the first of a sequence and later ones."""
    kv, score = noise(windows, 4, 10).to(dtype), 3 * noise(windows, 4, 10, seed=1).to(dtype)
    same("pool_windows", kv, score)
    same("pool_overlapping", kv, score, None)
    same("pool_overlapping", kv, score, (noise(4, 10, seed=2).to(dtype), noise(4, 10, seed=3).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (0, 4)])
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Fails if a limit is left out, or NaN becomes the limit."""
    gate, up = (3 * noise(*shape, seed=seed).to(dtype) for seed in (0, 1))
    found, expected = TRITON.swiglu(on(gate), on(up), LIMIT), reference.swiglu(gate, up, LIMIT)
    assert found.dtype == dtype and error(found.float(), expected.float()) <= (EXACT if dtype != BFLOAT16 else BF16)
    for parts in ((gate * math.nan, up), (gate, up * math.nan)):
        assert TRITON.swiglu(*map(on, parts), LIMIT).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_weight_on_a_device_multiplies_as_its_numbers_do(kind: str, tokens: int) -> None:
    """Fails if a part of a packed matrix stays behind, or a group takes another's rows."""
    weight = made(kind, 2 * 35, 192)
    bound = bind_device(weight.to(DEVICE), TritonOps())
    assert isinstance(bound, DeviceWeight)
    assert (bound.shape, bound.nbytes) == (weight.shape, weight.nbytes)
    x, grouped = noise(tokens, 192, seed=1), noise(tokens, 2, 192, seed=2)
    expected = x.double() @ values(weight).t()
    assert error(linear(on(x), bound), expected) <= ROUNDED
    assert linear(on(x).bfloat16(), bound).dtype == torch.bfloat16
    found = linear_float32(on(x), bound)
    assert found.dtype == torch.float32
    assert error(found, expected) <= EXACT
    blocks = torch.einsum("tgc,grc->tgr", grouped.double(), values(weight).unflatten(0, (2, -1))).flatten(1)
    assert error(grouped_linear(on(grouped), bound), blocks) <= ROUNDED
    assert linear(on(x)[:0], bound).shape == (0, 70)


@pytest.mark.parametrize("kind", ["book3", "book2", "f64"])
def test_what_no_kernel_reads_is_left_to_torch(kind: str) -> None:
    """Fails if it is refused, or read as something else."""
    weight = made(kind, 40, 64)
    bound = bind_device(weight.to(DEVICE), TRITON)
    assert not isinstance(bound, DeviceWeight)
    x = noise(3, 64)
    assert error(linear(on(x), bound), x.double() @ values(weight).t()) <= EXACT


def test_a_view_of_a_weight_is_bound_in_order() -> None:
    """Fails if the kernel reads a transposed matrix as if it were not."""
    weight = noise(64, 40).t()
    bound = bind_device(weight.to(DEVICE), TRITON)
    x = noise(2, 64, seed=1)
    assert error(linear(on(x), bound), x.double() @ weight.double().t()) <= EXACT


def test_whoever_observes_a_weight_on_a_device_is_shown_its_inputs() -> None:
    shown: list[Tensor] = []
    weight = made("fp4", 8, 64).to(DEVICE)
    watched = observed(bind_device(weight, TRITON), "name", lambda _name: shown.append)
    assert isinstance(watched, Observed)
    assert stored(watched) is weight
    x = on(noise(2, 64))
    plain = linear(x, watched.weight)
    assert torch.equal(linear(x, watched), plain)
    assert torch.equal(linear_float32(x, watched), plain)
    assert torch.equal(grouped_linear(x[:, None], watched), plain)
    assert len(shown) == 3


def test_a_packed_matrix_moves_with_all_of_its_parts() -> None:
    """To a device that has no memory, so that a part left behind shows."""
    packed = cast(QuantizedTensor, made("int4_g32 zeros", 4, 64))
    moved = packed.to(torch.device("meta"))
    assert moved.format is packed.format and moved.shape == packed.shape and moved.zero is not None
    assert {part.device.type for part in (moved.data, moved.scale, moved.zero)} == {"meta"}
    assert packed.to(torch.device("cpu")) is packed


def expert(kind: str, seed: int, gate: str | None = None) -> Stored:
    return made(gate or kind, F, D, seed), made(kind, D, F, seed + 100), made(kind, F, D, seed + 200)


def device_experts(layers: dict[int, list[Stored]], exact: bool = True) -> DeviceExperts:
    return DeviceExperts(layers, dict.fromkeys(layers, DEVICE), TritonOps(exact), LIMIT)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_on_a_device_compute_as_those_in_memory(kind: str) -> None:
    """Two layers, experts that nobody chooses, none and many tokens. Fails if a layer or an expert is another's."""
    layers = {layer: [expert(kind, 10 * layer + e) for e in range(4)] for layer in (1, 3)}
    found = device_experts(layers)
    draw = torch.Generator().manual_seed(0)
    for layer, experts in layers.items():
        # bfloat16 would be multiplied as such.
        wide: list[list[Weight]] = [[values(w).float() for w in each] for each in experts]
        plain = ResidentExperts([[Expert(*each, LIMIT) for each in wide]])
        for tokens in (1, 18):
            x, weights = noise(tokens, D, seed=tokens), noise(tokens, 2, seed=tokens + 1)
            ids = torch.randint(0, 4 if tokens == 1 else 3, (tokens, 2), generator=draw)
            expected = plain.apply(0, x, ids, weights)
            assert error(found.apply(layer, on(x), on(ids), on(weights)), expected) <= 5e-6
    nothing = found.apply(1, on(noise(0, D)), on(torch.zeros(0, 2, dtype=torch.long)), on(noise(0, 2)))
    assert nothing.shape == (0, D)


def test_experts_are_taken_one_after_the_other() -> None:
    """Fails if they are all there at once before they are brought to the device, where there may not be room twice."""
    alive: list[int] = []
    counts: list[int] = []

    class Made(list[Stored]):
        """Experts that are made when they are asked for."""

        def __iter__(self) -> Iterator[Stored]:
            for seed in range(len(self)):
                each = expert("fp4", seed)
                alive.append(seed)
                weakref.finalize(each[0], alive.remove, seed)
                counts.append(len(alive))
                yield each

    device_experts({0: Made([()] * 6)})
    assert len(counts) == 6 and max(counts) <= 2


@pytest.mark.parametrize(
    ("experts", "why"),
    [
        ([expert("book3", 0)], "book3, which is computed on the CPU only"),
        ([expert("f64", 0)], "float64, which is computed on the CPU only"),
        ([expert("fp4", 0), expert("fp8_block", 1)], "expert 1 is stored otherwise"),
        ([expert("fp4", 0, gate="fp8_block")], "gate and up-projection"),
        ([], "0 experts found"),
    ],
)
def test_experts_that_the_kernels_cannot_compute_are_refused(experts: list[Stored], why: str) -> None:
    """Fails if one is read as if it were stored as another."""
    with pytest.raises(ResourceError, match=why):
        device_experts({0: experts})


def test_the_kernels_are_those_that_layers_ask_for() -> None:
    """Fails if a method is missing, or takes other arguments than layers give."""
    promised = {name: method for name, method in vars(ops.DeviceOps).items() if not name.startswith("_")}
    assert len(promised) > 10
    for name, method in promised.items():
        if inspect.isfunction(method):
            assert inspect.signature(method) == inspect.signature(getattr(TritonOps, name)), name


class Elsewhere:
    """A tensor on the second of two GPUs that are not there, for kernels that are not called."""

    is_cuda, device, dtype, shape = True, torch.device("cuda", 1), torch.float32, (1, 4)

    def __len__(self) -> int:
        return 1


def test_launches_go_to_the_device_that_has_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a kernel goes to the current one, which is another."""
    entered: list[torch.device] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    for name in ("norm_rope", "attention", "hyper", "indexer", "products", "moe", "router"):
        monkeypatch.setattr(triton_ops, name, MagicMock())
    x: Any = Elsewhere()
    TRITON.rms_norm(x, None, 1e-6)
    TRITON.norm_rope(x, x, x)
    TRITON.sparse_attention(x, x, None, x, None, x)
    TRITON.latent_attention(x, x, None, width=2, scale=1.0)
    TRITON.hyper_enter(x, x, x, x, x, iterations=1, norm_eps=0.0, eps=0.0)
    TRITON.hyper_leave(x, x, x, x)
    TRITON.index_scores(x, x, x)
    TRITON.pool_windows(x, x)
    TRITON.linear(x, x)
    TRITON.swiglu(x, x, 1.0)
    TRITON.route(x, x, 1, 1.0, normalize=True, scoring="softmax")
    TRITON.experts(x, x, x, x)
    assert entered == [x.device] * 12
