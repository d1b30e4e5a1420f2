"""How matrices are spelled in checkpoints: names, dtypes and shapes of the tensors that each format is stored as.

DeepSeek's own (FP8, FP4), compressed-tensors' pack-quantized (int8, int4), bitsandbytes' nf4, and for codebooks our
own. Knows headers and formats; reads no tensors, and knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localmoe.errors import FormatError
from localmoe.files import shown
from localmoe.formats import FORMATS, Book, Int, Nf4, QuantizedTensor, WeightFormat, format_of
from localmoe.kernels.codecs import NF4_BLOCK, NF4_LEVELS
from localmoe.safetensors_io import TensorRef

# Dtype and shape, as a safetensors header has them.
Spec = tuple[str, tuple[int, ...]]
PLAIN = ("BF16", "F16", "F32")
_NF4_STATE = "quant_state.bitsandbytes__nf4"
_BOOKS = {f"_{fmt.name}": fmt for fmt in FORMATS.values() if isinstance(fmt, Book)}


class Mismatch(Exception):
    """A tensor that cannot be used, in words that follow its name."""


@dataclass(frozen=True)
class Source:
    """One tensor's place in the checkpoint. Quantized ones have a format and the scale's place; others have neither.

    The ref's dtype and shape are those of the format, whatever its file calls them. parts: names of all that it is
    stored as."""

    ref: TensorRef
    parts: tuple[str, ...]
    format: WeightFormat | None = None
    scale: TensorRef | None = None

    @property
    def nbytes(self) -> int:
        return self.ref.nbytes + (self.scale.nbytes if self.scale else 0)


def specs_of(name: str, shape: tuple[int, int], format: str) -> dict[str, Spec]:
    """The tensors that a matrix of that published name is stored as. Raises FormatError if the format has no room."""
    fmt = FORMATS[format]
    rows, data, scale = shape[0], fmt.data_shape(*shape), fmt.scale_shape(*shape)
    if isinstance(fmt, Int):
        return {
            f"{name}_packed": ("I32", (rows, data[1] // 4)),
            f"{name}_scale": ("BF16", scale),
            f"{name}_shape": ("I64", (2,)),
        }
    if isinstance(fmt, Nf4):
        return {
            name: ("U8", (rows * data[1], 1)),
            f"{name}.absmax": ("F32", (rows * scale[1],)),
            f"{name}.quant_map": ("F32", (16,)),
            f"{name}.{_NF4_STATE}": ("U8", (len(_nf4_state(shape)),)),
        }
    if isinstance(fmt, Book):
        return {f"{name}_{fmt.name}": ("U8", data), f"{name}_marks": ("U8", scale)}
    return {name: (fmt.data_dtype, data), _scale_name(name): (fmt.scale_dtypes[0], scale)}


def tensors_of(name: str, packed: QuantizedTensor) -> dict[str, Tensor]:
    """What is stored under the names of specs_of, in their order."""
    found = [packed.data, packed.scale]
    if isinstance(packed.format, Int):
        found.append(torch.tensor(packed.shape))
    if isinstance(packed.format, Nf4):
        state = torch.frombuffer(bytearray(_nf4_state(packed.shape)), dtype=torch.uint8)
        found += [NF4_LEVELS, state]
    return dict(zip(specs_of(name, packed.shape, packed.format.name), found, strict=True))


def _nf4_state(shape: tuple[int, int]) -> bytes:
    """Source: bitsandbytes, QuantState.as_dict(packed=True). Of whole words, so that what follows it stays aligned."""
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": list(shape)}
    found = json.dumps(state).encode()
    return found.ljust(-(-len(found) // 8) * 8)


def _scale_name(name: str) -> str:
    return f"{name.removesuffix('.weight')}.scale"


def find_packed(name: str, shape: tuple[int, int], refs: Mapping[str, TensorRef], used: set[str]) -> Source | None:
    """A matrix whose bytes lie under other names than its own, None if there is none; what it uses is added to `used`.

    Raises Mismatch if it cannot be used."""
    if f"{name}_packed" in refs:
        return _integers(name, shape, refs, used)
    suffix = next((suffix for suffix in _BOOKS if f"{name}{suffix}" in refs), None)
    if suffix is None:
        return None
    fmt, ref, marks = _BOOKS[suffix], refs[f"{name}{suffix}"], refs.get(f"{name}_marks")
    used.update({f"{name}{suffix}", f"{name}_marks"})
    if marks is None:
        raise Mismatch(f"has codes and no marks, expected {name}_marks beside them")
    data_shape, scale_shape = _shapes(fmt, shape)
    check(ref, data_shape, (fmt.data_dtype,))
    check(marks, scale_shape, fmt.scale_dtypes)
    return Source(ref, (f"{name}{suffix}", f"{name}_marks"), fmt, marks)


def find_quantized(name: str, shape: tuple[int, int], refs: Mapping[str, TensorRef], used: set[str]) -> Source:
    """A matrix under its own name whose dtype is none of PLAIN. Raises Mismatch if it cannot be used."""
    ref = refs[name]
    return _nf4(name, shape, refs, used) if ref.dtype == "U8" else _published(name, shape, refs, used)


def _published(name: str, shape: tuple[int, int], refs: Mapping[str, TensorRef], used: set[str]) -> Source:
    """The format is told by the weight's dtype alone; the scale lies beside it under DeepSeek's two names, or that
    of compressed-tensors."""
    ref = refs[name]
    fmt = format_of(ref.dtype)
    if fmt is None:
        raise Mismatch(f"is {ref.dtype}, expected one of {', '.join(PLAIN)}, F8_E4M3 or packed I8")
    found = [scale for scale in (_scale_name(name), f"{name}_scale_inv", f"{name}_scale") if scale in refs]
    used.update(found)
    data_shape, scale_shape = _shapes(fmt, shape)
    check(ref, data_shape, (fmt.data_dtype,))
    if len(found) != 1:
        raise Mismatch(f"is {ref.dtype} with {len(found) or 'no'} scales, expected one of {text(scale_shape)}")
    scale = refs[found[0]]
    try:
        check(scale, scale_shape, fmt.scale_dtypes)
    except Mismatch as problem:
        raise Mismatch(f"is {text(ref.shape)} {ref.dtype}; its scale {problem}") from None
    return Source(ref, (name, found[0]), fmt, scale)


def _integers(name: str, shape: tuple[int, int], refs: Mapping[str, TensorRef], used: set[str]) -> Source:
    """Integers as compressed-tensors packs them: unsigned, eight or four of them in a little-endian int32.

    Which they are is told by the shapes of the words and of the scales."""
    ref, scale = refs[f"{name}_packed"], refs.get(f"{name}_scale")
    parts = f"{name}_packed", f"{name}_scale", f"{name}_shape"
    used.update(parts)
    rows, cols = shape
    if scale is None or len(ref.shape) != 2 or len(scale.shape) != 2 or not ref.shape[1] or not scale.shape[1]:
        raise Mismatch(f"is {text(ref.shape)} {ref.dtype} without a matrix of scales beside it")
    if f"{name}_zero_point" in refs:
        raise Mismatch("has zero points, which are not implemented for packed integers")
    fmt = FORMATS.get(f"int{32 * ref.shape[1] // cols}_g{cols // scale.shape[1]}")
    if fmt is None:
        raise Mismatch(f"is packed as {text(ref.shape)} with scales {text(scale.shape)}, which is no format we know")
    data_shape, scale_shape = _shapes(fmt, shape)
    check(ref, (rows, data_shape[1] // 4), ("I32",))
    check(scale, scale_shape, fmt.scale_dtypes)
    return Source(replace(ref, dtype=fmt.data_dtype, shape=data_shape), parts, fmt, scale)


def _nf4(name: str, shape: tuple[int, int], refs: Mapping[str, TensorRef], used: set[str]) -> Source:
    """nf4 as bitsandbytes stores it, in one column."""
    ref, scale = refs[name], refs.get(f"{name}.absmax")
    parts = name, *(f"{name}.{part}" for part in ("absmax", "quant_map", _NF4_STATE))
    used.update(parts)
    if f"{name}.nested_absmax" in refs:
        raise Mismatch("is nf4 with double quantization, which is not implemented")
    if scale is None or f"{name}.{_NF4_STATE}" not in refs:
        raise Mismatch(f"is U8 without {name}.absmax and {name}.{_NF4_STATE}, so it is no nf4 of bitsandbytes")
    fmt = FORMATS["nf4"]
    data_shape, scale_shape = _shapes(fmt, shape)
    check(ref, (data_shape[0] * data_shape[1], 1), (fmt.data_dtype,))
    check(scale, (scale_shape[0] * scale_shape[1],), fmt.scale_dtypes)
    return Source(replace(ref, shape=data_shape), parts, fmt, replace(scale, shape=scale_shape))


def _shapes(fmt: WeightFormat, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    try:
        return fmt.data_shape(*shape), fmt.scale_shape(*shape)
    except FormatError as problem:
        raise Mismatch(str(problem)) from None


def check(ref: TensorRef, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Raises Mismatch for a tensor of another shape or dtype."""
    if ref.shape != shape or ref.dtype not in dtypes:
        file = shown(ref.file.name)
        raise Mismatch(f"is {text(ref.shape)} {ref.dtype} in {file}, expected {text(shape)} {' or '.join(dtypes)}")


def text(shape: tuple[int, ...]) -> str:
    """A shape for people."""
    return f"[{', '.join(map(str, shape))}]"
