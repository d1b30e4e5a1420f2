"""One context that grows: how fast it is read and decoded at each length, and its memory beside the plan's.

Knows engines, sessions and bytes; does not know the command line. Memory: the model and one session. Peaks need Linux;
elsewhere they are null."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from localmoe import device
from localmoe.bench.endtoend import advance, trace
from localmoe.bench.measure import circumstances, seconds_of
from localmoe.bench.report import Column, Record, number, significant, text
from localmoe.bench.subject import Subject
from localmoe.engine import Engine
from localmoe.errors import UsageError
from localmoe.models.sizes import sizes_of_config
from localmoe.placement import BASE_BYTES
from localmoe.session import Session

Report = Callable[[str], None]
# Of a context that is made up, at once.
_ROWS = 4096


def check(lengths: Sequence[int], tokens: int, limit: int) -> None:
    """Raises UsageError unless each length has room for the tokens to decode after the one before, up to limit."""
    for before, length in zip((0, *lengths), lengths, strict=False):
        if length <= before + tokens:
            raise UsageError(
                f"a context of {length} tokens, expected more than {before + tokens}: ascending, with room"
            )
    if lengths[-1] > limit:
        raise UsageError(f"a context of {lengths[-1]} tokens, the model has {limit}")


def run(
    subject: Subject, lengths: Sequence[int], tokens: int, report: Report, *, made_up: bool = False
) -> Iterator[Record]:
    """Read up to each length, decode its last tokens one by one, and yield its record.

    made_up: the context is not read but filled with random rows, which decoding reads like any others. Raises
    GenerationError for a model that gives NaN."""
    engine, library = subject.engine, subject.backend.library if subject.backend else None
    ids = trace(lengths[-1], engine.model.config.vocab_size)
    gc.collect()
    loaded = device.resident_memory()
    session = engine.new_session()
    for length in lengths:
        can_tell = device.forget_peak_memory()
        read = length - tokens - session.length
        fill = _make_up if made_up else _read
        reading = seconds_of(partial(fill, subject, session, ids[session.length : length - tokens], length, report))
        report(f"{length:,} tokens: decoding")
        decoding = seconds_of(partial(_decode, subject, session, ids[length - tokens : length]))
        peak = device.peak_memory() if can_tell else None
        record: Record = {
            "model": subject.name,
            "model_bytes": subject.nbytes,
            "context": length,
            "prefill_tokens_per_s": None if made_up else read / reading,
            "decode_tokens_per_s": tokens / decoding,
            "state_bytes": session.state.nbytes,
        }
        record |= memory_of_context(engine, length, loaded, peak)
        record |= _memory_of_process(subject.nbytes, record["planned_context_bytes"], peak)
        yield record | circumstances(library)


def _read(subject: Subject, session: Session, ids: list[int], length: int, report: Report) -> None:
    size = subject.engine.prefill_tokens
    for start in range(0, len(ids), size):
        report(f"{length:,} tokens: {session.length:,} read")
        advance(subject.engine, session, ids[start : start + size])


@torch.inference_mode()
def _make_up(subject: Subject, session: Session, ids: list[int], length: int, report: Report) -> None:
    report(f"{length:,} tokens: making them up")
    state, rows = session.state, torch.Generator().manual_seed(0)
    state.length = session.length + len(ids)
    for layer in state.layers:
        for pool, ratio in layer.pools():
            while missing := state.length // ratio - pool.count:
                shape = min(missing, _ROWS), pool.buffer.shape[1]
                pool.extend(torch.randn(shape, generator=rows).to(pool.buffer.dtype))
        for tensor in layer.fixed_tensors():
            tensor.normal_(generator=rows)
    session.ids += ids


def _decode(subject: Subject, session: Session, ids: list[int]) -> None:
    for token in ids:
        advance(subject.engine, session, [token])


def memory_of_context(engine: Engine, context: int, loaded: int, peak: int | None) -> dict[str, Any]:
    """Bytes planned and measured for decode state and work. loaded: what the process held before; None: not known."""
    config = engine.model.config
    sizes = sizes_of_config(config, "the model", engine.model.dtype.itemsize)
    planned = sizes.kv_bytes(context) + sizes.work.of(min(engine.prefill_tokens, context))
    return {
        "planned_context_bytes": planned,
        "context_bytes": None if peak is None else peak - loaded,
        "context_percent_of_plan": None if peak is None else 100 * (peak - loaded) / planned,
    }


def _memory_of_process(weights: int, context: int, peak: int | None) -> dict[str, Any]:
    all_planned = BASE_BYTES + weights + context
    return {
        "planned_process_bytes": all_planned,
        "process_bytes": peak,
        "process_percent_of_plan": None if peak is None else 100 * peak / all_planned,
    }


def mega(name: str) -> Callable[[Record], str]:
    """Shows bytes in millions, and nothing for what is not known."""
    return lambda record: "" if record[name] is None else f"{record[name] / 1e6:,.0f}"


def _read_rate(record: Record) -> str:
    rate = record["prefill_tokens_per_s"]
    return "made up" if rate is None else significant(rate)


COLUMNS = (
    Column("model", text("model"), 30, "left"),
    Column("context", lambda r: f"{r['context']:,}", 8),
    Column("read t/s", _read_rate, 8),
    Column("decode t/s", lambda r: significant(r["decode_tokens_per_s"]), 10),
    Column("state MB", mega("state_bytes"), 8),
    Column("context MB", mega("context_bytes"), 10),
    Column("planned", mega("planned_context_bytes"), 8),
    Column("%", number("context_percent_of_plan"), 6),
    Column("process MB", mega("process_bytes"), 10),
    Column("planned", mega("planned_process_bytes"), 8),
    Column("%", number("process_percent_of_plan"), 6),
)
