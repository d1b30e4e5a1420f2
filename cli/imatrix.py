"""`localmoe imatrix`: how large the inputs of a model's matrices are on a text, in a file for calibrated rounding.

Owns the options and the lines; does not know what is measured. Can be interrupted, and goes on."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli import options, render
from localmoe.cli.places import model_folder
from localmoe.cli.texts import words_of
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.api import LLM
    from localmoe.quantize.imatrix import Collected
    from localmoe.weights import Observer


def imatrix(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="A name of localmoe list, or a model directory; with --merge, files."),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to make, or to go on with.")],
    text: Annotated[Path | None, typer.Option("--text", "-f", metavar="FILE", help="Text to read, UTF-8.")] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", min=1, metavar="N", help="Of the text, so many; without it, all.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option("--chunk", min=2, metavar="N", help="Tokens that see each other. [default: 512]")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add up files of one model, of several texts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    ram: options.RamOption = None,
) -> None:
    """Make FILE, or complete it, and say what it has seen. Raises UsageError, ModelError or ResourceError."""
    if merge:
        if (text, tokens, chunk, kernels, threads, ram) != (None, None, None, "auto", None, None):
            raise UsageError("--merge runs no model; leave out all but the files and --output")
        _show(_merged(inputs, output), output, 0.0, as_json=as_json)
        return
    if text is None or len(inputs) != 1:
        raise UsageError("one model and --text FILE are needed, or --merge and several files")
    flags = options.ComputeFlags(kernels=kernels, threads=threads), options.PagingFlags(ram=ram)
    found, rate = _collected(model_folder(inputs[0]), words_of(text), _Job(output, chunk or 512, tokens), *flags)
    _show(found, output, rate, as_json=as_json)


@dataclass(frozen=True)
class _Job:
    output: Path
    chunk: int
    tokens: int | None


def _collected(
    model: Path, words: str, job: _Job, compute: options.ComputeFlags, flags: options.PagingFlags
) -> tuple[Collected, float]:
    """What the file holds at the end, and tokens per second; 0 if it was complete."""
    console, rates = render.open_console(), [0.0]
    try:
        with render.Waiting(console, f"loading {model}") as waiting:
            from localmoe.api import LLM
            from localmoe.quantize.calibrate import Text, collect
            from localmoe.tokenizer import Tokenizer

            def opener(observer: Observer) -> LLM:
                paging = flags.paging()
                return LLM(model, kernels=compute.kernels, threads=compute.threads, paging=paging, observer=observer)

            def show(done: int, total: int, rate: float) -> None:
                rates.append(rate)
                waiting.update(f"reading: token {done:,} of {total:,}, {rate:,.0f} tok/s")

            tokenizer = Tokenizer.load(model)
            digest = hashlib.sha256(words.encode()).hexdigest()
            text = Text(tokenizer.encode(words)[: job.tokens], digest, tokenizer.bos_id)
            return collect(model, text, job.output, job.chunk, opener, show), rates[-1]
    except KeyboardInterrupt:
        if job.output.exists():
            render.say(console, f"{job.output} has what was read so far; the same command goes on")
        raise


def _merged(inputs: list[Path], output: Path) -> Collected:
    from localmoe.quantize.imatrix import merge, write

    if len(inputs) < 2:
        raise UsageError("--merge needs at least two files")
    if output.exists():
        raise UsageError(f"{output}: is there already; choose another --output, or remove it")
    found = merge(inputs)
    write(output, found)
    return found


def _show(found: Collected, output: Path, rate: float, *, as_json: bool) -> None:
    from localmoe.checkpoint import some

    missed = sorted(found.missed)
    if as_json:
        facts = {"tokens": found.tokens, "rows": found.rows, "texts": len(found.texts), "matrices": len(found.sums),
                 "tokens_per_s": round(rate, 2), "missed_experts": missed}  # fmt: skip
        sys.stdout.write(json.dumps(facts, allow_nan=False) + "\n")
        return
    speed = f", {rate:,.0f} tok/s" if rate else ""
    typer.echo(f"{output}: {found.tokens:,} tokens, {len(found.sums):,} matrices{speed}")
    if missed:
        typer.echo(f"{len(missed):,} experts were chosen by no token and will be rounded plainly: {some(missed)}")
