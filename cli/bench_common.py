"""What the commands of `localmoe bench` share: their options, what they compute with, and how rows are written.

Owns lists of numbers and names; does not know what is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from localmoe import __version__
from localmoe.cli import options, render
from localmoe.errors import LocalMoeError, UsageError

if TYPE_CHECKING:
    from localmoe.bench.report import Column, Record
    from localmoe.bench.subject import Computing
    from localmoe.kernels.native import Library

    Report = Callable[[str], None]

Output = Literal["md", "csv", "jsonl"]
# Bounds that keep a mistyped number from filling memory or lasting for ever.
MAX_TOKENS, MAX_REPETITIONS = 1 << 24, 10_000

OutputOption = Annotated[
    Output,
    typer.Option("--output", "-o", help="A table, CSV, or JSON lines with every repetition."),
]
RepetitionsOption = Annotated[
    int,
    typer.Option("--repetitions", "-r", min=1, max=MAX_REPETITIONS, metavar="N", help="How often to measure each."),
]


def parse_sizes(option: str, given: str, low: int = 0) -> list[int]:
    """A list of whole numbers with commas, each once. Raises UsageError for anything else."""
    try:
        sizes = [int(part) for part in given.split(",")]
    except ValueError:
        raise UsageError(f"{option} is {given!r}, expected whole numbers with commas, for example 1,16") from None
    if not all(low <= size <= MAX_TOKENS for size in sizes):
        raise UsageError(f"{option} is {given!r}, expected numbers from {low} to {MAX_TOKENS}")
    return list(dict.fromkeys(sizes))


def parse_names(option: str, given: str | None, known: Collection[str]) -> list[str]:
    """A list of names with commas, each once; without one, all there are. Raises UsageError for an unknown name."""
    names = list(known) if given is None else list(dict.fromkeys(given.split(",")))
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UsageError(f"{option} does not know {unknown!r}, only {', '.join(known)}")
    return names


def prepare(kernels: options.Kernels, threads: int | None, dtype: options.Dtype) -> Computing:
    """Choose kernels and threads as a model would. Imports torch."""
    from localmoe import backend
    from localmoe.bench.subject import DTYPES, Computing

    return Computing(DTYPES[dtype], backend.choose(kernels, threads))


def warn(kernels: options.Kernels) -> None:
    """Say so if what is about to be measured is slow for want of compiled kernels."""
    from localmoe import backend

    notice = backend.shortfall(kernels)
    if notice:
        render.say(render.open_console(), notice, kind="warning")


def compiled(threads: int | None) -> Library:
    """The compiled kernels. Raises LocalMoeError saying why there are none."""
    from localmoe import backend
    from localmoe.kernels import native

    library = native.load()
    if isinstance(library, str):
        raise LocalMoeError(f"no compiled kernels: {library}")
    backend.choose("native", threads)
    return library


def show(measure: Callable[[Report], Iterator[Record]], columns: Sequence[Column], output: Output) -> None:
    """Write every row when it is measured; the line that says what is measured is gone while a row is written."""
    from localmoe.bench.report import open_writer

    waiting: list[render.Waiting] = []
    rows = measure(lambda doing: waiting[-1].update(doing))
    writer = open_writer(output, sys.stdout, columns)
    while True:
        with render.Waiting(render.open_console(), "measuring") as line:
            waiting[:] = [line]
            row = next(rows, None)
        if row is None:
            return
        writer.row(row | {"localmoe": __version__})
