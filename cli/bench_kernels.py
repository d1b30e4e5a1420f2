"""`localmoe bench kernels`: one MoE layer in the compiled kernels, or what a layer needs in those of a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from localmoe.cli import options
from localmoe.cli.bench_common import (
    Output,
    OutputOption,
    RepetitionsOption,
    compiled,
    parse_names,
    parse_sizes,
    show,
)
from localmoe.errors import UsageError


def measure_kernels(
    *,
    shapes: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Of v4-flash, v4-pro, v3, v2-lite; all by default.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Of fp4, int4, int8, fp8_block, bf16, nf4 and, on the CPU, book3, book2; all by default.",
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens of a call.")] = "1,4,16,64,512",
    repetitions: RepetitionsOption = 20,
    output: OutputOption = "md",
    threads: options.ThreadsOption = None,
    device: options.DeviceOption = "cpu",
) -> None:
    """Measure one MoE layer in the compiled kernels: up to 8 tokens against reading memory, more against torch in bf16.

    With --device cuda:0, the kernels of that GPU: experts, dense matrices (nf4 ones beside bitsandbytes, where it is
    installed) and attention to 128K tokens, as a percentage of how fast the GPU copies its memory and of torch's bf16
    product. Rows that take long end after three repetitions."""
    counts = parse_sizes("--tokens", tokens, low=1)
    from localmoe.bench import bank, kernels
    from localmoe.bench.shapes import EXPERT_SHAPES

    names = parse_names("--shapes", shapes, EXPERT_SHAPES)
    if device != "cpu":
        _measure_gpu(device, (names, formats, counts), repetitions, output, threads)
        return
    packings = parse_names("--formats", formats, bank.PACKINGS)
    library = compiled(threads)
    what = kernels.Selection(names, packings, counts)
    show(lambda report: kernels.run(library, what, repetitions, report), kernels.COLUMNS, output)


def _measure_gpu(
    device: str, what: tuple[list[str], str | None, list[int]], repetitions: int, output: Output, threads: int | None
) -> None:
    """Raises UsageError for several GPUs, formats that they have no kernel for, or threads."""
    from localmoe import gpus
    from localmoe.bench import gpu_bank, gpu_kernels
    from localmoe.bench.kernels import Selection

    names, formats, counts = what
    if threads is not None:
        raise UsageError("threads belong to the CPU's kernels, which are not measured with --device; leave threads out")
    packings = parse_names("--formats", formats, gpu_bank.GPU_FORMATS)
    found = gpus.find(device, None)
    if len(found) > 1:
        raise UsageError(f"{len(found)} GPUs are found, kernels are measured on one; name it, as in --device cuda:0")
    # Ours, not the faster of ours and others.
    ops, _ = gpus.kernels_for(found, "native")
    assert ops is not None, "only the reference has none"
    selection = Selection(names, packings, counts)
    on = found[0].device
    show(lambda report: gpu_kernels.run(on, ops, selection, repetitions, report), gpu_kernels.COLUMNS, output)
