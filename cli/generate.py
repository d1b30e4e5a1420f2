"""`localmoe generate`: one prompt, one reply. The reply alone goes to stdout, so that it can be piped on."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli import options, render
from localmoe.cli.meter import reading
from localmoe.cli.options import SamplingFlags
from localmoe.errors import GenerationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localmoe.api import LLM
    from localmoe.events import Completion, Event
    from localmoe.sampler import Sample, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to ask and how to show the reply."""

    raw: bool
    system: str | None
    thinking: options.Thinking
    effort: options.Effort | None
    as_json: bool
    stream: bool
    quiet: bool


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)] = None,
    *,
    model: options.ModelOption = None,
    max_tokens: options.MaxTokensOption = None,
    system: options.SystemOption = None,
    think: options.ThinkOption = "off",
    effort: options.EffortOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, without chat format.")] = False,
    seed: options.SeedOption = None,
    temp: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    stop: options.StopOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: text, tokens, timings.")] = False,
    logprobs: options.LogprobsOption = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the reply when it is complete.")] = False,
    quiet: options.QuietOption = False,
    dtype: options.DtypeOption = "auto",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    ctx: options.ContextOption = None,
    ram: options.RamOption = None,
    expert_slots: options.SlotsOption = None,
    policy: options.PolicyOption = "best",
    pack: options.PackOption = None,
    trace_routing: options.TraceOption = None,
    warm_start: options.WarmOption = None,
) -> None:
    """Read the prompt, load the model and show its reply. Raises GenerationError if the reply broke off."""
    flags = SamplingFlags(max_tokens=max_tokens, seed=seed, temperature=temp, top_p=top_p, top_k=top_k, min_p=min_p,
                          repetition_penalty=repetition_penalty, stop=stop, logprobs=logprobs)  # fmt: skip
    request = Request(
        raw=raw, system=system, thinking=think, effort=effort, as_json=as_json, stream=not no_stream, quiet=quiet
    )
    check(request, flags)
    text = read_prompt(prompt)
    started = time.monotonic()
    compute = options.ComputeFlags(dtype=dtype, kernels=kernels, threads=threads, context=ctx)
    paging = options.PagingFlags(
        ram=ram, slots=expert_slots, policy=policy, trace=trace_routing, warm=warm_start, pack=pack
    )
    llm, params = options.open_model(model, flags, compute, paging, quiet=quiet)
    load_seconds = time.monotonic() - started
    try:
        completion = answer(llm, text, params, request)
    finally:
        llm.close()
    if as_json:
        sys.stdout.write(json.dumps(as_object(llm, completion, load_seconds), allow_nan=False) + "\n")
    if completion.finish_reason == "error":
        raise GenerationError(completion.error or "the reply could not be finished")


def check(request: Request, flags: SamplingFlags) -> None:
    """Raises UsageError for options that would be accepted and have no effect."""
    options.check_effort(request.thinking, request.effort)
    if request.raw and (request.system is not None or request.thinking == "on"):
        raise UsageError("--raw has no chat format, so --system and --think cannot apply; leave one of them out")
    if flags.logprobs is not None and not request.as_json:
        raise UsageError("--logprobs are only shown with --json; add it")


def read_prompt(argument: str | None) -> str:
    """Standard input, when it is not a terminal, then the argument, with a newline between them.

    Newlines at the end of standard input are dropped, as a shell does for $(...). Raises UsageError if nothing is left
    or something is not text."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _read_stdin()
    prompt = "\n".join(part for part in (piped, argument) if part)
    if not prompt:
        raise UsageError('no prompt; give one, for example localmoe generate "Tell me a story.", or pipe it in')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text (character {error.start}); convert it first") from None
    return prompt


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text (byte {error.start}); convert it first") from None


def answer(llm: LLM, prompt: str, params: SamplingParams, request: Request) -> Completion:
    """Generate the reply and show it as the request says. stdout gets the answer only, and nothing with --json."""
    console = render.open_console()
    with (
        render.Waiting(console, "reading the prompt", quiet=request.quiet) as waiting,
        render.ReplyWriter(console, quiet=request.quiet) as writer,
    ):
        live = writer if request.stream and not request.as_json else None
        completion = render.follow(start(llm, prompt, params, request), waiting, live)
        if live is None and not request.as_json:
            waiting.end()
            writer.write("reasoning", completion.reasoning)
            writer.write("answer", completion.text)
    if not request.quiet:
        render.say(console, render.timings(completion, reading(llm, completion)))
    return completion


def start(llm: LLM, prompt: str, params: SamplingParams, request: Request) -> Iterator[Event]:
    """The events of the reply, with or without chat format."""
    if request.raw:
        return llm.stream(prompt, params)
    messages = [{"role": "user", "content": prompt}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    return llm.stream_chat(messages, params, thinking=request.thinking, effort=request.effort)


def as_object(llm: LLM, completion: Completion, load_seconds: float) -> dict[str, Any]:
    """What --json prints. Texts are exact: nothing is replaced, and JSON escapes what a terminal would obey."""
    stats, meter = completion.stats, reading(llm, completion)
    return {
        "model": llm.name,
        "text": completion.text,
        "reasoning": completion.reasoning,
        "tool_calls": list(completion.tool_calls),
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "error": completion.error,
        "tokens": {
            "prompt": stats.prompt_tokens,
            "reused": stats.reused_tokens,
            "generated": stats.generated_tokens,
            "ids": list(completion.token_ids),
        },
        "timings": {
            "load_seconds": load_seconds,
            "first_token_seconds": _finite(stats.first_token_seconds),
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
            "prefill_tokens_per_s": _finite(stats.prefill_tokens_per_s),
            "decode_tokens_per_s": _finite(stats.decode_tokens_per_s),
        },
        "paging": None if llm.pager is None else asdict(llm.pager),
        "meter": None if meter is None else asdict(meter),
        "logprobs": None if completion.logprobs is None else [_sample(llm, s) for s in completion.logprobs],
    }


def _sample(llm: LLM, sample: Sample) -> dict[str, Any]:
    top = [{"id": id, "token": llm.tokenizer.decode([id]), "logprob": _finite(value)} for id, value in sample.top]
    token = llm.tokenizer.decode([sample.id])
    return {"id": sample.id, "token": token, "logprob": _finite(sample.logprob), "top": top}


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
