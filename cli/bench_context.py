"""`localmoe bench context`: what a long context costs in time and memory, beside what `localmoe plan` expects."""

from __future__ import annotations

from typing import Annotated

import typer

from localmoe.cli import options
from localmoe.cli.bench_common import OutputOption, parse_sizes, prepare, show, warn
from localmoe.cli.bench_subject import Choice, ExpertsOption, LayersOption, SyntheticOption, WeightsOption


def measure_context(
    *,
    model: options.ModelOption = None,
    synthetic: SyntheticOption = None,
    layers: LayersOption = None,
    experts: ExpertsOption = None,
    weights: WeightsOption = None,
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Tokens of context, ascending.")] = "1024,8192,32768",
    tokens: Annotated[
        int, typer.Option("--generate", "-n", min=1, metavar="N", help="The last of them are decoded one by one.")
    ] = 16,
    made_up: Annotated[
        bool,
        typer.Option("--made-up", help="Fill the context with random rows, where reading it would take hours."),
    ] = False,
    output: OutputOption = "md",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    dtype: options.DtypeOption = "auto",
) -> None:
    """Measure one growing context: reading and decoding speed, and the most memory beside what was planned for it.

    "context" is what memory grows by from the loaded model on, decode state and work; "process" is all there is."""
    choice = Choice(model, synthetic, layers, experts, weights)
    choice.check()
    counts = parse_sizes("--lengths", lengths, low=1)
    computing = prepare(kernels, threads, dtype)
    from localmoe.bench import context

    subject, _ = choice.open(computing, lambda config: context.check(counts, tokens, config.max_position_embeddings))
    warn(kernels)
    show(lambda report: context.run(subject, counts, tokens, report, made_up=made_up), context.COLUMNS, output)
