"""What tests of the compiled kernels share: the library, matrices in every format, and their values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from localmoe.formats import FORMATS, QuantizedTensor
from localmoe.kernels import native
from localmoe.kernels.reference import fake_quant_int8
from localmoe.weights import bind_native

LIBRARY = native.load()
needs_native = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no compiled kernels: {LIBRARY}")
ISAS = [] if isinstance(LIBRARY, str) else LIBRARY.isas
PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16}
ASYMMETRIC = ["int8_g32 asymmetric", "int4_g64 asymmetric"]
KINDS = [*PLAIN, *FORMATS, *ASYMMETRIC]


def library() -> native.Library:
    assert isinstance(LIBRARY, native.Library)
    return LIBRARY


@contextmanager
def using(isa: str | None = None, threads: int | None = None) -> Iterator[native.Library]:
    """The library with another instruction set or number of threads, afterwards as it was."""
    lib = library()
    before = lib.isa, lib.threads
    try:
        if isa:
            lib.use_isa(isa)
        if threads:
            lib.set_threads(threads)
        yield lib
    finally:
        lib.use_isa(before[0])
        lib.set_threads(before[1])


def packed(kind: str, weight: Tensor) -> Tensor | QuantizedTensor:
    """A matrix in one of KINDS."""
    if kind in PLAIN:
        return weight.to(PLAIN[kind])
    name, _, rest = kind.partition(" ")
    return FORMATS[name].quantize(weight, **({"symmetric": False} if rest else {}))


def values(weight: Tensor | QuantizedTensor) -> Tensor:
    """Its exact values, float64."""
    return (weight if isinstance(weight, Tensor) else weight.dequantize()).double()


# Tokens of a matrix from which on AMX computes in bf16.
AMX_FROM = 9


def rounds_to_int8(kind: str, isa: str, mode: str, tokens: int = 1) -> bool:
    """Whether the kernels round activations of so many tokens to int8 for a matrix of that kind."""
    int8 = isa in ("avx512-vnni", "avx2") or (isa == "amx" and tokens < AMX_FROM)
    return mode == "fast" and int8 and kind.startswith(("fp4", "int4", "int8"))


def rounds_to_bf16(kind: str, isa: str, mode: str, tokens: int = 1) -> bool:
    """Whether weights and activations are rounded to bf16."""
    wide = isa.startswith(("amx", "avx512"))
    return mode == "fast" and wide and not rounds_to_int8(kind, isa, mode, tokens)


def multiplied(x: Tensor, kind: str, isa: str, mode: str) -> Tensor:
    """What the kernels multiply a matrix of that kind with, for activations x, but for rounding to bf16."""
    return fake_quant_int8(x) if rounds_to_int8(kind, isa, mode, len(x)) else x


def bound(weight: Tensor | QuantizedTensor) -> native.Matrix:
    return bind_native(weight, library(), "fast").matrix
