"""`localmoe quantize`: a model directory into a smaller one, with a report of what that did to its numbers.

Owns the options and the lines; does not know how anything is rounded. Can be interrupted, and goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from localmoe.cli import render
from localmoe.cli.places import model_folder
from localmoe.errors import UsageError
from localmoe.files import shown, sized

if TYPE_CHECKING:
    from localmoe.checkpoint import Checkpoint
    from localmoe.quantize.fit import Fit
    from localmoe.quantize.imatrix import Importance
    from localmoe.quantize.job import Job
    from localmoe.quantize.recipe import Recipe

Format = Literal["keep", "fp4", "int8", "int4", "nf4", "int3", "int2"]
# Mean relative error of localmoe-mini's experts, as the report measures it (a test compares them).
FROM_FP4_PERCENT = {"int4_g32": 7.3, "int4_g64": 7.8, "int4_g128": 8.0, "nf4": 6.8, "book3": 12.5, "book2": 29.3}


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A name of localmoe list, or a model directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    *,
    experts: Annotated[
        Format, typer.Option(help="Format of the routed experts. int3 and int2: codebooks, 3.25 and 2.25 bits.")
    ] = "keep",
    dense: Annotated[Format, typer.Option(help="Format of attention, shared experts and dense layers.")] = "keep",
    group: Annotated[
        int | None,
        typer.Option("--group-size", metavar="32|64|128", help="Of int8 and int4: inputs per scale. [default: 32]"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Rules instead of --experts and --dense.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of a machine's memory, such as 64GB: experts lose least for that."),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(metavar="FILE", help="From localmoe imatrix: what matters is rounded better.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Cores to use; without it, all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and end.")] = False,
) -> None:
    """Make OUT, or complete it, and print the report. Raises UsageError, ModelError or ResourceError."""
    _check_flags(experts, dense, group, recipe, fit)
    from localmoe import backend
    from localmoe.checkpoint import Checkpoint
    from localmoe.quantize import report, target
    from localmoe.quantize.imatrix import Importance
    from localmoe.quantize.job import prepare
    from localmoe.quantize.recipe import Recipe

    source, console = model_folder(source), render.open_console()
    backend.use_cores(jobs, "--jobs")
    notice = backend.shortfall("auto")
    if notice:
        render.say(console, notice, kind="warning")
    importance = None if calib is None else Importance.load(calib)
    with Checkpoint.open(source) as checkpoint:
        if fit is not None:
            # Everything that can be refused before the work of measuring.
            target.check_target(prepare(checkpoint, out, Recipe(()), None))
        rules = _recipe(checkpoint, (experts, dense, group), recipe, fit, importance)
        # Where --fit has nothing to round, it is not the user's mistake to have calibrated.
        job = prepare(checkpoint, out, rules, None if fit is not None and not rules.rules else importance)
        for line in warnings(job, rules):
            render.say(console, line, kind="warning")
        if dry_run:
            for line in preview(job):
                typer.echo(line)
            if not target.check(job):
                typer.echo("all of it has been done already")
            return
        found = _made(checkpoint, job)
    typer.echo(report.markdown(found), nl=False)
    typer.echo(f"\n{row(found, job)}")


def _made(checkpoint: Checkpoint, job: Job) -> dict[str, Any]:
    """Makes it, showing how far it is; returns the report."""
    from localmoe.quantize import convert

    with render.Waiting(render.open_console(), f"reading {job.source}") as waiting:
        started, first = time.monotonic(), list[int]()

        def show(done: int, total: int) -> None:
            first.append(done)
            rate = (done - first[0]) / max(time.monotonic() - started, 1e-3)
            left = f", {(total - done) / rate / 60:.0f} min left" if rate else ""
            waiting.update(f"quantizing: {sized(done)} of {sized(total)}{left}")
            del first[1:]

        return convert.make(checkpoint, job, show)


def _check_flags(experts: Format, dense: Format, group: int | None, recipe: Path | None, fit: str | None) -> None:
    simple = experts != "keep" or dense != "keep" or group is not None
    if recipe is not None and simple:
        raise UsageError("--recipe says all that --experts, --dense and --group-size say; leave them out")
    if fit is not None and (simple or recipe is not None):
        raise UsageError("--fit finds the formats; leave --experts, --dense, --group-size and --recipe out")
    if group not in (None, 32, 64, 128):
        raise UsageError(f"--group-size is {group}, expected 32, 64 or 128")
    if group is not None and not {experts, dense} & {"int8", "int4"}:
        raise UsageError("--group-size has no effect without int8 or int4 for --experts or --dense; leave it out")


def _recipe(
    checkpoint: Checkpoint,
    given: tuple[Format, Format, int | None],
    path: Path | None,
    size: str | None,
    importance: Importance | None,
) -> Recipe:
    from localmoe.quantize.recipe import read, simple

    if size is None:
        experts, dense, group = given
        return simple(experts, dense, group or 32) if path is None else read(path)
    from localmoe.cli.sizes import parse_bytes
    from localmoe.quantize.fit import fit

    memory = parse_bytes(size)
    with render.Waiting(render.open_console(), "measuring formats") as waiting:
        found = fit(checkpoint, memory, importance, waiting.update)
    for line in fitted(found):
        typer.echo(line)
    return found.recipe


def fitted(found: Fit) -> list[str]:
    """What --fit has decided."""
    lines = [
        f"{sized(found.nbytes)} of weights for {sized(found.budget)} that are left for them; "
        f"mean error of the experts {100 * found.error:.1f} %"
    ]
    if found.nbytes > found.budget:
        lines.append("the smallest formats are still too large: experts will be read from disk when they are needed")
    counts: dict[tuple[str, str], int] = {}
    for part, choice in found.chosen:
        counts[part.matrices, choice.format] = counts.get((part.matrices, choice.format), 0) + 1
    lines += [f"{matrices} of {count} layers: {name}" for (matrices, name), count in sorted(counts.items())]
    return [*lines, ""]


def warnings(job: Job, rules: Recipe) -> list[str]:
    """What somebody who knows the formats would say before."""
    from localmoe.kernels import native

    found = []
    formats = {matrix.format for shard in job.shards.values() for matrix in shard.packed.values()}
    of_fp4: dict[str, list[int]] = {}
    for shard in job.shards.values():
        for matrix in shard.packed.values():
            if matrix.source_format == "fp4":
                sizes = of_fp4.setdefault(matrix.format, [0, 0])
                sizes[0] += matrix.source.nbytes
                sizes[1] += matrix.nbytes
    for fmt, (before, after) in of_fp4.items():
        if fmt in FROM_FP4_PERCENT:
            change = 100 * (after - before) / before
            size = f"saves {-change:.1f} %" if change < 0 else f"takes {change:.1f} % more room"
            error = f"changes its matrices by about {FROM_FP4_PERCENT[fmt]} %"
            found.append(f"the source is FP4 already: {fmt} {error} and {size}")
    if any(fmt.startswith("int8") and fmt != "int8_g32" for fmt in of_fp4):
        found.append("FP4 to int8 is exact in groups of 32 only")
    if isinstance(native.load(), str) and any(fmt.startswith("book") for fmt in formats):
        found.append("without the compiled kernels a matrix takes minutes to become a codebook")
    if job.limit is not None:
        found.append(job.limit[0].lower() + job.limit[1:].removesuffix("."))
    if not rules.rules:
        found.append("nothing is to be changed: this copies the model")
    return found


def preview(job: Job) -> list[str]:
    """What would be written."""
    from localmoe.device import free_disk

    counts: dict[tuple[str, str], int] = {}
    for shard in job.shards.values():
        for matrix in shard.packed.values():
            key = matrix.source_format, matrix.format
            counts[key] = counts.get(key, 0) + 1
    free = free_disk(job.out if job.out.exists() else job.out.absolute().parent)
    lines = [f"{len(job.shards)} shards, {sized(job.bytes_in)} in, {sized(job.bytes_out)} out"]
    lines += [f"{count:,} matrices from {source} to {fmt}" for (source, fmt), count in sorted(counts.items())]
    lines.append("everything else keeps its bytes")
    if free is not None:
        lines.append(f"{sized(free)} are free there")
    return lines


def row(found: dict[str, Any], job: Job) -> str:
    """A line to paste beside others."""
    formats = sorted({row["format"] for row in found["classes"]}) or ["unchanged"]
    largest = max((row["largest_error"] for row in found["classes"]), default=0.0)
    error = "exact" if largest == 0 else f"largest error {100 * largest:.2f} %"
    return f"| {shown(job.name)} | {', '.join(formats)} | {sized(found['bytes_out'])} | {error} |"
