"""Scheduler: many replies, one step at a time; decoding ones and prompt chunks share each step.

Knows requests and a token budget; does not know text or weights. Requests join and leave between any two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from localmoe.engine import Engine
from localmoe.events import Event, Finished
from localmoe.reply_request import ReplyRequest

# Sequences in flight: their decode states must fit in memory together.
MAX_SEQUENCES = 32

# Sequences of a step, tokens of prompts in it, seconds it took.
Observe = Callable[[int, int, float], None]
# None: not yet, another one of those that run has to take a step first.
Start = Callable[[], ReplyRequest | None]


def run(
    engine: Engine,
    starts: Iterable[Start],
    *,
    cancelled: Callable[[], bool] | None = None,
    max_sequences: int | Callable[[], int] = MAX_SEQUENCES,
    whole_chunks: bool = False,
    observe: Observe | None = None,
) -> Iterator[tuple[int, Event]]:
    """Run every request to its end, yielding (index of the request, event). A request is made when there is room for
    it and its prompt can be read in the next step; `starts` is read one further than that. max_sequences may change
    between steps. whole_chunks: a prompt is cut at the same places whatever runs beside it. observe: told of each step.
    cancelled is asked before each step; once True, every running request ends with what it has."""
    most = max_sequences if callable(max_sequences) else lambda: max_sequences
    waiting = _Waiting(starts)
    running: dict[int, ReplyRequest] = {}
    while True:
        waiting.join(running, most(), engine.prefill_tokens)
        if not running:
            return
        if cancelled is not None and cancelled():
            for index, request in running.items():
                yield from ((index, event) for event in (*request.cancel(), Finished(request.completion())))
            return
        yield from _step(engine, running, whole_chunks, observe)


class _Waiting:
    """Requests that are not made yet."""

    def __init__(self, starts: Iterable[Start]) -> None:
        self._starts = enumerate(starts)
        self._next = next(self._starts, None)

    def join(self, running: dict[int, ReplyRequest], most: int, budget: int) -> None:
        """Make those that the next step has room for."""
        unread = sum(request.unread for request in running.values())
        while self._next is not None and len(running) < most and unread < budget:
            index, start = self._next
            request = start()
            if request is None:
                assert running, "nobody else could take a step"
                return
            running[index] = request
            unread += request.unread
            self._next = next(self._starts, None)


def _step(
    engine: Engine, running: dict[int, ReplyRequest], whole_chunks: bool, observe: Observe | None
) -> Iterator[tuple[int, Event]]:
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
    started = time.monotonic()
    result = engine.advance([(running[index].session, chunk) for index, chunk in work])
    if observe is not None:
        observe(len(work), engine.prefill_tokens - budget, time.monotonic() - started)
    for row, (index, _chunk) in enumerate(work):
        request = running[index]
        for event in request.accept(result.logits[row], result.faults.get(row)):
            yield index, event
        if request.finish_reason is not None:
            del running[index]
            yield index, Finished(request.completion())
