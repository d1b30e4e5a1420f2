"""Tokens per second against how many replies are decoded together: what one read of an expert is worth.

Every number of replies is measured in turn, step by step, so that whatever else the machine does meets all alike.
Knows engines and their pager; does not know models. Memory: a decode state for each reply."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.bench.endtoend import trace
from localmoe.bench.measure import circumstances
from localmoe.bench.report import Column, Record, number, significant, text
from localmoe.engine import Engine
from localmoe.experts.paging import PagerStats
from localmoe.kernels.native import Library

Report = Callable[[str], None]


@dataclass(frozen=True)
class Batched:
    """What is measured. stats: gives what the pager has done so far, None where every expert is in memory."""

    name: str
    engine: Engine
    library: Library | None
    stats: Callable[[], PagerStats | None]


class _Replies:
    """So many replies, each going on with tokens drawn from what the model says, as replies do."""

    def __init__(self, engine: Engine, count: int) -> None:
        vocab = engine.model.config.vocab_size
        self._engine, self._sessions = engine, [engine.new_session() for _ in range(count)]
        self._next = torch.tensor(trace(count, vocab))
        self._generator = torch.Generator().manual_seed(count)

    def step(self) -> float:
        """One token more of each; how long the model took."""
        work = [(session, [token]) for session, token in zip(self._sessions, self._next.tolist(), strict=True)]
        started = time.perf_counter()
        logits = self._engine.advance(work).logits
        seconds = time.perf_counter() - started
        self._next = self._draw(logits)
        return seconds

    def _draw(self, logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(-1), 1, generator=self._generator).flatten()


def run(subject: Batched, counts: Sequence[int], tokens: int, warm_up: int, report: Report) -> Iterator[Record]:
    """Decode `tokens` tokens of each reply for every number of replies, after warm_up; yields a record for each."""
    replies = {count: _Replies(subject.engine, count) for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    read = {count: PagerStats() for count in counts}
    for i in range(warm_up + tokens):
        for count, running in replies.items():
            report(f"{'warming up: ' if i < warm_up else ''}token {i + 1} of {warm_up + tokens}, {count} together")
            before = subject.stats()
            taken = running.step()
            if i >= warm_up:
                seconds[count].append(taken)
                after = subject.stats()
                if before is not None and after is not None:
                    read[count] += after - before
    alone = statistics.median(seconds[counts[0]]) / counts[0]
    for count in counts:
        yield _record(subject, count, seconds[count], read[count], alone) | circumstances(subject.library)


def _record(subject: Batched, count: int, seconds: list[float], stats: PagerStats, alone: float) -> Record:
    """alone: seconds a token of the first number of replies."""
    tokens, median = count * len(seconds), statistics.median(seconds)
    paged = subject.stats() is not None
    return {
        "model": subject.name,
        "replies": count,
        "steps": len(seconds),
        "step_seconds": median,
        "tokens_per_s": count / median,
        "times_first": alone * count / median,
        "disk_bytes_per_token": stats.bytes_read / tokens if paged else None,
        "expert_bytes_per_token": stats.bytes_computed / tokens if paged else None,
        "hit_percent": 100 * stats.hit_rate if paged else None,
        "wait_share": 100 * stats.wait_seconds / sum(seconds) if paged else None,
        "samples_seconds": seconds,
    }


def _bytes(name: str) -> Callable[[Record], str]:
    return lambda record: "" if record[name] is None else significant(record[name] / 1e6)


COLUMNS = (
    Column("model", text("model"), 30, "left"),
    Column("replies", lambda r: str(r["replies"]), 7),
    Column("ms/step", lambda r: significant(1e3 * r["step_seconds"]), 8),
    Column("t/s in all", lambda r: significant(r["tokens_per_s"]), 10),
    Column("times the first", lambda r: f"{r['times_first']:.2f}", 15),
    Column("disk MB/token", _bytes("disk_bytes_per_token"), 13),
    Column("experts MB/token", _bytes("expert_bytes_per_token"), 16),
    Column("hits %", number("hit_percent"), 6),
    Column("waiting %", number("wait_share"), 9),
)
