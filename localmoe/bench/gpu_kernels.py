"""A GPU's kernels against what the GPU can do: copying its memory, and torch's bf16 product. What does the same, ours,
bitsandbytes' and torch's, is timed in turn in one loop.

A time is that of one call among several without a wait between them, with launching it. Knows kernels and what they are
timed on; does not know models. Memory, on the GPU: one bank at a time."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.bench import hardware
from localmoe.bench.bank import bank_size, expert_bytes, matrix_bytes, pool_size
from localmoe.bench.gpu_bank import Attention, attentions, dense_shapes, expert_table, rotated
from localmoe.bench.kernels import MAX_DECODE, Selection
from localmoe.bench.measure import Spread, circumstances, interleaved
from localmoe.bench.report import Column, Record, number, text
from localmoe.bench.shapes import EXPERT_SHAPES, ExpertShape
from localmoe.device_ops import DeviceOps
from localmoe.kernels.bits_and_bytes import BitsAndBytes, takes

Report = Callable[[str], None]
Works = dict[str, Callable[[], object]]
# Calls between two waits, when there are few tokens.
_CALLS = 16
# Attention to a long context of more queries would need gigabytes for parts of results.
MAX_QUERIES = 64
_BUDGET_S = 2.0


@dataclass(frozen=True)
class Limits:
    """Of the GPU: bytes per second that it copies, read and written, and operations per second of a bf16 product."""

    copy: float
    product: float

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """Measured now."""
        return cls(hardware.copy_rate(device), hardware.product_rate(device))


def run(device: torch.device, ops: DeviceOps, what: Selection, repetitions: int, report: Report) -> Iterator[Record]:
    """Measure every shape: its attention, then in every format its experts and dense matrices. Yields a record for each
    kernel and number of tokens."""
    report("copying and multiplying")
    bench = _Bench(device, ops, Limits.of(device), repetitions)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    common = {"device": str(device), "gpu": name} | circumstances(None)
    for shape in what.shapes:
        for attention in attentions(shape):
            report(f"{shape}: {attention.kind} attention")
            for row in bench.attention(attention, [count for count in what.tokens if count <= MAX_QUERIES]):
                yield {"shape": shape, "format": "bf16"} | row | common
        for format in what.formats:
            report(f"{shape} {format}: experts")
            for row in bench.experts(EXPERT_SHAPES[shape], format, what.tokens):
                yield {"shape": shape, "format": format} | row | common
            for op, sizes in dense_shapes(shape).items():
                report(f"{shape} {format}: {op}")
                for row in bench.linear(op, format, sizes, what.tokens):
                    yield {"shape": shape, "format": format} | row | common


@dataclass(frozen=True)
class _Bench:
    """Measures on one device."""

    device: torch.device
    ops: DeviceOps
    limits: Limits
    repetitions: int

    def experts(self, shape: ExpertShape, format: str, tokens: Sequence[int]) -> Iterator[Record]:
        """Few tokens choose the same experts, the next ones in every call; many choose each for itself."""
        count = bank_size(shape, format)
        table = expert_table(shape, format, count, self.device)
        starts = range(0, count - shape.top_k + 1, shape.top_k)
        choice = itertools.cycle([torch.arange(at, at + shape.top_k, device=self.device) for at in starts])
        generator = torch.Generator().manual_seed(2)
        for number_ in tokens:
            x, weights = self._inputs(number_, shape.hidden_size), self._weights(number_, shape.top_k)
            if number_ <= MAX_DECODE:
                used = shape.top_k

                def call(x: Tensor = x, weights: Tensor = weights) -> Tensor:
                    return self.ops.experts(table, x, next(choice).expand(len(x), -1), weights)
            else:
                chances = torch.rand(number_, pool_size(shape), generator=generator)
                ids = chances.argsort(1)[:, : shape.top_k].contiguous().to(self.device)
                used = len(ids.unique())
                call = partial(self.ops.experts, table, x, ids, weights)
            operations = 2 * number_ * shape.num_weights * shape.top_k
            yield from self._rows("experts", number_, {"triton": call}, used * expert_bytes(shape, format), operations)

    def linear(self, op: str, format: str, sizes: tuple[int, int], tokens: Sequence[int]) -> Iterator[Record]:
        """Every call takes the next of several matrices of that shape."""
        ours, plain = rotated(format, sizes, self.device), rotated("bf16", sizes, self.device)
        other = BitsAndBytes() if takes(ours[0]) and importlib.util.find_spec("bitsandbytes") else None
        for count in tokens:
            x = self._inputs(count, sizes[1])
            turn, plain_turn = itertools.cycle(ours), itertools.cycle(plain)
            short = x.bfloat16()

            def triton(x: Tensor = x, turn: Iterator[object] = turn) -> Tensor:
                return self.ops.linear(x, next(turn))  # type: ignore[arg-type]

            def torch_(x: Tensor = short, turn: Iterator[object] = plain_turn) -> Tensor:
                return F.linear(x, next(turn).data)  # type: ignore[attr-defined]

            works: Works = {"triton": triton}
            if other is not None:
                works["bitsandbytes"] = lambda x=x, turn=turn, other=other: other.linear(x, next(turn))  # type: ignore[misc]
            works["torch bf16"] = torch_
            operations = 2 * count * sizes[0] * sizes[1]
            yield from self._rows(op, count, works, sum(matrix_bytes(format, *sizes)), operations, sizes)

    def attention(self, what: Attention, tokens: Sequence[int]) -> Iterator[Record]:
        """After CONTEXT tokens, in bfloat16."""
        shared = self._inputs(what.entries, what.row).bfloat16()
        for count in tokens:
            q = self._inputs(count * what.heads, what.row).bfloat16().view(count, what.heads, what.row)
            call: Callable[[], object]
            if what.kind == "latent":
                call = partial(self.ops.latent_attention, q, shared, None, width=what.width, scale=what.row**-0.5)
            elif what.kind == "index":
                call = partial(self.ops.index_scores, q, shared, self._inputs(count, what.heads))
            else:
                entries = shared
                if what.kind == "csa":
                    rows = self._inputs(count * what.entries, what.row).bfloat16()
                    entries = rows.view(count, what.entries, what.row)
                window, sink = self._inputs(what.window, what.row).bfloat16(), self._inputs(1, what.heads)[0]
                call = partial(self.ops.sparse_attention, q, window, None, entries, None, sink)
            yield from self._rows(f"{what.kind} attention", count, {"triton": call}, *what.work(count))

    def _rows(
        self, op: str, tokens: int, works: Works, nbytes: int, operations: int, sizes: tuple[int, int] | None = None
    ) -> Iterator[Record]:
        calls = _CALLS if tokens <= MAX_DECODE else 1
        timed = {by: partial(self._several, work, calls) for by, work in works.items()}
        times = interleaved(timed, repetitions=self.repetitions, budget_s=_BUDGET_S)
        for by, spread in times.items():
            each = Spread(tuple(seconds / calls for seconds in spread.samples))
            took = each.median
            # Torch multiplies what has been unpacked.
            read = 2 * sizes[0] * sizes[1] if by == "torch bf16" and sizes is not None else nbytes
            yield {
                "op": op,
                "by": by,
                "rows": sizes and sizes[0],
                "cols": sizes and sizes[1],
                "tokens": tokens,
                "seconds": took,
                "bytes": read,
                "bytes_per_s": read / took,
                "copy_bytes_per_s": self.limits.copy,
                "percent_of_copy": 100 * read / took / self.limits.copy,
                "flops_per_s": operations / took,
                "product_flops_per_s": self.limits.product,
                "percent_of_product": 100 * operations / took / self.limits.product,
                "times_triton": times["triton"].median / spread.median,
                "samples_seconds": list(each.samples),
            }

    def _several(self, work: Callable[[], object], calls: int) -> None:
        hardware.finished(lambda: [work() for _ in range(calls)], self.device)

    def _inputs(self, count: int, width: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(count)
        return torch.randn(count, width, generator=generator, device=self.device)

    def _weights(self, count: int, top_k: int) -> Tensor:
        return torch.full((count, top_k), 1 / top_k, device=self.device)


def _scaled(key: str, by: float, spec: str) -> Callable[[Record], str]:
    return lambda record: format(record[key] * by, spec)


def _size(record: Record) -> str:
    return "" if record["rows"] is None else f"{record['rows']} x {record['cols']}"


COLUMNS = (
    Column("shape", text("shape"), 8, "left"),
    Column("format", text("format"), 9, "left"),
    Column("op", text("op"), 16, "left"),
    Column("matrix", _size, 14, "left"),
    Column("kernel", text("by"), 12, "left"),
    Column("M", text("tokens"), 4),
    Column("ms", _scaled("seconds", 1e3, ",.4f"), 9),
    Column("GB/s", _scaled("bytes_per_s", 1e-9, ",.1f"), 8),
    Column("% of copy", number("percent_of_copy"), 9),
    Column("TFLOP/s", _scaled("flops_per_s", 1e-12, ",.2f"), 8),
    Column("% of product", number("percent_of_product"), 12),
    Column("x ours", number("times_triton", ".2f"), 6),
)
