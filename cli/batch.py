"""`localmoe batch`: a file of requests into a file of replies. Run again, it goes on where it was.

Knows options and lines on stderr; what a request is and how rows are kept is in localmoe.batch."""

from __future__ import annotations

import functools
import json
import math
import shlex
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from localmoe.cli import batch_time, options, render
from localmoe.cli.batch_report import last_lines, shower, summary, tokens_text
from localmoe.cli.chat_interrupts import Interrupts
from localmoe.cli.endings import finishing
from localmoe.cli.json_schema import JsonSchemaOption, read_schema
from localmoe.cli.options import SamplingFlags
from localmoe.cli.places import find_model
from localmoe.errors import PartlyFailedError, UsageError
from localmoe.files import shown, write_atomically

# Requests that are looked at for how long all will take.
_SAMPLE = 200


def batch(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN", help="JSON lines, also .gz; - is stdin.")],
    *,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="File of replies; one line each.")],
    text: Annotated[bool, typer.Option("--text", help="IN is plain text: a prompt a line.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue prompts as plain text, without chat format.")] = False,
    errors: Annotated[
        Path | None, typer.Option("--errors", metavar="FILE", help="Keep the rows of what failed there, not in OUT.")
    ] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Bad lines become rows with an error; the others are answered.")
    ] = False,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Pass over fields that localmoe does not know.")
    ] = False,
    changed_input: Annotated[
        bool, typer.Option("--allow-changed-input", help="Go on with an OUT of another IN; keep what is asked alike.")
    ] = False,
    no_sort: Annotated[
        bool, typer.Option("--no-sort", help="Leave OUT in the order in which replies were done, not that of IN.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; the old OUT becomes OUT.old.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Run again what failed before.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check IN, count its tokens, say how long it takes, and end.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N requests.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only every Nth request, from the Ith; for several machines.")
    ] = None,
    replies: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, max=1024, metavar="N", help="Replies at once; else what is fastest."),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bytes for any batch size; kernels are strict.")
    ] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write counts and rates as JSON.")] = None,
    model: options.ModelOption = None,
    max_tokens: options.MaxTokensOption = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Requests without a seed get one from this.")] = 0,
    temp: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    json_schema: JsonSchemaOption = None,
    quiet: options.QuietOption = False,
    threads: options.ThreadsOption = None,
    ctx: options.ContextOption = None,
    device: options.DeviceOption = "cpu",
    vram: options.VramOption = None,
    graphs: options.GraphsOption = None,
    ram: options.RamOption = None,
) -> None:
    """Check IN, load the model and answer what OUT does not hold yet.

    Raises PartlyFailedError if some requests failed, KeyboardInterrupt for Ctrl-C."""
    from localmoe.batch.duration import Pace
    from localmoe.batch.estimate import estimate
    from localmoe.batch.input import Source
    from localmoe.batch.output import Output, pace_of
    from localmoe.batch.request import Reading
    from localmoe.batch.run import How, batch_size, run
    from localmoe.chat_format import render_of
    from localmoe.library import EMBEDDED
    from localmoe.loader import read_config
    from localmoe.sampler import SamplingParams
    from localmoe.tokenizer import Tokenizer

    first, every = _shard(shard)
    console = render.open_console()
    _refuse_same(source, out, errors)
    if deterministic and device != "cpu":
        raise UsageError("--deterministic holds on the CPU only; leave --device out")
    compute = options.ComputeFlags(kernels="strict" if deterministic else "auto", threads=threads, context=ctx,
                                   device=device, vram=options.parse_vram(vram), graphs=graphs)  # fmt: skip
    paging = options.PagingFlags(ram=ram)
    schema = read_schema(json_schema)
    lines = Source(source, sys.stdin.buffer, Reading(text, raw, ignore_unknown))
    folder = find_model(model) or EMBEDDED
    renderer = functools.cache(lambda: render_of(folder, read_config(folder)))
    survey = lines.check(
        renderer, lambda problem: render.say(console, problem, kind="warning"), skip_invalid=skip_invalid
    )
    chosen = range(first, len(survey.order), every)[:limit]
    flags = SamplingFlags(max_tokens=max_tokens, temperature=temp, top_p=top_p, top_k=top_k, constraint=schema)
    pace, planned = pace_of(out), None
    if dry_run or (pace is None and not quiet):
        some = chosen if dry_run else chosen[:: max(len(chosen) // _SAMPLE, 1)]
        defaults = flags.over(SamplingParams())
        found = estimate(lines.requests(survey, some, renderer), renderer, Tokenizer.load(folder), defaults)
        planned = batch_time.planned(found, folder, compute, paging, replies)
    if dry_run:
        typer.echo(f"{len(survey.order) - len(survey.bad)} requests are well-formed, {found.requests} of them chosen")
        typer.echo(tokens_text(found))
        typer.echo(batch_time.time_text(found.requests, pace or planned))
        return
    llm, params = options.open_model(model, flags, compute, paging, quiet=quiet)
    # Whoever ends it from outside is told how it went, and the pace is kept.
    with finishing():
        with closing(llm):
            if not survey.models <= {llm.name} and not quiet:
                render.say(console, f"{shown(llm.name)} answers all lines, also those that name another model")
            facts = llm.identity() | {"deterministic": str(deterministic)}
            sampling = asdict(params) | {"stop": list(params.stop), "stop_token_ids": list(params.stop_token_ids)}
            state = {"input": survey.sha256, "model": facts, "sampling": sampling, "seed": seed, "raw prompts": raw}
            with closing(Output(out, state, errors=errors, restart=restart, changed_input=changed_input)) as output:
                left = output.left(survey, chosen, retry_errors=retry_errors)
                if left and not quiet:
                    expected = batch_time.time_text(left, output.pace or planned)
                    render.say(console, f"{left:,} of {len(chosen):,} to do; {expected}")
                how = How(params, seed, facts, batch_size(llm, replies), deterministic, retry_errors)
                with (
                    Interrupts(leave_seconds=math.inf) as interrupts,
                    render.Waiting(console, "reading the prompts", quiet=quiet) as waiting,
                ):
                    counts = run(
                        llm,
                        lines.requests(survey, chosen, renderer),
                        output,
                        how,
                        cancelled=lambda: interrupts.must_stop,
                        show=shower(console, waiting, len(chosen), quiet=quiet),
                    )
                if counts.latencies:
                    output.remember(Pace(len(counts.latencies), counts.seconds))
                if not (counts.interrupted or no_sort):
                    output.sort(survey)
        if report is not None:
            write_atomically(report, json.dumps(summary(counts, len(chosen), llm.pager)).encode() + b"\n")
        if not quiet:
            for line in last_lines(counts, len(chosen)):
                render.say(console, line)
        if counts.interrupted:
            render.say(console, f"resume with: {_again(context.obj.typed)}")
            raise KeyboardInterrupt
    if counts.failed:
        where = f"{shown(errors or out)}: {counts.failed} of {len(chosen)} requests failed"
        raise PartlyFailedError(f"{where}; --retry-errors runs them again")


def _again(typed: tuple[str, ...]) -> str:
    # To begin anew once is enough.
    return shlex.join(["localmoe", *(word for word in typed if word != "--restart")])


def _refuse_same(*paths: Path | None) -> None:
    """Raises UsageError if a file would be input and output, or two outputs."""
    files = [path.resolve() for path in paths if path is not None]
    if len(set(files)) < len(files):
        raise UsageError("IN, OUT and the file of --errors must be different files; choose another name")


def _shard(given: str | None) -> tuple[int, int]:
    """Index of the first request and the distance to the next. Raises UsageError unless it is I/N, I at most N."""
    if given is None:
        return 0, 1
    index, _, count = given.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--shard is {shown(given)}, expected I/N, for example 1/4")
    return int(index) - 1, int(count)
