"""Whole-model speed in the conventions of llama-bench: pp512 reads a prompt, tg128 produces tokens, @ d4096 after as
much context. One warm-up, then every repetition starts from the same state and takes the same made-up tokens.

Knows engines, sessions and bytes; does not know the command line. Memory: the model and one session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.api import EMBEDDED
from localmoe.bench import synthetic
from localmoe.bench.measure import MemoryReader, Spread, circumstances, library_or_none, seconds_of
from localmoe.bench.report import Column, Record, number, significant, text
from localmoe.bench.synthetic import Source
from localmoe.engine import Engine, Session
from localmoe.errors import GenerationError, ModelError, UsageError
from localmoe.files import shown
from localmoe.loader import load_weights, read_config
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_names import tensor_inventory
from localmoe.scheduler import PREFILL_BUDGET

Report = Callable[[str], None]
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
# Bytes read for one sample of the pace of memory.
_READ_BYTES = 1 << 30
# Tokens decoded before the first repetition of a tg row.
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Test:
    """n_prompt tokens read or n_gen tokens produced (the other is 0), after depth tokens of context."""

    n_prompt: int
    n_gen: int
    depth: int

    @property
    def count(self) -> int:
        return self.n_prompt or self.n_gen

    @property
    def name(self) -> str:
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.depth}" if self.depth else name


def plan_tests(prompts: Sequence[int], generations: Sequence[int], depths: Sequence[int], limit: int) -> list[Test]:
    """Every test asked for, by depth; a size of 0 is left out. limit: the model's longest context.

    Raises UsageError if nothing is left, or something would not fit in the context."""
    tests = [
        test
        for depth in depths
        for test in (*(Test(p, 0, depth) for p in prompts), *(Test(0, n, depth) for n in generations))
        if test.count
    ]
    if not tests:
        raise UsageError("there is nothing to measure; give --prompt or --generate a size above 0")
    for test in tests:
        if test.depth + test.count > limit:
            raise UsageError(f"{test.name} needs a context of {test.depth + test.count} tokens, the model has {limit}")
    return tests


@dataclass(frozen=True)
class Subject:
    """A model to measure. pieces: the memory of its weights; bytes_per_token: what of it decoding one token reads."""

    name: str
    engine: Engine
    pieces: tuple[Tensor, ...]
    bytes_per_token: int

    @classmethod
    def of(cls, name: str, config: DeepseekV4Config, get: Callable[[str], Source]) -> Subject:
        """Bind a model from its weights by published name."""
        weights = {tensor: get(tensor) for tensor in tensor_inventory(config)}
        pieces = tuple(piece for weight in weights.values() for piece in _memory_of(weight))
        return cls(name, Engine(DeepseekV4(config, get)), pieces, bytes_per_token(config, weights))

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def directory_config(model: Path | None) -> DeepseekV4Config:
    """The config of a model directory; None is the embedded model. Raises ModelError."""
    path = model or EMBEDDED
    if not path.is_dir():
        raise ModelError(f"{shown(path)} is not a directory; expected one with config.json and safetensors files")
    return read_config(path)


def open_directory(model: Path | None, dtype: torch.dtype, report: Report) -> Subject:
    """Load a model directory. Raises ModelError or ResourceError."""
    name = "localmoe-mini" if model is None else shown(model.resolve().name)
    config, weights = load_weights(model or EMBEDDED, dtype, progress=_percent(f"loading {name}", report))
    return Subject.of(name, config, weights.get)


def open_synthetic(name: str, config: DeepseekV4Config, dtype: torch.dtype, report: Report) -> Subject:
    """Make up a model of a published shape; config: what synthetic.plan decided."""
    weights = synthetic.synthetic_weights(config, dtype, progress=_percent(f"filling {name}", report))
    label = f"{name} synthetic, {config.num_layers} layers, {config.num_experts} experts"
    return Subject.of(label, config, weights.__getitem__)


def _percent(doing: str, report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report(f"{doing}: {100 * done // total} %")


def _memory_of(weight: Source) -> tuple[Tensor, ...]:
    return (weight,) if isinstance(weight, Tensor) else (weight.data, weight.scale)


def bytes_per_token(config: DeepseekV4Config, weights: dict[str, Source]) -> int:
    """Bytes of weights that a decode step of one token must read: all but the experts that are not chosen, the other
    rows of the embedding and of the hash tables."""
    total = 0
    experts = 0
    for name, weight in weights.items():
        if ".ffn.experts." in name:
            experts += weight.nbytes
        elif name == "embed.weight" or name.endswith("tid2eid"):
            total += weight.nbytes // config.vocab_size
        else:
            total += weight.nbytes
    return total + experts * config.experts_per_token // config.num_experts


def trace(count: int, vocab_size: int) -> list[int]:
    """The same made-up token ids every time, so that two runs route to the same experts."""
    generator = torch.Generator().manual_seed(20_260_801)
    ids: list[int] = torch.randint(vocab_size, (count,), generator=generator).tolist()
    return ids


def run(subject: Subject, tests: Sequence[Test], repetitions: int, threads: int, report: Report) -> Iterator[Record]:
    """Measure each test; yields its record when it is done. Raises GenerationError for a model that gives NaN."""
    library = library_or_none()
    ids = trace(max(test.depth + test.count for test in tests), subject.engine.model.config.vocab_size)
    session, pace = subject.engine.new_session(), _Pace(subject.pieces, MemoryReader(library))
    for test in tests:
        _go_to(session, test.depth, ids, subject.engine, report)
        report(f"{test.name}: warming up")
        _work(subject.engine, session, test, ids, warming=True)
        samples: list[float] = []
        paces: list[float] = []
        for done in range(repetitions):
            report(f"{test.name}: {done + 1} of {repetitions}")
            session.rewind(test.depth)
            samples.append(seconds_of(partial(_work, subject.engine, session, test, ids)))
            if test.n_gen:
                paces.append(pace.sample())
        session.rewind(test.depth)
        yield _record(subject, test, Spread(tuple(samples)), paces) | circumstances(library, threads)


def _go_to(session: Session, depth: int, ids: list[int], engine: Engine, report: Report) -> None:
    """Bring the session to `depth` tokens and mark it there; what it has read of them already is kept."""
    if depth < session.length:
        session.rewind(0)
    while session.length < depth:
        report(f"reading {depth:,} tokens of context: {session.length:,}")
        _advance(engine, session, ids[session.length : min(session.length + PREFILL_BUDGET, depth)])
    session.mark()


def _work(engine: Engine, session: Session, test: Test, ids: list[int], *, warming: bool = False) -> None:
    """What a row times: a prompt in the chunks the scheduler makes, or single tokens."""
    size = PREFILL_BUDGET if test.n_prompt else 1
    stop = test.depth + (min(test.count, _WARM_UP_TOKENS) if warming and test.n_gen else test.count)
    for start in range(test.depth, stop, size):
        _advance(engine, session, ids[start : min(start + size, stop)])


def _advance(engine: Engine, session: Session, chunk: list[int]) -> None:
    faults = engine.advance([(session, chunk)]).faults
    if faults:
        raise GenerationError(f"the model's numbers are not finite ({faults[0]}), so its speed means nothing")


class _Pace:
    """How fast the model's own weights can be read: another part of them for each sample."""

    def __init__(self, pieces: Sequence[Tensor], reader: MemoryReader) -> None:
        self._pieces, self._reader, self._at = pieces, reader, 0

    def sample(self) -> float:
        """Bytes per second of one pass over about _READ_BYTES, or over all weights if they are fewer."""
        chosen: list[Tensor] = []
        while len(chosen) < len(self._pieces) and sum(piece.nbytes for piece in chosen) < _READ_BYTES:
            chosen.append(self._pieces[self._at % len(self._pieces)])
            self._at += 1
        return self._reader.bytes_per_s(chosen)


def _record(subject: Subject, test: Test, seconds: Spread, paces: Sequence[float]) -> dict[str, Any]:
    rates = Spread(tuple(test.count / sample for sample in seconds.samples))
    pace = Spread(tuple(paces)).median if paces else None
    needed = subject.bytes_per_token if test.n_gen else None
    return {
        "model": subject.name,
        "fingerprint": subject.engine.fingerprint,
        "model_bytes": subject.nbytes,
        "dtype": str(subject.engine.model.dtype).removeprefix("torch."),
        "test": test.name,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "depth": test.depth,
        "tokens_per_s": rates.mean,
        "tokens_per_s_sd": rates.sd,
        "weight_bytes_per_token": needed,
        "read_bytes_per_s": pace or None,
        "percent_of_read": 100 * needed * rates.mean / pace if needed and pace else None,
        "samples_tokens_per_s": list(rates.samples),
        "samples_read_bytes_per_s": list(paces),
    }


def _giga(key: str) -> Callable[[Record], str]:
    return lambda record: "-" if record[key] is None else significant(record[key] / 1e9)


COLUMNS = (
    Column("model", text("model"), 14, "left"),
    Column("size", lambda record: f"{record['model_bytes'] / 2**30:.2f} GiB", 10),
    Column("kernels", text("isa"), 11, "left"),
    Column("threads", text("threads"), 7),
    Column("test", text("test"), 15, "left"),
    Column("t/s", lambda r: f"{significant(r['tokens_per_s'])} ± {significant(r['tokens_per_s_sd'])}", 17),
    Column("GB/token", _giga("weight_bytes_per_token"), 8),
    Column("read GB/s", _giga("read_bytes_per_s"), 9),
    Column("% of read", number("percent_of_read"), 9),
)
