"""`localmoe run`: one prompt, one reply. The reply alone goes to stdout, so that it can be piped on.

Knows how a reply is shown and which exit code it ends with; does not know where the prompt is from."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from localmoe.cli import options, render
from localmoe.cli.chat_interrupts import Interrupts
from localmoe.cli.code_block import first_block
from localmoe.cli.json_schema import JsonSchemaOption, read_schema
from localmoe.cli.meter import reading
from localmoe.cli.options import SamplingFlags
from localmoe.cli.run_prompt import read_prompt
from localmoe.cli.sanitize import sanitize
from localmoe.errors import GenerationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from localmoe.api import LLM
    from localmoe.events import Completion, Event
    from localmoe.sampler import Sample, SamplingParams


Show = Literal["stream", "whole", "code", "json"]
FileOption = Annotated[
    list[Path] | None,
    typer.Option("--file", "-f", metavar="FILE", help="Put a text file before PROMPT; - is stdin; may be repeated."),
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to ask and how to show the reply: as it comes, when it is whole, its code only, or as JSON."""

    raw: bool
    system: str | None
    thinking: options.Thinking
    effort: options.Effort | None
    show: Show
    quiet: bool


def run(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)] = None,
    *,
    file: FileOption = None,
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
    json_schema: JsonSchemaOption = None,
    extract: Annotated[
        bool, typer.Option("--extract", "-x", help="Print only the first fenced code block of the answer.")
    ] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the reply when it is complete.")] = False,
    quiet: options.QuietOption = False,
    dtype: options.DtypeOption = "auto",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    ctx: options.ContextOption = None,
    device: options.DeviceOption = "cpu",
    vram: options.VramOption = None,
    graphs: options.GraphsOption = None,
    ram: options.RamOption = None,
    expert_slots: options.SlotsOption = None,
    policy: options.PolicyOption = "best",
    pack: options.PackOption = None,
    trace_routing: options.TraceOption = None,
    warm_start: options.WarmOption = None,
) -> None:
    """Read the prompt, load the model and show its reply.

    Raises GenerationError if the reply broke off or lacks what was to be extracted, KeyboardInterrupt for Ctrl-C."""
    flags = SamplingFlags(max_tokens=max_tokens, seed=seed, temperature=temp, top_p=top_p, top_k=top_k, min_p=min_p,
                          repetition_penalty=repetition_penalty, stop=stop, logprobs=logprobs,
                          constraint=read_schema(json_schema))  # fmt: skip
    if extract and as_json:
        raise UsageError("--json holds the whole answer, so --extract cannot apply; leave one of them out")
    show: Show = "json" if as_json else "code" if extract else "whole" if no_stream else "stream"
    request = Request(raw=raw, system=system, thinking=think, effort=effort, show=show, quiet=quiet)
    check(request, flags)
    text = read_prompt(prompt, file or ())
    started = time.monotonic()
    compute = options.ComputeFlags(dtype=dtype, kernels=kernels, threads=threads, context=ctx, device=device,
                                   vram=options.parse_vram(vram), graphs=graphs)  # fmt: skip
    paging = options.PagingFlags(
        ram=ram, slots=expert_slots, policy=policy, trace=trace_routing, warm=warm_start, pack=pack
    )
    llm, params = options.open_model(model, flags, compute, paging, quiet=quiet)
    load_seconds = time.monotonic() - started
    try:
        completion = answer(llm, text, params, request)
    finally:
        llm.close()
    if show == "json":
        sys.stdout.write(json.dumps(as_object(llm, completion, load_seconds), allow_nan=False) + "\n")
    if completion.finish_reason == "error":
        raise GenerationError(completion.error or "the reply could not be finished")
    if completion.finish_reason == "cancelled":
        raise KeyboardInterrupt
    if show == "code":
        write_code(completion)


def check(request: Request, flags: SamplingFlags) -> None:
    """Raises UsageError for options that would be accepted and have no effect."""
    options.check_effort(request.thinking, request.effort)
    if request.raw and (request.system is not None or request.thinking == "on"):
        raise UsageError("--raw has no chat format, so --system and --think cannot apply; leave one of them out")
    if flags.logprobs is not None and request.show != "json":
        raise UsageError("--logprobs are only shown with --json; add it")


def answer(llm: LLM, prompt: str, params: SamplingParams, request: Request) -> Completion:
    """Generate the reply and show it as the request says, except for code and JSON, which need the whole of it.

    Ctrl-C ends the reply, which keeps what it has; a second one raises KeyboardInterrupt."""
    console = render.open_console()
    with (
        Interrupts(leave_seconds=math.inf) as interrupts,
        render.Waiting(console, "reading the prompt", quiet=request.quiet) as waiting,
        render.ReplyWriter(console, quiet=request.quiet) as writer,
    ):
        events = start(llm, prompt, params, request, lambda: interrupts.stopped)
        completion = render.follow(events, waiting, writer if request.show == "stream" else None)
        waiting.end()
        if request.show in ("whole", "code"):
            writer.write("reasoning", completion.reasoning)
        if request.show == "whole":
            writer.write("answer", completion.text)
    if not request.quiet:
        render.say(console, render.timings(completion, reading(llm, completion)))
    return completion


def start(
    llm: LLM, prompt: str, params: SamplingParams, request: Request, cancelled: Callable[[], bool]
) -> Iterator[Event]:
    """The events of the reply, with or without chat format."""
    if request.raw:
        return llm.stream(prompt, params, cancelled=cancelled)
    messages = [{"role": "user", "content": prompt}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    return llm.stream_chat(messages, params, thinking=request.thinking, effort=request.effort, cancelled=cancelled)


def write_code(completion: Completion) -> None:
    """The first code block of the answer: exact for a file or a pipe, made safe for a terminal.

    Raises GenerationError if there is none, or if the reply was cut inside it."""
    block = first_block(completion.text)
    if block is None:
        raise GenerationError("the answer has no fenced code block; without --extract it is printed as it is")
    if not block.closed and completion.finish_reason == "length":
        raise GenerationError("the reply was cut inside its first code block; allow more with --max-tokens or --ctx")
    code = block.text if block.closed or not block.text else f"{block.text}\n"
    sys.stdout.write(sanitize(code) if sys.stdout.isatty() else code)


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
