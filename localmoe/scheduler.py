"""Scheduler: many replies, one step at a time; decoding ones and prompt chunks share each step.

Knows requests and a token budget; does not know text or weights. Requests join and leave between any two steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from localmoe.engine import Engine
from localmoe.events import Event, Finished
from localmoe.reply_request import ReplyRequest

# Sequences in flight: their decode states must fit in memory together.
MAX_SEQUENCES = 32

Start = Callable[[], ReplyRequest]


def run(
    engine: Engine,
    starts: Iterable[Start],
    *,
    cancelled: Callable[[], bool] | None = None,
    max_sequences: int = MAX_SEQUENCES,
    whole_chunks: bool = False,
) -> Iterator[tuple[int, Event]]:
    """Run every request to its end, yielding (index of the request, event). Requests are made when there is room, and
    `starts` is read no further than that. whole_chunks: a prompt is cut at the same places whatever runs beside it.
    cancelled is asked before each step; once True, every running request ends with what it has."""
    waiting = enumerate(starts)
    running: dict[int, ReplyRequest] = {}
    while True:
        for index, start in itertools.islice(waiting, max_sequences - len(running)):
            running[index] = start()
        if not running:
            return
        if cancelled is not None and cancelled():
            for index, request in running.items():
                yield from ((index, event) for event in (*request.cancel(), Finished(request.completion())))
            return
        yield from _step(engine, running, whole_chunks)


def _step(engine: Engine, running: dict[int, ReplyRequest], whole_chunks: bool) -> Iterator[tuple[int, Event]]:
    """One forward for all that run; finished requests leave `running`."""
    work: list[tuple[int, list[int]]] = []
    budget = engine.prefill_tokens
    for index, request in running.items():
        if request.prefilling and budget == 0:
            continue
        chunk = request.next_chunk(engine.prefill_tokens if whole_chunks else budget)
        if request.prefilling:
            if len(chunk) > budget:
                # It waits for a step of its own; those before it are older, so its turn comes.
                continue
            budget -= len(chunk)
        work.append((index, chunk))
    result = engine.advance([(running[index].session, chunk) for index, chunk in work])
    for row, (index, _chunk) in enumerate(work):
        request = running[index]
        for event in request.accept(result.logits[row], result.faults.get(row)):
            yield index, event
        if request.finish_reason is not None:
            del running[index]
            yield index, Finished(request.completion())
