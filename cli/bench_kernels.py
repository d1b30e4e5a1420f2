"""`localmoe bench kernels`: one MoE layer in the compiled kernels, or in those of a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from localmoe.cli import options
from localmoe.cli.bench_common import OutputOption, RepetitionsOption, compiled, parse_names, parse_sizes, show


def measure_kernels(
    *,
    shapes: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Of v4-flash, v4-pro, v3, v2-lite; all by default.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Of fp4, int4, int8, fp8_block, bf16, nf4, book3, book2; all by default."
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens of a call.")] = "1,4,16,64,512",
    repetitions: RepetitionsOption = 20,
    output: OutputOption = "md",
    threads: options.ThreadsOption = None,
) -> None:
    """Measure one MoE layer in the compiled kernels: up to 8 tokens against reading memory, more against torch in bf16.

    Rows that take long end after three repetitions."""
    counts = parse_sizes("--tokens", tokens, low=1)
    from localmoe.bench import bank, kernels
    from localmoe.bench.shapes import EXPERT_SHAPES

    names = parse_names("--shapes", shapes, EXPERT_SHAPES)
    packings = parse_names("--formats", formats, bank.PACKINGS)
    library = compiled(threads)
    what = kernels.Selection(names, packings, counts)
    show(lambda report: kernels.run(library, what, repetitions, report), kernels.COLUMNS, output)
