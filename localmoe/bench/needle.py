"""The needle test: is what was read thousands of tokens ago still found? Right or wrong at every depth, by either way.

A haystack of filler hides keys, each followed by a code of four tokens. It is read in the engine's own chunks and
marked; from there each key is asked for, and the code must come out, token by token. Keys that are not hidden must
give nothing. Knows haystacks and engines; does not know how the model finds anything. Memory: one session."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from localmoe import device
from localmoe.bench import needle_model
from localmoe.bench.context import mega, memory_of_context
from localmoe.bench.measure import circumstances
from localmoe.bench.needle_model import BOS, CSA_KEYS, FILLER, HCA_KEYS, NOTHING, VALUES, needle_config, needle_weights
from localmoe.bench.report import Column, Record, significant, text
from localmoe.bench.subject import Computing
from localmoe.engine import Engine
from localmoe.errors import UsageError
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.session import Session

Report = Callable[[str], None]
# Where needles are, in percent of the haystack.
DEPTHS = (0, 10, 25, 50, 75, 90, 99)
ROUTES = {"csa": CSA_KEYS, "hca": HCA_KEYS}
# Tokens of a code: 56 distinct values are hidden, so that guessing one right has a chance of 1 in 128.
_CODE = 4
# Filler before the key of a question, so that it is read as a prompt is and not as a reply.
_LEAD = 7
# Room that one depth's needles need, one behind the other, and that the question needs after the last.
_ROOM = 24
# HCA sees whole windows, so the last needle must lie in one.
_WINDOW = 128
SHORTEST = 16 * _WINDOW


@dataclass(frozen=True)
class Needle:
    """A key, and the code behind it; depth None: it is not hidden, and nothing must be found."""

    route: str
    depth: int | None
    key: int
    code: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    ids: list[int]
    needles: list[Needle]


def open_needle(computing: Computing, *, quantize_kv: bool = False) -> Engine:
    """The model that can find needles, ready to run."""
    weights = needle_weights(computing.held)
    model = DeepseekV4(
        needle_config(),
        weights.__getitem__,
        dtype=computing.dtype,
        backend=computing.backend,
        quantize_kv=quantize_kv,
    )
    return Engine(model)


def check_lengths(lengths: Sequence[int]) -> None:
    """Raises UsageError for a haystack that is too short, too long, or not made of whole HCA windows."""
    longest = needle_model.CONFIG["max_position_embeddings"] - 2 * _WINDOW
    for length in lengths:
        if length % _WINDOW or not SHORTEST <= length <= longest:
            raise UsageError(f"a haystack of {length} tokens, expected a multiple of 128 from {SHORTEST} to {longest}")


def haystack(length: int, seed: int) -> Haystack:
    """Filler with one needle of each route at every depth, and a key of each route that is not hidden."""
    rng = random.Random(seed)
    ids = [BOS, *rng.choices(FILLER, k=length - 1)]
    codes = iter(rng.sample(VALUES, len(DEPTHS) * len(ROUTES) * _CODE))
    keys = {route: rng.sample(of_route, len(DEPTHS) + 1) for route, of_route in ROUTES.items()}
    needles = [Needle(route, None, some.pop(), ()) for route, some in keys.items()]
    for depth in DEPTHS:
        at = min(max(depth * length // 100, 1), length - _ROOM)
        for route in rng.sample(list(ROUTES), len(ROUTES)):
            # Every place in a CSA window comes up.
            at += rng.randrange(4)
            needle = Needle(route, depth, keys[route].pop(), tuple(next(codes) for _ in range(_CODE)))
            ids[at : at + 1 + _CODE] = [needle.key, *needle.code]
            needles.append(needle)
            at += 1 + _CODE
    return Haystack(ids, needles)


def run(engine: Engine, lengths: Sequence[int], repetitions: int, report: Report) -> Iterator[Record]:
    """One record for each length and route, over as many haystacks as repetitions."""
    for length in lengths:
        trials = [
            _trial(engine, haystack(length, seed), partial(_say, report, length, seed)) for seed in range(repetitions)
        ]
        for route in ROUTES:
            yield _record(engine, length, route, trials)


def _say(report: Report, length: int, seed: int, doing: str) -> None:
    report(f"haystack {seed + 1} of {length:,} tokens: {doing}")


@dataclass(frozen=True)
class _Trial:
    """found: the code that came out for each needle. Rates in tokens per second; state_bytes: of the decode state.

    loaded, peak: bytes of the process before and at most; None where the system does not tell the peak."""

    found: dict[Needle, tuple[int, ...]]
    prefill: float
    decode: float
    state_bytes: int
    loaded: int
    peak: int | None


def _trial(engine: Engine, hay: Haystack, report: Report) -> _Trial:
    loaded, can_tell = device.resident_memory(), device.forget_peak_memory()
    session, length, size = engine.new_session(), len(hay.ids), engine.prefill_tokens
    started = time.perf_counter()
    for at in range(0, length, size):
        report(f"{at:,} read")
        engine.advance([(session, hay.ids[at : at + size])])
    prefill = length / (time.perf_counter() - started)
    session.mark()
    state_bytes, found, seconds = session.state.nbytes, {}, 0.0
    for number, needle in enumerate(hay.needles):
        report(f"question {number + 1} of {len(hay.needles)}")
        session.rewind(length)
        found[needle], took = ask(engine, session, needle.key, number)
        seconds += took
    decode = len(hay.needles) * (_CODE - 1) / seconds
    return _Trial(found, prefill, decode, state_bytes, loaded, device.peak_memory() if can_tell else None)


def ask(engine: Engine, session: Session, key: int, seed: int = 0) -> tuple[tuple[int, ...], float]:
    """Put filler and the key behind what the session has read; the most likely tokens after it, and the seconds that
    all of them but the first took."""
    question = [*random.Random(seed).choices(FILLER, k=_LEAD), key]
    answer = [int(engine.advance([(session, question)]).logits[0].argmax())]
    started = time.perf_counter()
    while len(answer) < _CODE:
        answer.append(int(engine.advance([(session, answer[-1:])]).logits[0].argmax()))
    return tuple(answer), time.perf_counter() - started


def is_right(needle: Needle, answer: tuple[int, ...]) -> bool:
    """All of the code; of a key that was not hidden, nothing."""
    return answer == needle.code if needle.depth is not None else answer[0] == NOTHING


def _record(engine: Engine, length: int, route: str, trials: Sequence[_Trial]) -> Record:
    backend, model = engine.model.backend, engine.model
    right: dict[int | None, list[bool]] = {}
    for trial in trials:
        for needle, answer in trial.found.items():
            if needle.route == route:
                right.setdefault(needle.depth, []).append(is_right(needle, answer))
    record: dict[str, Any] = {
        "length": length,
        "route": route,
        "haystacks": len(trials),
        "kv_format": "fp8" if model.quantize_kv else "full",
        "dtype": str(model.dtype).removeprefix("torch."),
        "mode": backend.mode if backend else "reference",
    }
    record |= {f"found_at_{depth}": sum(right[depth]) for depth in DEPTHS}
    record["nothing_found"] = sum(right[None])
    for name in ("prefill", "decode"):
        record[f"{name}_tokens_per_s"] = sum(getattr(trial, name) for trial in trials) / len(trials)
    record["state_bytes"] = trials[0].state_bytes
    # Later ones find memory that the first has left.
    record |= memory_of_context(engine, length, trials[0].loaded, trials[0].peak)
    return record | circumstances(backend.library if backend else None)


def _share(key: str) -> Callable[[Record], str]:
    return lambda record: f"{record[key]}/{record['haystacks']}"


COLUMNS = (
    Column("tokens", lambda record: f"{record['length']:,}", 9),
    Column("route", text("route"), 5, "left"),
    *(Column(f"{depth} %", _share(f"found_at_{depth}"), 5) for depth in DEPTHS),
    Column("not hidden", _share("nothing_found"), 10),
    Column("prefill t/s", lambda record: significant(record["prefill_tokens_per_s"]), 11),
    Column("decode t/s", lambda record: significant(record["decode_tokens_per_s"]), 10),
    Column("context MB", mega("context_bytes"), 10),
    Column("planned", mega("planned_context_bytes"), 8),
)
