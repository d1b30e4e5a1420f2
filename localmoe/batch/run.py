"""A batch, run: requests go lazily into shared steps, and each becomes a row of the output when it is done.

Memory: the requests that run, and a few numbers for each that was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from localmoe import gpus, scheduler
from localmoe.api import LLM
from localmoe.batch.answer import Answer
from localmoe.batch.input import key
from localmoe.batch.output import Output
from localmoe.batch.request import Refused, Request
from localmoe.batch.size import BatchSize, most_at_once
from localmoe.device import available_memory
from localmoe.errors import ModelError, UsageError
from localmoe.events import Finished, Progress
from localmoe.models.sizes import sizes_of_config
from localmoe.sampler import SamplingParams
from localmoe.shared_prefixes import SharedPrefixes


@dataclass
class Counts:
    """done: finished now; skipped: finished by an earlier run; failed: of all, by either. reused_tokens: of prompts,
    not read again. tokens_per_s: of decoding, by how many replies ran at once."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    latencies: list[float] = field(default_factory=list)
    tokens_per_s: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class How:
    """deterministic: a reply is the same whatever runs beside it, so no beginnings of prompts are shared.

    retry_errors: those that failed run again."""

    defaults: SamplingParams
    seed: int
    facts: dict[str, str]
    size: BatchSize
    deterministic: bool = False
    retry_errors: bool = False


def run(
    llm: LLM,
    requests: Iterable[Request | Refused],
    output: Output,
    how: How,
    *,
    cancelled: Callable[[], bool],
    show: Callable[[Counts], None],
) -> Counts:
    """Answer what the output does not hold yet. cancelled is asked before each step; running replies are dropped then.

    A request that fails becomes a row with its error, and the others go on."""
    counts, started = Counts(), time.monotonic()
    running: dict[int, tuple[Answer, int]] = {}
    starts = _starts(llm, requests, output, how, counts, running)
    for index, event in scheduler.run(
        llm.engine,
        starts,
        cancelled=cancelled,
        max_sequences=lambda: how.size.limit,
        whole_chunks=how.deterministic,
        observe=how.size.observe,
    ):
        counts.seconds = time.monotonic() - started
        if isinstance(event, Finished):
            counts.interrupted |= event.completion.finish_reason == "cancelled"
            answer, choice = running.pop(index)
            answer.completions[choice] = event.completion
            if answer.complete and not counts.interrupted:
                _finish(output, how, counts, answer)
                show(counts)
        elif isinstance(event, Progress):
            output.sync_if_due()
    counts.interrupted |= cancelled()
    counts.tokens_per_s = how.size.curve()
    return counts


def _starts(
    llm: LLM,
    requests: Iterable[Request | Refused],
    output: Output,
    how: How,
    counts: Counts,
    running: dict[int, tuple[Answer, int]],
) -> Iterator[scheduler.Start]:
    begun, shared = 0, None if how.deterministic else SharedPrefixes(llm.engine)
    for request in requests:
        params = how.defaults if isinstance(request, Refused) else request.params(how.defaults, how.seed)
        digest = request.digest if isinstance(request, Refused) else request.digest(params, how.facts)
        found = output.rows.get(key(request.custom_id))
        if found is not None and found.digest == digest and not (found.failed and how.retry_errors):
            counts.skipped += 1
            counts.failed += found.failed
            continue
        try:
            if isinstance(request, Refused):
                raise UsageError(request.problem)
            answer = Answer(llm, request, params, digest, shared)
            starts = list(answer.starts())
        except (UsageError, ModelError) as problem:
            counts.failed, counts.done = counts.failed + 1, counts.done + 1
            output.add(failure(request, digest, 400, "invalid_request", str(problem)))
            continue
        for choice, start in enumerate(starts):
            running[begun] = answer, choice
            begun += 1
            yield start


def _finish(output: Output, how: How, counts: Counts, answer: Answer) -> None:
    """Write the row of a request whose replies are all there."""
    counts.done += 1
    counts.prompt_tokens += sum(stats.prompt_tokens for stats in answer.prompts)
    counts.reused_tokens += sum(stats.reused_tokens for stats in answer.prompts)
    counts.generated_tokens += answer.generated_tokens
    counts.latencies.append(max(c.stats.prefill_seconds + c.stats.decode_seconds for c in answer.ordered))
    if answer.error is not None:
        counts.failed += 1
        output.add(failure(answer.request, answer.digest, 500, "generation_failed", answer.error))
    else:
        created = 0 if how.deterministic else int(time.time())
        output.add(_row(answer.request, answer.digest, 200, answer.body(created)))


def failure(request: Request | Refused, digest: str, status: int, code: str, message: str) -> dict[str, Any]:
    """The row of a request that has no reply."""
    error = {"code": code, "message": message}
    return _row(request, digest, status, {"error": error}) | {"error": error}


def _row(request: Request | Refused, digest: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": digest, "body": body}
    return {"id": f"batch_req_{digest[:24]}", "custom_id": request.custom_id, "response": response, "error": None}


def batch_size(llm: LLM, given: int | None) -> BatchSize:
    """So many replies at once; None: what measured steps make worth while, if memory has room for them."""
    if given is not None:
        return BatchSize(given, first=given)
    # As if all of a reply's state were on the fullest GPU.
    known = [free for free in (available_memory(), gpus.free_memory(llm.gpus)) if free is not None]
    return BatchSize(most_at_once(sizes_of_config(llm.config, llm.name), llm.context, min(known, default=None)))
