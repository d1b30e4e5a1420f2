"""Whole-model speed in the conventions of llama-bench: pp512 reads a prompt, tg128 produces tokens, @ d4096 after as
much context. One warm-up, then every repetition starts from the same state and takes the same made-up tokens.

Where GPUs cache experts, every repetition takes other tokens, which a cache has not seen, after more of them have
filled it. Knows engines, sessions and bytes; does not know the command line. Memory: the model and one session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from localmoe.bench.gpu_subject import touch
from localmoe.bench.launches import Launches, launches
from localmoe.bench.measure import MemoryReader, Spread, circumstances, seconds_of
from localmoe.bench.report import Column, Record, number, significant, text
from localmoe.bench.subject import Subject
from localmoe.engine import Engine
from localmoe.errors import GenerationError, UsageError
from localmoe.session import Session

Report = Callable[[str], None]
# Bytes read for one sample of the pace of memory.
_READ_BYTES = 1 << 30
# Tokens decoded before the first repetition of a tg row.
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Trial:
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


def plan_trials(prompts: Sequence[int], generations: Sequence[int], depths: Sequence[int], limit: int) -> list[Trial]:
    """Every trial asked for, by depth; a size of 0 is left out. limit: the model's longest context.

    Raises UsageError if nothing is left, or something would not fit in the context."""
    trials = [
        trial
        for depth in depths
        for trial in (*(Trial(p, 0, depth) for p in prompts), *(Trial(0, n, depth) for n in generations))
        if trial.count
    ]
    if not trials:
        raise UsageError("there is nothing to measure; give --prompt or --generate a size above 0")
    for trial in trials:
        if trial.depth + trial.count > limit:
            raise UsageError(
                f"{trial.name} needs a context of {trial.depth + trial.count} tokens, the model has {limit}"
            )
    return trials


def trace(count: int, vocab_size: int) -> list[int]:
    """The same made-up token ids every time, so that two runs route to the same experts."""
    generator = torch.Generator().manual_seed(20_260_801)
    ids: list[int] = torch.randint(vocab_size, (count,), generator=generator).tolist()
    return ids


def run(subject: Subject, trials: Sequence[Trial], repetitions: int, report: Report) -> Iterator[Record]:
    """Measure each trial; yields its record when it is done. Raises GenerationError for a model that gives NaN."""
    library = subject.backend.library if subject.backend else None
    there = subject.gpus
    others = repetitions if there is not None and there.cache is not None else 0
    longest = max(trial.depth + trial.count * (1 + others) for trial in trials)
    ids = trace(longest, subject.engine.model.config.vocab_size)
    session, pace = subject.engine.new_session(), _Pace(subject.pieces, MemoryReader(library))
    _fill(subject, report)
    for trial in trials:
        _go_to(session, trial.depth, ids, subject.engine, report)
        report(f"{trial.name}: warming up")
        _work(subject.engine, session, trial, ids, warming=True)
        samples: list[float] = []
        paces: list[float] = []
        before = (0, 0) if there is None else there.uses
        for done in range(repetitions):
            report(f"{trial.name}: {done + 1} of {repetitions}")
            session.rewind(trial.depth)
            chosen = ids[: trial.depth] + ids[trial.depth + trial.count * (done + 1) :] if others else ids
            samples.append(seconds_of(partial(_work, subject.engine, session, trial, chosen)))
            if trial.n_gen:
                paces.append(pace.sample())
        hits = None if there is None else _hits(before, there.uses)
        session.rewind(trial.depth)
        counted = None
        if there is not None and trial.n_gen:
            counted = launches(partial(advance, subject.engine, session, ids[trial.depth : trial.depth + 1]))
            session.rewind(trial.depth)
        found = _record(subject, trial, Spread(tuple(samples)), paces)
        yield found | _gpu_fields(subject, found, hits, counted) | circumstances(library)


def _fill(subject: Subject, report: Report) -> None:
    """Bring experts to where they would be in the long run."""
    there = subject.gpus
    if there is None or there.cache is None:
        return
    touch(subject, report)
    session, count = subject.engine.new_session(), there.using.warm_up
    config = subject.engine.model.config
    for at, token in enumerate(reversed(trace(count, config.vocab_size))):
        report(f"filling caches: token {at + 1} of {count}")
        if session.length == config.max_position_embeddings:
            session = subject.engine.new_session()
        advance(subject.engine, session, [token])


def _hits(before: tuple[int, int], after: tuple[int, int]) -> float | None:
    """The part of uses since then that found the expert on a GPU; None if there were none."""
    uses = after[0] - before[0]
    return (after[1] - before[1]) / uses if uses else None


def _gpu_fields(subject: Subject, found: Record, hits: float | None, counted: Launches | None) -> Record:
    """What a record says of GPUs; all None for a subject of the CPU's."""
    there = subject.gpus
    pace, count = found["read_bytes_per_s"], counted or Launches(0)
    least = there.least_seconds(hits, pace) if there is not None and found["n_gen"] else None
    return {
        "device": "cpu" if there is None else there.devices,
        "resident_percent": None if there is None else 100 * there.resident,
        "gpu_hit_percent": None if hits is None else 100 * hits,
        "gpu_copy_bytes_per_s": None if there is None else min(there.using.rates.values(), default=None),
        "percent_of_limit": 100 * least * found["tokens_per_s"] if least else None,
        "triton_launches_per_token": None if counted is None else count.triton,
        "launches_per_token": count.calls,
        "gpu_kernels_per_token": count.kernels,
        # Prompts never are.
        "graphs_notice": subject.engine.graphs_notice if found["n_gen"] else None,
    }


def _go_to(session: Session, depth: int, ids: list[int], engine: Engine, report: Report) -> None:
    """Bring the session to `depth` tokens and mark it there; what it has read of them already is kept."""
    if depth < session.length:
        session.rewind(0)
    while session.length < depth:
        report(f"reading {depth:,} tokens of context: {session.length:,}")
        advance(engine, session, ids[session.length : min(session.length + engine.prefill_tokens, depth)])
    session.mark()


def _work(engine: Engine, session: Session, trial: Trial, ids: list[int], *, warming: bool = False) -> None:
    """What a row times: a prompt in the chunks the scheduler makes, or single tokens."""
    size = engine.prefill_tokens if trial.n_prompt else 1
    stop = trial.depth + (min(trial.count, _WARM_UP_TOKENS) if warming and trial.n_gen else trial.count)
    for start in range(trial.depth, stop, size):
        advance(engine, session, ids[start : min(start + size, stop)])


def advance(engine: Engine, session: Session, chunk: list[int]) -> None:
    """Let a session take some tokens. Raises GenerationError if numbers are not finite."""
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


def _record(subject: Subject, trial: Trial, seconds: Spread, paces: Sequence[float]) -> dict[str, Any]:
    rates = Spread(tuple(trial.count / sample for sample in seconds.samples))
    pace = Spread(tuple(paces)).median if paces else None
    needed = subject.bytes_per_token if trial.n_gen else None
    return {
        "model": subject.name,
        "fingerprint": subject.engine.fingerprint,
        "model_bytes": subject.nbytes,
        "mode": subject.backend.mode if subject.backend else "reference",
        "dtype": str(subject.engine.model.dtype).removeprefix("torch."),
        "test": trial.name,
        "n_prompt": trial.n_prompt,
        "n_gen": trial.n_gen,
        "depth": trial.depth,
        "tokens_per_s": rates.mean,
        "tokens_per_s_sd": rates.sd,
        "weight_bytes_per_token": needed,
        "read_bytes_per_s": pace or None,
        # Of a model on GPUs, RAM is not what is read.
        "percent_of_read": 100 * needed * rates.mean / pace if needed and pace and subject.gpus is None else None,
        "samples_tokens_per_s": list(rates.samples),
        "samples_read_bytes_per_s": list(paces),
    }


def _giga(key: str) -> Callable[[Record], str]:
    return lambda record: "-" if record[key] is None else significant(record[key] / 1e9)


COLUMNS = (
    Column("model", text("model"), 14, "left"),
    Column("size", lambda record: f"{record['model_bytes'] / 2**30:.2f} GiB", 10),
    Column("kernels", lambda record: record["isa"] + " strict" * (record["mode"] == "strict"), 11, "left"),
    Column("threads", text("threads"), 7),
    Column("test", text("test"), 15, "left"),
    Column("t/s", lambda r: f"{significant(r['tokens_per_s'])} ± {significant(r['tokens_per_s_sd'])}", 17),
    Column("GB/token", _giga("weight_bytes_per_token"), 8),
    Column("read GB/s", _giga("read_bytes_per_s"), 9),
    Column("% of read", number("percent_of_read"), 9),
)


def _launches(record: Record) -> str:
    """Ours, then those of all."""
    own, every = record["triton_launches_per_token"], record["launches_per_token"]
    return "-" if own is None else f"{own} of {'?' if every is None else every}"


GPU_COLUMNS = (
    *COLUMNS[:2],
    Column("device", text("device"), 8, "left"),
    Column("experts on GPU %", number("resident_percent"), 16),
    Column("hits %", number("gpu_hit_percent"), 6),
    *COLUMNS[4:7],
    Column("launches/token", _launches, 14),
    Column("% of limit", number("percent_of_limit"), 10),
)
