"""The C++ kernels, loaded with ctypes: products with packed weights, and whole MoE layers, on all cores.

Knows tensors and their memory; does not know names, files or layers. The library is built when the package is
installed; where that was not possible, load() says why and callers use the torch twins in reference.py and codecs.py.
ctypes releases the GIL during every call."""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from localmoe.kernels.digest import SOURCES, source_digest

ABI = 4
MAX_STREAMS = 16
MAX_COLS = 1 << 18
MAX_THREADS = 256
Mode = Literal["strict", "fast"]
_MODES = {"strict": 0, "fast": 1}
_FORMATS = {"f32": 0, "bf16": 1, "fp8_block": 2, "fp4": 3, "int8": 4, "int4": 5}
_SCALES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4, torch.float8_e8m0fnu: 4}
_PLAIN = {torch.float32: "f32", torch.bfloat16: "bf16"}
_HERE = Path(__file__).parent


class Matrix(ctypes.Structure):
    """A weight as the library sees it; keeps the tensors it points into alive."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )
    tensors: tuple[Tensor | None, ...]


def matrix(
    format: str, shape: tuple[int, int], data: Tensor, scale: Tensor, *, zero: Tensor | None = None, group: int = 0
) -> Matrix:
    """A packed [rows, cols] weight for linear() and Experts; see localmoe_cpu.h for the formats.

    data, scale, zero: contiguous CPU tensors in the layout of the format. group: inputs per scale, if they can vary.
    Raises ValueError for tensors of another size."""
    rows, cols = shape
    columns, per = {"fp8_block": (cols, 128), "int8": (cols, group)}.get(format, (cols // 2, group))
    if per < 1 or (format != "fp8_block" and (per % 32 or cols % per)):
        raise ValueError(f"{cols} columns in groups of {group}")
    scales = (-(-rows // 128), -(-cols // 128)) if format == "fp8_block" else (rows, cols // per)
    _check_memory(data, rows * columns, itemsize=1)
    _check_memory(scale, scales[0] * scales[1])
    if zero is not None:
        _check_memory(zero, scales[0] * scales[1], itemsize=1)
    pointers = data.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    found = Matrix(*pointers, rows, cols, _FORMATS[format], _SCALES[scale.dtype], group)
    found.tensors = (data, scale, zero)
    return found


def plain_matrix(weight: Tensor) -> Matrix:
    """A [rows, cols] float32 or bfloat16 weight, contiguous."""
    rows, cols = weight.shape
    _check_memory(weight, rows * cols)
    found = Matrix(weight.data_ptr(), None, None, rows, cols, _FORMATS[_PLAIN[weight.dtype]])
    found.tensors = (weight,)
    return found


class HyperSite(ctypes.Structure):
    """A site of a hyper-connection as the library sees it; keeps the tensors it points into alive."""

    _fields_ = (
        ("fn", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("streams", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("iterations", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )
    tensors: tuple[Tensor | None, ...]

    @classmethod
    def of(
        cls, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, *, iterations: int, norm_eps: float, eps: float
    ) -> HyperSite | None:
        """fn [(2 + S) * S, S * D], base [(2 + S) * S], scale [3], norm [D]; see reference.hyper_mix.

        None if the library cannot compute it: not all float32, or more than MAX_STREAMS."""
        width = norm.numel()
        streams = fn.shape[1] // width
        parts = tuple(part.contiguous() for part in (fn, base, scale, norm))
        rows = (2 + streams) * streams
        sizes = (rows * streams * width, rows, 3, width)
        if any(part.dtype != torch.float32 or part.numel() != n for part, n in zip(parts, sizes, strict=True)):
            return None
        if streams > MAX_STREAMS or streams * width > MAX_COLS or iterations < 1:
            return None
        site = cls(*(part.data_ptr() for part in parts), streams, width, iterations, norm_eps, eps)
        site.tensors = parts
        return site


def _check_memory(tensor: Tensor, count: int, itemsize: int | None = None) -> None:
    """Raises ValueError unless these are `count` elements in one piece of RAM: the library believes every pointer."""
    fits = tensor.numel() == count and tensor.is_contiguous() and tensor.device.type == "cpu"
    if not fits or itemsize not in (None, tensor.dtype.itemsize):
        raise ValueError(f"{count} elements in one piece expected, found {tuple(tensor.shape)} of {tensor.dtype}")


def _float32(tensor: Tensor, *shape: int) -> Tensor:
    """The tensor in one piece. Raises ValueError unless it is float32, in RAM and of this shape."""
    if tensor.dtype != torch.float32 or tensor.shape != shape or tensor.device.type != "cpu":
        raise ValueError(f"float32 {shape} expected, found {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.contiguous()


class Library:
    """The loaded library. One call runs at a time, on all of its threads.

    Methods raise ValueError for tensors that do not fit: the C++ side would read or write beyond them."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if this is no library of ours, or one of another version."""
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        try:
            abi = self._lib.lm_abi()
        except AttributeError:
            raise OSError(f"{path} is not localmoe's kernel library") from None
        if abi != ABI:
            raise OSError(f"{path} has interface {abi}, expected {ABI}")
        pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        for name in ("lm_source_digest", "lm_isa", "lm_isas"):
            getattr(self._lib, name).restype = ctypes.c_char_p
        self._lib.lm_use_isa.argtypes = (ctypes.c_char_p,)
        self._lib.lm_set_threads.argtypes = (int32, pointer)
        self._lib.lm_linear.argtypes = (ctypes.POINTER(Matrix), int64, pointer, int64, pointer, int32)
        self._lib.lm_experts.argtypes = (
            pointer,
            int64,
            ctypes.c_float,
            pointer,
            int64,
            int64,
            pointer,
            pointer,
            int64,
            pointer,
            int32,
        )
        self._lib.lm_hyper_enter.argtypes = (ctypes.POINTER(HyperSite), pointer, int64, pointer, pointer, pointer)
        self._lib.lm_hyper_leave.argtypes = (int64, int64, pointer, pointer, pointer, pointer, int64, pointer)
        self._lib.lm_norm_rope.argtypes = (pointer, pointer, ctypes.c_float, *(pointer,) * 2, *(int64,) * 4, pointer)
        self._lib.lm_attend.argtypes = (
            *(pointer, pointer, int64, pointer, int64, pointer, pointer),
            *(int64, int64, ctypes.c_float, pointer),
        )
        self._lib.lm_read.argtypes = (pointer, int64)
        self._lib.lm_read.restype = ctypes.c_uint64

    @property
    def source_digest(self) -> str:
        return self._text("lm_source_digest")

    @property
    def isa(self) -> str:
        """The instruction set in use: avx512-bf16, avx2 or portable."""
        return self._text("lm_isa")

    @property
    def isas(self) -> list[str]:
        """Every instruction set this machine can run, best first."""
        return self._text("lm_isas").split()

    @property
    def threads(self) -> int:
        return int(self._lib.lm_threads())

    def use_isa(self, name: str) -> None:
        """Compute with another of `isas`. Raises ValueError for a name that is not one of them."""
        if self._lib.lm_use_isa(name.encode()):
            raise ValueError(f"instruction set {name} is not available here, only {', '.join(self.isas)}")

    def set_threads(self, count: int, cpus: Sequence[int] | None = None) -> None:
        """Share every call among `count` threads, the caller included; cpus: where each of the others stays.

        Raises ValueError if the system does not give that many."""
        places = None if cpus is None else (ctypes.c_int32 * len(cpus))(*cpus)
        if cpus is not None and len(cpus) != count - 1:
            raise ValueError(f"{len(cpus)} places for {count - 1} threads beside the caller")
        if not 1 <= count <= MAX_THREADS or self._lib.lm_set_threads(count, places):
            raise ValueError(f"cannot run {count} threads")

    def linear(self, x: Tensor, w: Matrix, *, groups: int = 1, mode: Mode = "fast") -> Tensor:
        """x [T, groups, cols] or, for one group, [T, cols], float32 -> [T, rows] float32.

        Row r of w meets the inputs of group r // (rows / groups)."""
        count = x.shape[0]  # not len(x), which costs a microsecond
        x = _float32(x, count, w.cols) if groups == 1 and x.dim() == 2 else _float32(x, count, groups, w.cols)
        y = x.new_empty((count, w.rows))
        self._check(self._lib.lm_linear(w, groups, x.data_ptr(), count, y.data_ptr(), _MODES[mode]))
        return y

    def experts(self, table: Experts, x: Tensor, ids: Tensor, weights: Tensor, *, mode: Mode = "fast") -> Tensor:
        """The weighted sum of each token's experts; see reference.experts.

        x [T, D] float32, ids [T, K] int64, weights [T, K] float32 -> [T, D] float32.
        Raises ValueError for ids outside the table or experts of different shapes."""
        count, top_k = ids.shape
        x, weights, ids = _float32(x, count, table.width), _float32(weights, count, top_k), ids.contiguous()
        if ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise ValueError(f"int64 expert ids expected, found {ids.dtype}")
        y = torch.empty_like(x)
        self._check(
            self._lib.lm_experts(
                table.address,
                len(table),
                table.limit,
                x.data_ptr(),
                count,
                table.width,
                ids.data_ptr(),
                weights.data_ptr(),
                top_k,
                y.data_ptr(),
                _MODES[mode],
            )
        )
        return y

    def hyper_enter(self, site: HyperSite, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the streams [T, S, D] float32 to the normed input [T, D] of a sublayer, and post [T, S] and comb
        [T, S, S] for hyper_leave. Equals reference.hyper_mix, hyper_collapse and rms_norm."""
        count, s, d = streams.shape[0], site.streams, site.width
        streams = _float32(streams, count, s, d)
        x, post, comb = (streams.new_empty(shape) for shape in ((count, d), (count, s), (count, s, s)))
        self._check(
            self._lib.lm_hyper_enter(site, streams.data_ptr(), count, x.data_ptr(), post.data_ptr(), comb.data_ptr())
        )
        return x, post, comb

    def hyper_leave(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """The sublayer's output y [T, D] back into the streams [T, S, D], all float32; see reference.hyper_expand."""
        count, s, d = streams.shape
        streams, y = _float32(streams, count, s, d), _float32(y.float(), count, d)
        post, comb = _float32(post, count, s), _float32(comb, count, s, s)
        out = torch.empty_like(streams)
        parts = [t.data_ptr() for t in (streams, y, post, comb)]
        self._check(self._lib.lm_hyper_leave(s, d, *parts, count, out.data_ptr()))
        return out

    def norm_rope(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """reference.rms_norm(x, weight, eps), left out where eps is None, then reference.rope(..., cos, sin).

        x: [T, ..., D] float32; cos, sin: [T, P] float32; weight: [D] float32 or None."""
        count, width, pairs = x.shape[0], x.shape[-1], cos.shape[1]
        x, cos, sin = _float32(x, *x.shape), _float32(cos, count, pairs), _float32(sin, count, pairs)
        weight = None if weight is None else _float32(weight, width)
        y = torch.empty_like(x)
        heads = x.numel() // max(count * width, 1)
        pointers = x.data_ptr(), None if weight is None else weight.data_ptr(), -1.0 if eps is None else eps
        self._check(
            self._lib.lm_norm_rope(
                *pointers, cos.data_ptr(), sin.data_ptr(), count, max(heads, 1), width, pairs, y.data_ptr()
            )
        )
        return y

    def attend(self, q: Tensor, window: Tensor, entries: Tensor, bias: Tensor | None, sink: Tensor) -> Tensor:
        """reference.sparse_attention for one query that sees all of its window.

        q: [H, c]; window: [m, c]; entries: [E, c]; bias: [E] or None; sink: [H]; all float32. Returns [H, c]."""
        heads, width = q.shape
        q, sink = _float32(q, heads, width), _float32(sink, heads)
        window, entries = _float32(window, window.shape[0], width), _float32(entries, entries.shape[0], width)
        bias = None if bias is None else _float32(bias, entries.shape[0])
        out = torch.empty_like(q)
        self._check(
            self._lib.lm_attend(
                q.data_ptr(),
                window.data_ptr(),
                window.shape[0],
                entries.data_ptr(),
                entries.shape[0],
                None if bias is None else bias.data_ptr(),
                sink.data_ptr(),
                heads,
                width,
                width**-0.5,
                out.data_ptr(),
            )
        )
        return out

    def read(self, data: Tensor) -> int:
        """A checksum of a contiguous tensor's bytes, read once by all threads: the pace of memory."""
        _check_memory(data, data.numel())
        return int(self._lib.lm_read(data.data_ptr(), data.nbytes))

    def _text(self, name: str) -> str:
        return str(getattr(self._lib, name)().decode())

    @staticmethod
    def _check(status: int) -> None:
        if status == 2:
            raise MemoryError
        if status:
            raise ValueError("weights or expert ids that do not fit together")


class Experts:
    """One layer's experts as a table the library reads: w1, w2, w3 of each; w1 and w3 [F, D], w2 [D, F]."""

    def __init__(self, experts: Sequence[tuple[Matrix, Matrix, Matrix]], limit: float) -> None:
        self.limit = limit
        # The library refuses chosen experts of another width.
        self.width: int = experts[0][0].cols
        self._table = (Matrix * (3 * len(experts)))(*(m for expert in experts for m in expert))
        self._keep = experts
        self.address = ctypes.addressof(self._table)

    def __len__(self) -> int:
        return len(self._keep)


@functools.cache
def load() -> Library | str:
    """The library, or why there is none, in words that follow "no compiled kernels: "."""
    problem = "they were not built when localmoe was installed (no C++ compiler?)"
    # Beside this file, or, in a checkout, what the last pip install put into this environment.
    for folder in (_HERE, Path(sysconfig.get_path("platlib")) / "localmoe" / "kernels"):
        for path in sorted(folder.glob("_cpu*.so")):
            try:
                library = Library(path)
            except OSError as error:
                problem = str(error)
                continue
            if SOURCES.is_dir() and library.source_digest != source_digest():
                problem = f"{path} is older than its sources; run pip install . again"
                continue
            return library
    return problem
