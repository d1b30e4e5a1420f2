"""`localmoe bench batch`: what decoding several replies together is worth, with a model or a made-up one on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli import options, render
from localmoe.cli.bench_common import OutputOption, parse_sizes, prepare, show, warn
from localmoe.cli.places import find_model
from localmoe.cli.sizes import parse_bytes
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.bench.batch import Batched
    from localmoe.bench.subject import Computing
    from localmoe.experts.paging import Paging

# Of a made-up model: 14 GB of experts.
_LAYERS = 4


def measure_batch(
    *,
    model: options.ModelOption = None,
    synthetic: Annotated[
        str | None, typer.Option(metavar="NAME", help="A made-up model instead: v4-flash or v4-pro, experts on disk.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Its first N layers, with all experts; 4 without it.")
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where its experts are written.")] = Path(),
    skewed: Annotated[bool, typer.Option("--skewed", help="A quarter of its experts gets most picks.")] = False,
    batch: Annotated[str, typer.Option(metavar="N,...", help="How many replies to decode together.")] = "1,2,4,8,16,32",
    tokens: Annotated[int, typer.Option("--generate", "-n", min=1, metavar="N", help="Steps to measure.")] = 16,
    warm_up: Annotated[int, typer.Option(min=1, metavar="N", help="Steps before, to fill the slots.")] = 8,
    ram: Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="RAM the process may take.")] = None,
    output: OutputOption = "md",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
) -> None:
    """Measure tokens per second against the number of replies decoded together, and what is read for a token."""
    counts = parse_sizes("--batch", batch, low=1)
    if synthetic is None and (skewed or folder != Path() or layers is not None):
        raise UsageError("--layers, --skewed and --dir are for --synthetic; leave them out")
    if synthetic is not None and model is not None:
        raise UsageError("--synthetic and --model are both given; leave one of them out")
    computing = prepare(kernels, threads, "auto")
    from localmoe.bench import batch as bench
    from localmoe.experts.paging import Paging

    paging = Paging(ram=None if ram is None else parse_bytes(ram))
    if synthetic is None:
        subject, close = _open(model, kernels, threads, paging)
    else:
        subject, close = _make_up(synthetic, layers or _LAYERS, folder, computing, paging, skewed=skewed)
    warn(kernels)
    try:
        show(lambda report: bench.run(subject, counts, tokens, warm_up, report), bench.COLUMNS, output)
    finally:
        close()


def _open(
    model: Path | None, kernels: options.Kernels, threads: int | None, paging: Paging
) -> tuple[Batched, Callable[[], None]]:
    from localmoe.api import LLM
    from localmoe.bench.batch import Batched

    with render.Waiting(render.open_console(), "loading"):
        llm = LLM(find_model(model), kernels=kernels, threads=threads, paging=paging)
    return Batched(llm.name, llm.engine, llm.backend.library if llm.backend else None, lambda: llm.pager), llm.close


def _make_up(
    name: str, layers: int, folder: Path, computing: Computing, how: Paging, *, skewed: bool
) -> tuple[Batched, Callable[[], None]]:
    from localmoe.bench import paging, shapes
    from localmoe.bench.batch import Batched

    config = shapes.cut(name, layers, shapes.published(name).num_experts, None)
    with render.Waiting(render.open_console(), "opening") as waiting:
        paged = paging.Paged(name, config, folder, computing, how, waiting.update, skewed=skewed)
    title = f"{name} synthetic, {layers} layers, {'skewed' if skewed else 'even'}"
    return Batched(title, paged.engine, computing.library, lambda: paged.experts.stats), paged.experts.close
