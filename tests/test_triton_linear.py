"""Triton's products with packed weights against torch's on the dequantized matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localmoe.kernels import codecs
from tests.loops import noise
from tests.triton_kernels import DEVICE, error, to_device

# isort: split
from localmoe.kernels.triton.linear import linear
from localmoe.kernels.triton.matrix import Matrix

# Sums of a few hundred products in another order; and of products of bfloat16.
EXACT, ROUNDED = 2e-6, 1e-2
# The table of bitsandbytes: quantiles of a normal distribution.
KINDS = ["f32", "bf16", "fp8_block", "fp8_e8m0", "fp4", "int8 32", "int8 128", "int4 32", "int4 64", "int4 32 zeros",
         "int8 64 zeros", "nf4 64"]  # fmt: skip


def packed(kind: str, weight: Tensor) -> tuple[Matrix, Tensor]:
    """A weight in a format, and the float32 matrix that it stands for."""
    name, *rest = kind.split()
    shape = (weight.shape[0], weight.shape[1])
    if name in ("f32", "bf16"):
        stored = weight if name == "f32" else weight.bfloat16()
        return Matrix.of("plain", shape, *to_device(stored)), stored.float()
    if name == "fp8_block":
        data, scale = codecs.quantize_fp8_block(weight)
        return Matrix.of(name, shape, *to_device(data, scale)), codecs.dequantize_fp8_block(data, scale)
    if name == "fp8_e8m0":
        data, scale = codecs.quantize_fp8_block(weight)
        stored = codecs.encode_e8m0(scale).view(torch.float8_e8m0fnu)
        return Matrix.of("fp8_block", shape, *to_device(data, stored)), codecs.dequantize_fp8_block(data, scale)
    if name == "fp4":
        data, scale = codecs.quantize_fp4(weight)
        return Matrix.of(name, shape, *to_device(data, scale)), codecs.dequantize_fp4(data, scale)
    group = int(rest[0])
    if name == "nf4":
        groups = weight.unflatten(1, (-1, group))
        scale = groups.abs().amax(-1)
        codes = codecs.nf4_codes(groups / scale[..., None]).flatten(1)
        data = codes[:, 0::2] << 4 | codes[:, 1::2]
        values = codecs.dequantize_nf4(data, scale)
        return Matrix.of(name, shape, *to_device(data, scale), group=group), values
    bits = int(name.removeprefix("int"))
    data, scale, zero = codecs.quantize_int(weight, bits, group, symmetric=len(rest) == 1)
    zeros = None if zero is None else zero.to(DEVICE)
    found = Matrix.of(name, shape, *to_device(data, scale), zero=zeros, group=group)
    return found, codecs.dequantize_int(data, scale, zero, bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_products_are_those_of_the_dequantized_matrix(kind: str, tokens: int) -> None:
    """Rows and columns that fill no block. Fails if a code, a scale or a zero point is read from another place."""
    cols = 384 if kind.endswith("128") else 320
    weight, values = packed(kind, noise(70, cols, seed=1))
    x = noise(tokens, cols, seed=2)
    assert error(linear(x.to(DEVICE), weight, exact=True), x.double() @ values.double().t()) <= EXACT


@pytest.mark.parametrize("tokens", [16, 17, 65])
def test_many_tokens(tokens: int) -> None:
    """Fails if a tile of tokens or rows is left out or taken twice."""
    weight, values = packed("fp4", noise(130, 160, seed=3))
    x = noise(tokens, 160, seed=4)
    expected = x.double() @ values.double().t()
    assert error(linear(x.to(DEVICE), weight, exact=True), expected) <= EXACT
    assert error(linear(x.to(DEVICE), weight), expected) <= ROUNDED


def test_columns_are_split_where_rows_are_few() -> None:
    """Fails if a split is added twice, or the last, shorter one is forgotten."""
    weight, values = packed("int8 32", noise(5, 1056, seed=5))
    x = noise(2, 1056, seed=6)
    assert error(linear(x.to(DEVICE), weight), x.double() @ values.double().t()) <= EXACT


@pytest.mark.parametrize("kind", ["bf16", "fp8_block", "fp4", "int8 64 zeros"])
@pytest.mark.parametrize("tokens", [3, 18])
@pytest.mark.parametrize(("groups", "rows"), [(1, 20), (3, 5), (2, 70)])
def test_groups_of_rows_multiply_their_own_columns(kind: str, tokens: int, groups: int, rows: int) -> None:
    """Groups that fill blocks of rows, and do not. Fails if rows at a border are multiplied with another group's x,
    or their scales are those of another group's rows."""
    weight, values = packed(kind, noise(groups * rows, 192, seed=7))
    x = noise(tokens, groups, 192, seed=8)
    blocks = values.double().unflatten(0, (groups, rows))
    expected = torch.einsum("tgc,grc->tgr", x.double(), blocks).flatten(1)
    assert error(linear(x.to(DEVICE), weight, groups, exact=True), expected) <= EXACT
    assert error(linear(x.to(DEVICE), weight, groups), expected) <= ROUNDED


@pytest.mark.parametrize("kind", ["fp8_block", "fp4"])
def test_every_code_is_decoded_exactly(kind: str) -> None:
    """All codes with small and large scales, times 1. Fails if a subnormal, a sign or an exponent is off by one bit."""
    if kind == "fp4":
        data = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
        scale = torch.tensor([[0], [1], [2], [100], [126], [127], [128], [150]] * 2, dtype=torch.uint8)
        values, shape = codecs.dequantize_fp4(data, scale), (16, 32)
    else:
        codes = torch.arange(256, dtype=torch.uint8)
        codes[[127, 255]] = 0
        data, scale = codes.reshape(2, 128).view(torch.float8_e4m3fn), torch.tensor([[0.75]])
        values, shape = codecs.dequantize_fp8_block(data, scale), (2, 128)
    weight = Matrix.of(kind, shape, *to_device(data, scale))
    found = linear(torch.eye(shape[1], device=DEVICE), weight, exact=True).cpu()
    assert torch.equal(found, values.t())


def test_nothing_in_nothing_out() -> None:
    weight, _ = packed("fp4", noise(7, 64))
    assert linear(torch.empty(0, 64, device=DEVICE), weight).shape == (0, 7)


def test_what_does_not_fit_is_refused() -> None:
    data = torch.zeros(4, 48, dtype=torch.uint8)
    for name, shape, group in [("int8", (4, 48), 32), ("int8", (4, 49), 7), ("fp5", (4, 48), 0), ("int4", (4, 48), 16)]:
        with pytest.raises(ValueError, match=r"expected|for a matrix"):
            Matrix.of(name, shape, data, torch.ones(4, 2), group=group)
    with pytest.raises(ValueError, match="columns"):
        linear(torch.zeros(1, 32), Matrix.of("plain", (4, 48), torch.zeros(4, 48)))
    for groups, of_x in [(3, 3), (2, 3)]:
        with pytest.raises(ValueError, match="groups"):
            linear(torch.zeros(1, of_x, 48), Matrix.of("plain", (4, 48), torch.zeros(4, 48)), groups)
