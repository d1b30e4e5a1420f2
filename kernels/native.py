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

import torch
from torch import Tensor

from localmoe.kernels.digest import SOURCES, source_digest
from localmoe.kernels.native_attention import AttentionCalls
from localmoe.kernels.native_layers import (
    MODES,
    LatentLayer,
    LatentLayers,
    LayerCalls,
    Mode,
    MoeLayer,
    Routing,
    Scoring,
)
from localmoe.kernels.native_rounding import RoundingCalls
from localmoe.kernels.native_types import (
    MAX_STREAMS,
    Experts,
    Fields,
    HyperSite,
    Matrix,
    SlotTable,
    check_memory,
    check_status,
    float32,
    matrix,
    packed_fields,
    plain_fields,
    plain_matrix,
)

__all__ = [
    "MAX_STREAMS",
    "Experts",
    "Fields",
    "HyperSite",
    "LatentLayer",
    "LatentLayers",
    "Library",
    "Matrix",
    "Mode",
    "MoeLayer",
    "Routing",
    "Scoring",
    "SlotTable",
    "load",
    "matrix",
    "packed_fields",
    "plain_fields",
    "plain_matrix",
]

ABI = 13
MAX_THREADS = 256
_HERE = Path(__file__).parent


class Library(LayerCalls, AttentionCalls, RoundingCalls):
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
        self._lib.lm_decode.argtypes = (ctypes.POINTER(Matrix), pointer)
        self._lib.lm_compare.argtypes = (pointer, pointer, int64, int64, pointer)
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
        self._lib.lm_latent_attend.argtypes = (pointer, pointer, int32, *(int64,) * 4, ctypes.c_float, pointer)
        self._lib.lm_read.argtypes = (pointer, int64)
        self._lib.lm_read.restype = ctypes.c_uint64
        self._declare_layers()
        self._declare_attention()
        self._declare_rounding()

    @property
    def source_digest(self) -> str:
        return self._text("lm_source_digest")

    @property
    def isa(self) -> str:
        """The instruction set in use: amx, avx512-vnni, avx512-bf16, avx2 or portable."""
        return self._text("lm_isa")

    @property
    def isas(self) -> list[str]:
        """Every instruction set this machine can run, best first."""
        return self._text("lm_isas").split()

    @property
    def rounds_to_bf16(self) -> bool:
        """Whether the instruction set in use multiplies bf16, so that fast mode computes with it."""
        return self.isa not in ("avx2", "portable")

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
        x = float32(x, count, w.cols) if groups == 1 and x.dim() == 2 else float32(x, count, groups, w.cols)
        y = x.new_empty((count, w.rows))
        self._check(self._lib.lm_linear(w, groups, x.data_ptr(), count, y.data_ptr(), MODES[mode]))
        return y

    def decode(self, w: Matrix, out: Tensor | None = None) -> Tensor:
        """The numbers that a matrix stands for: [rows, cols] float32, those of dequantize(). out: where to put them."""
        out = torch.empty((w.rows, w.cols)) if out is None else out
        check_memory(out, w.rows * w.cols, itemsize=4)
        self._check(self._lib.lm_decode(w, out.data_ptr()))
        return out

    def compare(self, a: Tensor, b: Tensor) -> tuple[float, float, float, float]:
        """Of two matrices [rows, cols] float32 the sums of a * a, b * b, a * b and (a - b) squared, in float64."""
        rows, cols = a.shape
        a, b = float32(a, rows, cols), float32(b, rows, cols)
        sums = torch.empty((rows, 4), dtype=torch.float64)
        self._check(self._lib.lm_compare(a.data_ptr(), b.data_ptr(), rows, cols, sums.data_ptr()))
        aa, bb, ab, off = sums.sum(0).tolist()
        return aa, bb, ab, off

    def experts(
        self,
        table: Experts | SlotTable,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        mode: Mode = "fast",
        out: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of each token's experts; see reference.experts.

        x [T, D] float32, ids [T, K] int64, weights [T, K] float32 -> [T, D] float32. Pairs with the id -1 are left
        out. out: [T, D], to add to; calls for ascending ranges of ids add up to the same bits as one call for all.
        Raises ValueError for ids outside the table or experts of different shapes."""
        count, top_k = ids.shape
        x, weights, ids = float32(x, count, table.width), float32(weights, count, top_k), ids.contiguous()
        if ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise ValueError(f"int64 expert ids expected, found {ids.dtype}")
        y = torch.zeros_like(x) if out is None else out
        check_memory(y, count * table.width, itemsize=4)
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
                MODES[mode],
            )
        )
        return y

    def hyper_enter(self, site: HyperSite, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the streams [T, S, D] float32 to the normed input [T, D] of a sublayer, and post [T, S] and comb
        [T, S, S] for hyper_leave. Equals reference.hyper_mix, hyper_collapse and rms_norm."""
        count, s, d = streams.shape[0], site.streams, site.width
        streams = float32(streams, count, s, d)
        x, post, comb = (streams.new_empty(shape) for shape in ((count, d), (count, s), (count, s, s)))
        self._check(
            self._lib.lm_hyper_enter(site, streams.data_ptr(), count, x.data_ptr(), post.data_ptr(), comb.data_ptr())
        )
        return x, post, comb

    def hyper_leave(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """The sublayer's output y [T, D] back into the streams [T, S, D], all float32; see reference.hyper_expand."""
        count, s, d = streams.shape
        streams, y = float32(streams, count, s, d), float32(y.float(), count, d)
        post, comb = float32(post, count, s), float32(comb, count, s, s)
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
        x, cos, sin = float32(x, *x.shape), float32(cos, count, pairs), float32(sin, count, pairs)
        weight = None if weight is None else float32(weight, width)
        y = torch.empty_like(x)
        heads = x.numel() // max(count * width, 1)
        pointers = x.data_ptr(), None if weight is None else weight.data_ptr(), -1.0 if eps is None else eps
        self._check(
            self._lib.lm_norm_rope(
                *pointers, cos.data_ptr(), sin.data_ptr(), count, max(heads, 1), width, pairs, y.data_ptr()
            )
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """See reference.rms_norm. x: [..., D] float32; weight: [D] float32 or None."""
        width = x.shape[-1]
        x = float32(x, *x.shape)
        weight = None if weight is None else float32(weight, width)
        y = torch.empty_like(x)
        pointers = x.data_ptr(), None if weight is None else weight.data_ptr(), eps, None, None
        self._check(self._lib.lm_norm_rope(*pointers, x.numel() // width, 1, width, 0, y.data_ptr()))
        return y

    def attend(self, q: Tensor, window: Tensor, entries: Tensor, bias: Tensor | None, sink: Tensor) -> Tensor:
        """reference.sparse_attention for one query that sees all of its window.

        q: [H, c]; window: [m, c]; entries: [E, c]; bias: [E] or None; sink: [H]; all float32. Returns [H, c]."""
        heads, width = q.shape
        q, sink = float32(q, heads, width), float32(sink, heads)
        window, entries = float32(window, window.shape[0], width), float32(entries, entries.shape[0], width)
        bias = None if bias is None else float32(bias, entries.shape[0])
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

    def latent_attend(self, q: Tensor, cache: Tensor, *, width: int, scale: float) -> Tensor:
        """reference.latent_attention for one query that sees all.

        q: [H, c] float32; cache: [S, c] float32 or bfloat16. Returns [H, width] float32."""
        (heads, cols), rows = q.shape, cache.shape[0]
        q = float32(q, heads, cols)
        check_memory(cache, rows * cols)
        out = q.new_empty((heads, width))
        format = plain_fields((rows, cols), cache.dtype)[2]
        pointers = q.data_ptr(), cache.data_ptr()
        self._check(self._lib.lm_latent_attend(*pointers, format, rows, heads, cols, width, scale, out.data_ptr()))
        return out

    def read(self, data: Tensor) -> int:
        """A checksum of a contiguous tensor's bytes, read once by all threads: the pace of memory."""
        check_memory(data, data.numel())
        return int(self._lib.lm_read(data.data_ptr(), data.nbytes))

    def _text(self, name: str) -> str:
        return str(getattr(self._lib, name)().decode())

    _check = staticmethod(check_status)


@functools.cache
def load() -> Library | str:
    """The library, or why there is none, in words that follow "no compiled kernels: "."""
    problem = ""
    # Beside this file, or, in a checkout, what the last pip install put into this environment.
    for folder in (_HERE, Path(sysconfig.get_path("platlib")) / "localmoe" / "kernels"):
        for path in sorted(folder.glob("_cpu*.so")):
            try:
                library = Library(path)
            except OSError as error:
                problem = problem or str(error)
                continue
            if SOURCES.is_dir() and library.source_digest != source_digest():
                problem = problem or f"{path} is older than its sources; run pip install . again"
                continue
            return library
    return problem or "they were not built when localmoe was installed (no C++ compiler?)"
