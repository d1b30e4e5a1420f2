"""Scheduler: many replies, one step at a time; decoding ones and prompt chunks share each step.

Knows requests and a token budget; does not know text or weights. Requests join and leave between any two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from localmoe.engine import Engine
from localmoe.events import Event, Finished
from localmoe.reply_request import ReplyRequest

# Sequences in flight: their decode states must fit in memory together.
MAX_SEQUENCES = 32

Start = Callable[[], ReplyRequest]


def run(
    engine: Engine,
    starts: Sequence[Start],
    *,
    cancelled: Callable[[], bool] | None = None,
    max_sequences: int = MAX_SEQUENCES,
) -> Iterator[tuple[int, Event]]:
    """Run every request to its end, yielding (index of the request, event). Requests are made when there is room.

    cancelled is asked before each step; once True, every running request ends with what it has."""
    waiting = deque(enumerate(starts))
    running: dict[int, ReplyRequest] = {}
    while waiting or running:
        while waiting and len(running) < max_sequences:
            index, start = waiting.popleft()
            running[index] = start()
        if cancelled is not None and cancelled():
            for index, request in running.items():
                yield from ((index, event) for event in (*request.cancel(), Finished(request.completion())))
            return
        yield from _step(engine, running)


def _step(engine: Engine, running: dict[int, ReplyRequest]) -> Iterator[tuple[int, Event]]:
    """One forward for all that run; finished requests leave `running`."""
    work: list[tuple[int, list[int]]] = []
    budget = engine.prefill_tokens
    for index, request in running.items():
        if request.prefilling and budget == 0:
            continue
        chunk = request.next_chunk(budget)
        if request.prefilling:
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
