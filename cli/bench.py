"""`localmoe bench`: how fast a model, the kernels and this machine are. Tables go to stdout, progress to stderr.

Owns the options; does not know how anything is measured. `localmoe bench` alone is `localmoe bench end-to-end`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.core import TyperGroup

from localmoe.cli import options, render
from localmoe.cli.bench_batch import measure_batch
from localmoe.cli.bench_common import (
    MAX_REPETITIONS,
    OutputOption,
    RepetitionsOption,
    parse_sizes,
    prepare,
    show,
    warn,
)
from localmoe.cli.bench_context import measure_context
from localmoe.cli.bench_gpus import OnGpus, Plan, ResidentOption, WarmUpOption
from localmoe.cli.bench_kernels import measure_kernels
from localmoe.cli.bench_subject import Choice, ExpertsOption, LayersOption, SyntheticOption, WeightsOption
from localmoe.cli.sizes import parse_bytes

if TYPE_CHECKING:
    from localmoe.bench.endtoend import Trial
    from localmoe.models.model import ModelConfig

    Report = Callable[[str], None]

DEFAULT = "end-to-end"
# A mistyped number shall not fill the disk.
_MAX_DISK_GIB = 1024


class DefaultCommand(TyperGroup):
    """A group whose options, without a command, are those of DEFAULT."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, args if args and not args[0].startswith("-") else [DEFAULT, *args])


bench = typer.Typer(cls=DefaultCommand, add_completion=False, rich_markup_mode=None)
bench.command("batch")(measure_batch)
bench.command("context")(measure_context)
bench.command("kernels")(measure_kernels)


@dataclass(frozen=True)
class Sizes:
    """Prompt sizes, numbers of tokens to generate, and depths."""

    prompts: list[int]
    generations: list[int]
    depths: list[int]

    def trials(self, config: ModelConfig) -> list[Trial]:
        """Every combination. Raises UsageError for what does not fit in the model's context."""
        from localmoe.bench.endtoend import plan_trials

        return plan_trials(self.prompts, self.generations, self.depths, config.max_position_embeddings)


@bench.command(DEFAULT)
def measure_model(
    *,
    model: options.ModelOption = None,
    synthetic: SyntheticOption = None,
    layers: LayersOption = None,
    experts: ExpertsOption = None,
    weights: WeightsOption = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="N,...", help="Prompt sizes; 0 for none.")] = "512",
    generate: Annotated[
        str, typer.Option("--generate", "-n", metavar="N,...", help="Numbers of tokens to generate; 0 for none.")
    ] = "128",
    depth: Annotated[str, typer.Option("--depth", "-d", metavar="N,...", help="Tokens of context before.")] = "0",
    repetitions: RepetitionsOption = 5,
    output: OutputOption = "md",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "cpu",
    vram: options.VramOption = None,
    graphs: options.GraphsOption = None,
    resident: ResidentOption = None,
    warm_up: WarmUpOption = None,
) -> None:
    """Measure a model: pp512 reads a prompt of 512 tokens, tg128 generates 128, "@ d4096" with 4096 tokens before.

    With --device cuda, rows are measured again for every part of --resident: the model's layers are on GPUs, and of
    their routed experts that part, the others in RAM. "launches/token" are kernels of ours, and all with torch's.

    Also: `localmoe bench kernels` measures the MoE kernels, `localmoe bench paging` decoding with experts on disk,
    `localmoe bench batch` several replies together, `localmoe bench context` long contexts, `localmoe bench hardware`
    memory, disk and GPU."""
    choice = Choice(model, synthetic, layers, experts, weights)
    there = OnGpus(device, vram, resident, warm_up, graphs)
    choice.check()
    there.check()
    sizes = Sizes(*(parse_sizes(*given) for given in (("-p", prompt), ("-n", generate), ("-d", depth))))
    computing = choice.computing(prepare(kernels, threads, dtype))
    from localmoe.bench import endtoend

    if there.asked:
        plan = Plan.of(choice, computing, sizes.trials, repetitions)
        using = there.using(kernels)
        warn(kernels)
        notices: dict[str, None] = {}
        show(
            lambda report: plan.run(computing, using, there.parts(), report, notices.setdefault),
            endtoend.GPU_COLUMNS,
            output,
        )
        for notice in notices:
            render.say(render.open_console(), notice, kind="warning")
        return
    subject, trials = choice.open(computing, sizes.trials)
    warn(kernels)
    show(lambda report: endtoend.run(subject, trials, repetitions, report), endtoend.COLUMNS, output)


@bench.command("formats")
def measure_formats(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A model whose experts are rounded.")],
    *,
    calib: Annotated[Path | None, typer.Option(metavar="FILE", help="From localmoe imatrix of that model.")] = None,
    output: OutputOption = "md",
) -> None:
    """Measure what weight formats do to a model's experts: relative error per bit, rounded plainly and by search.

    Weighted errors count each input as much as it is used, by what localmoe imatrix has found."""
    from localmoe import backend
    from localmoe.bench import formats
    from localmoe.quantize.imatrix import Importance

    backend.use_cores(None)
    importance = None if calib is None else Importance.load(calib)
    show(lambda report: formats.run(model, importance, report), formats.COLUMNS, output)


@bench.command("paging")
def measure_paging(
    *,
    synthetic: Annotated[str, typer.Option(metavar="NAME", help="The shape: v4-flash or v4-pro.")] = "v4-flash",
    layers: Annotated[int, typer.Option(min=1, metavar="N", help="Its first N layers, with all of their experts.")] = 8,
    vocab: Annotated[
        int | None, typer.Option(min=1024, metavar="N", help="Tokens of the vocabulary, fewer than published.")
    ] = None,
    ram: Annotated[str, typer.Option("--ram", metavar="SIZE", help="RAM the process may take.")] = "8GB",
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where the experts are written.")] = Path(),
    tokens: Annotated[int, typer.Option("--generate", "-n", min=1, metavar="N", help="Tokens to measure.")] = 32,
    warm_up: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens before, to fill the slots.")] = 32,
    prompt: Annotated[
        int, typer.Option("--prompt", "-p", min=0, metavar="N", help="Tokens of a prompt to read first.")
    ] = 0,
    skewed: Annotated[
        bool, typer.Option("--skewed", help="Let a quarter of the experts get three picks of four.")
    ] = False,
    policy: options.PolicyOption = "best",
    guess: Annotated[bool, typer.Option(help="Read ahead what layers will probably choose.")] = True,
    output: OutputOption = "md",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
) -> None:
    """Measure decoding with experts on disk, beside what the same disk and memory can give.

    The experts (3.4 GB a layer of v4-flash) are written to --dir once and kept there for the next run."""
    size = parse_bytes(ram)
    computing = prepare(kernels, threads, "auto")
    from localmoe.bench import paging, shapes
    from localmoe.experts.paging import Paging

    config = shapes.cut(synthetic, layers, shapes.published(synthetic).num_experts, vocab)
    warn(kernels)
    with render.Waiting(render.open_console(), "opening") as waiting:
        how = Paging(ram=size, policy=policy, guess=guess)
        subject = paging.Paged(synthetic, config, folder, computing, how, waiting.update, skewed=skewed)
    trial = paging.Trial(tokens, warm_up, skewed, prompt)
    try:
        show(lambda report: paging.run(subject, trial, report), paging.COLUMNS, output)
    finally:
        subject.experts.close()


@bench.command("needle")
def find_needles(
    *,
    lengths: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of a haystack, multiples of 128.")
    ] = "4096,32768,131072,262144",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, max=MAX_REPETITIONS, metavar="N", help="Haystacks of each.")
    ] = 3,
    kv_format: Annotated[
        Literal["full", "fp8"], typer.Option(help="fp8 rounds the latent cache as the official code does.")
    ] = "full",
    output: OutputOption = "md",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    dtype: options.DtypeOption = "auto",
) -> None:
    """Test that what was read long ago is found: codes at seven depths of random text, asked for at its end.

    The model is made for it, weight by weight, in the architecture of V4: what it does not find was damaged on the way.
    Each code is reached by one kind of compressed attention alone, csa or hca. 256K tokens take minutes a haystack."""
    counts = parse_sizes("--lengths", lengths, low=1)
    computing = prepare(kernels, threads, dtype)
    from localmoe.bench import needle

    needle.check_lengths(counts)
    engine = needle.open_needle(computing, quantize_kv=kv_format == "fp8")
    warn(kernels)
    show(lambda report: needle.run(engine, counts, repetitions, report), needle.COLUMNS, output)


@bench.command("hardware")
def measure_hardware(
    *,
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="A folder on the disk to measure.")] = Path(),
    disk_gib: Annotated[
        int, typer.Option(min=1, max=_MAX_DISK_GIB, metavar="GIB", help="Size of the file that is read, then gone.")
    ] = 1,
    repetitions: RepetitionsOption = 10,
    output: OutputOption = "md",
    threads: options.ThreadsOption = None,
) -> None:
    """Measure reading and copying memory, reading from disk, and the GPU if there is one."""
    library = prepare("auto", threads, "auto").library
    from localmoe.bench import hardware

    place = hardware.Place(folder, disk_gib << 30)
    hardware.check_room(place)
    warn("auto")
    show(lambda report: hardware.run(library, place, repetitions, report), hardware.COLUMNS, output)
    import torch

    if not torch.cuda.is_available():
        render.say(render.open_console(), "no GPU: torch finds none")
