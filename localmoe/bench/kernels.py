"""The MoE kernel against the two limits of the machine: reading memory, for few tokens, and torch's bf16 product, for
many. All are timed in turn in one loop.

Knows the compiled library and banks of experts; does not know models or checkpoints. Memory: one bank at a time, and
four experts in bf16 for torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from localmoe.bench.bank import TORCH_EXPERTS, Bank, TorchExperts, bank_size, expert_bytes, matrix_bytes, pool_size
from localmoe.bench.measure import MemoryReader, Spread, circumstances, interleaved, use_threads
from localmoe.bench.report import Column, Record, number, text
from localmoe.bench.shapes import EXPERT_SHAPES
from localmoe.device import available_memory
from localmoe.errors import ResourceError
from localmoe.kernels.native import Library, Mode

Report = Callable[[str], None]
Works = dict[str, Callable[[], object]]
# Up to so many tokens, all of them choose the same experts, and reading those is the limit.
MAX_DECODE = 8
LINEAR_TOKENS = 512
_MODES: tuple[Mode, ...] = ("fast", "strict")
# After so many seconds a part ends with the repetitions it has.
_BUDGET_S = 2.0
_HEADROOM = 1 << 30


@dataclass(frozen=True)
class Selection:
    """What to measure: every format in every shape, with each number of tokens."""

    shapes: Sequence[str]
    formats: Sequence[str]
    tokens: Sequence[int]


def run(library: Library, what: Selection, repetitions: int, report: Report) -> Iterator[Record]:
    """Measure every combination; yields a record per shape, format, number of tokens and mode.

    Raises ResourceError, before anything is measured, for a bank that does not fit."""
    combinations = list(itertools.product(what.shapes, what.formats))
    for shape, format in combinations:
        check_fits(shape, format)
    # The comparison with torch is one of kernels, not of threads.
    use_threads(library.threads, library)
    common = circumstances(library)
    for shape, format in combinations:
        for row in _measure(library, (shape, format), what.tokens, repetitions, report):
            yield {"shape": shape, "format": format} | row | common


def _measure(
    library: Library, of: tuple[str, str], tokens: Sequence[int], repetitions: int, report: Report
) -> Iterator[Record]:
    """One shape and format. A function of its own, so that its bank is gone before the next is made."""
    shape, format = EXPERT_SHAPES[of[0]], of[1]
    report(f"{of[0]} {format}: filling memory")
    session = _Session(library, Bank(shape, format, bank_size(shape, format)), repetitions)
    for name, part in session.parts(tokens):
        report(f"{of[0]} {format}: {name}")
        yield from part()


def check_fits(shape: str, format: str) -> None:
    """Raises ResourceError if the experts of one shape and format are more than the memory available."""
    have, sizes = available_memory(), EXPERT_SHAPES[shape]
    need = bank_size(sizes, format) * expert_bytes(sizes, format) + TORCH_EXPERTS * expert_bytes(sizes, "bf16")
    need += _HEADROOM
    if have is not None and need > have:
        raise ResourceError(
            f"{shape} in {format} needs {need / 2**30:.1f} GiB of RAM and {have / 2**30:.1f} GiB are available; "
            "leave it out with --shapes or --formats"
        )


@dataclass
class _Session:
    """Measures one bank."""

    library: Library
    bank: Bank
    repetitions: int
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(2))

    def parts(self, tokens: Sequence[int]) -> Iterator[tuple[str, Callable[[], list[Record]]]]:
        """What to measure, by name: all small numbers of tokens together, then each large one, then one matrix."""
        small = [count for count in tokens if count <= MAX_DECODE]
        if small:
            yield f"{', '.join(map(str, small))} tokens", partial(self.decode, small)
        for count in tokens:
            if count > MAX_DECODE:
                yield f"{count} tokens", partial(self.prefill, count)
        if LINEAR_TOKENS in tokens:
            yield f"one matrix, {LINEAR_TOKENS} tokens", self.linear

    def decode(self, counts: Sequence[int]) -> list[Record]:
        """Every call takes the next experts, the same for all of its tokens; in turn with a read of as many bytes."""
        reader = MemoryReader(self.library)
        works: Works = {"read": lambda: reader.read(self.bank.pieces[i] for i in self.bank.rotate())}
        for count, mode in itertools.product(counts, _MODES):
            works[f"{count} {mode}"] = partial(self._decode_next, self._inputs(count), mode)
        times = self._time(works)
        nbytes = self.bank.shape.top_k * expert_bytes(self.bank.shape, self.bank.format)
        pace = nbytes / times["read"].median
        rows = []
        for count, mode in itertools.product(counts, _MODES):
            row = self._row("experts", mode, count, times[f"{count} {mode}"], nbytes)
            row |= {"read_bytes_per_s": pace, "percent_of_read": 100 * row["bytes_per_s"] / pace}
            if 1 in counts:
                row["times_one_token"] = row["seconds"] / times[f"1 {mode}"].median
            rows.append(row)
        return rows

    def prefill(self, count: int) -> list[Record]:
        """Every token chooses for itself; torch multiplies as many rows by as many experts."""
        shape = self.bank.shape
        chances = torch.rand(count, pool_size(shape), generator=self.generator)
        ids = chances.argsort(1)[:, : shape.top_k].contiguous()
        rows_of = [rows for rows in torch.bincount(ids.flatten()).tolist() if rows]
        x, other = self._inputs(count), TorchExperts(shape, max(rows_of))
        works: Works = {mode: partial(self._call, x, ids, mode) for mode in _MODES}
        times = self._time(works | {"torch": partial(other.run, rows_of)})
        nbytes = len(rows_of) * expert_bytes(shape, self.bank.format)
        return [self._against_torch("experts", mode, count, times, nbytes) for mode in _MODES]

    def linear(self) -> list[Record]:
        """w1 of one expert after the other on all tokens, against torch's F.linear in bf16."""
        shape, x = self.bank.shape, self._inputs(LINEAR_TOKENS)
        matrices, other = itertools.cycle(expert[0] for expert in self.bank.matrices), TorchExperts(shape, len(x))

        def call(mode: Mode) -> None:
            self.library.linear(x, next(matrices), mode=mode)

        works: Works = {mode: partial(call, mode) for mode in _MODES}
        times = self._time(works | {"torch": other.linear})
        nbytes = sum(matrix_bytes(self.bank.format, *shape.matrices[0]))
        return [self._against_torch("linear", mode, len(x), times, nbytes) for mode in _MODES]

    def _time(self, works: Works) -> dict[str, Spread]:
        return interleaved(works, repetitions=self.repetitions, budget_s=_BUDGET_S)

    def _inputs(self, count: int) -> Tensor:
        return torch.randn(count, self.bank.shape.hidden_size, generator=self.generator)

    def _call(self, x: Tensor, ids: Tensor, mode: Mode) -> None:
        self.library.experts(self.bank.table, x, ids, torch.full(ids.shape, 1 / ids.shape[1]), mode=mode)

    def _decode_next(self, x: Tensor, mode: Mode) -> None:
        self._call(x, torch.tensor([self.bank.rotate()]).expand(len(x), -1), mode)

    def _against_torch(self, op: str, mode: Mode, count: int, times: Mapping[str, Spread], nbytes: int) -> Record:
        row = self._row(op, mode, count, times[mode], nbytes)
        ratio = times["torch"].median / row["seconds"]
        return row | {"torch_flops_per_s": row["flops_per_s"] / ratio, "times_torch": ratio}

    def _row(self, op: str, mode: Mode, count: int, seconds: Spread, nbytes: int) -> Record:
        """All fields of a record; those that do not apply are None. weight_bytes: of all experts that were chosen."""
        shape, took = self.bank.shape, seconds.median
        weights = shape.num_weights * shape.top_k if op == "experts" else shape.hidden_size * shape.width
        return {
            "op": op,
            "mode": mode,
            "tokens": count,
            "seconds": took,
            "weight_bytes": nbytes,
            "bytes_per_s": nbytes / took,
            "read_bytes_per_s": None,
            "percent_of_read": None,
            "times_one_token": None,
            "flops_per_s": 2 * count * weights / took,
            "torch_flops_per_s": None,
            "times_torch": None,
            "samples_seconds": list(seconds.samples),
        }


def _scaled(key: str, by: float, spec: str = ",.1f") -> Callable[[Record], str]:
    return lambda record: "-" if record[key] is None else format(record[key] * by, spec)


COLUMNS = (
    Column("shape", text("shape"), 8, "left"),
    Column("format", text("format"), 9, "left"),
    Column("op", text("op"), 7, "left"),
    Column("mode", text("mode"), 6, "left"),
    Column("M", text("tokens"), 4),
    Column("ms", _scaled("seconds", 1e3, ",.3f"), 9),
    Column("GB/s", _scaled("bytes_per_s", 1e-9), 6),
    Column("read GB/s", _scaled("read_bytes_per_s", 1e-9), 9),
    Column("% of read", number("percent_of_read"), 9),
    Column("x M=1", number("times_one_token", ".2f"), 6),
    Column("GFLOP/s", _scaled("flops_per_s", 1e-9, ",.0f"), 8),
    Column("torch GFLOP/s", _scaled("torch_flops_per_s", 1e-9, ",.0f"), 13),
    Column("x torch", number("times_torch", ".2f"), 7),
)
