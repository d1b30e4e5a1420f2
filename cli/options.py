"""Options that several commands share: one spelling, one help line and one meaning each.

Knows the fields of SamplingParams by name only; imports neither torch nor the engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from localmoe.cli import render, settings
from localmoe.cli.places import find_model
from localmoe.cli.sizes import parse_bytes
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.api import LLM
    from localmoe.constraint import Constraint
    from localmoe.experts.paging import Paging
    from localmoe.sampler import SamplingParams

Thinking = Literal["off", "on"]
Effort = Literal["low", "high", "max"]
Dtype = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["auto", "native", "strict", "reference"]
Policy = Literal["best", "aged", "lru", "s3fifo"]


def _from_settings(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """What was given, else what localmoe config says about the option of that name.

    A default gives way to a given option that it cannot go with."""
    source = ctx.get_parameter_source(str(param.name))
    if ctx.resilient_parsing or source is None or source.name != "DEFAULT":
        return value
    # Options that were given are parsed before those that were not.
    given_way = {"ram": ctx.params.get("expert_slots") is not None, "threads": ctx.params.get("kernels") == "reference"}
    if given_way.get(str(param.name)):
        return value
    chosen = settings.find(str(param.name)).value
    return value if chosen is None else chosen


ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", metavar="MODEL", help="A directory or a name of localmoe list; by default localmoe-mini."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format of the activations.")]
KernelsOption = Annotated[
    Kernels,
    typer.Option(
        "--kernels",
        callback=_from_settings,
        help="native: compiled; strict: compiled, one order of additions; reference: PyTorch.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        callback=_from_settings,
        min=1,
        max=settings.MOST_THREADS,
        metavar="N",
        help="Without it, one per core.",
    ),
]
RamOption = Annotated[
    str | None,
    typer.Option(
        "--ram",
        callback=_from_settings,
        metavar="SIZE",
        help="RAM to take, for example 24GB; experts beyond it are read from disk.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda for all GPUs, or some: cuda:0,cuda:1. Not proven on a GPU yet.",
    ),
]
VramOption = Annotated[
    str | None,
    typer.Option("--vram", metavar="SIZE", help="Memory of each GPU to use, or 24GB,12GB; without it, what is free."),
]
GraphsOption = Annotated[
    bool | None,
    typer.Option(
        "--graphs/--no-graphs",
        help="Decode steps that are all on GPUs are told to them once, then played as a graph; so too without it.",
    ),
]
SlotsOption = Annotated[
    int | None, typer.Option("--expert-slots", min=2, metavar="N", help="Experts held in RAM, instead of --ram.")
]
PolicyOption = Annotated[Policy, typer.Option("--policy", help="Which experts stay; localmoe simulate compares them.")]
PackOption = Annotated[
    Path | None, typer.Option("--pack", metavar="DIR", help="Read experts from a pack made by localmoe pack.")
]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace-routing", metavar="FILE", help="Record which experts are chosen, for localmoe simulate."),
]
WarmOption = Annotated[
    Path | None,
    typer.Option("--warm-start", metavar="FILE", help="Begin with the experts that a recorded run ended with."),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--ctx", "-c", min=1, metavar="TOKENS", help="Longest prompt and reply together."),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", "-s", metavar="TEXT", help="Instruction that stands before the conversation.")
]
ThinkOption = Annotated[Thinking, typer.Option("--think", help="Let the model reason before it answers.")]
EffortOption = Annotated[Effort | None, typer.Option("--effort", help="How much to reason; needs --think on.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, reasoning or timings.")]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", "-n", min=1, metavar="TOKENS", help="Longest reply; without it, until the model ends."
    ),
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Make the sampled reply repeatable.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temp", callback=_from_settings, metavar="X", help="Randomness; 0 always takes the likeliest token."
    ),
]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", metavar="X", help="Keep tokens up to this total probability.")
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", metavar="N", help="Keep the N likeliest tokens; 0 keeps all.")
]
MinPOption = Annotated[
    float | None, typer.Option("--min-p", metavar="X", help="Keep tokens at least X times as likely as the likeliest.")
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option("--repetition-penalty", metavar="X", help="Above 1, make tokens that occurred already less likely."),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the reply before this text; may be given more than once."),
]
LogprobsOption = Annotated[
    int | None, typer.Option("--logprobs", min=0, metavar="N", help="With --json: log-probabilities, N best each.")
]


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """The sampling options as given; None leaves the model's default. Named like the fields of SamplingParams."""

    max_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: list[str] | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """The model's defaults with the given options in their place. Raises UsageError for values out of range."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["stop"] = tuple(self.stop) if self.stop else None
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def check_effort(thinking: Thinking, effort: Effort | None) -> None:
    """Raises UsageError for an effort that nothing would use."""
    if effort is not None and thinking == "off":
        raise UsageError(f"--effort {effort} has no effect without --think on; add it or leave --effort out")


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """How to compute; named like the arguments of LLM."""

    dtype: Dtype = "auto"
    kernels: Kernels = "auto"
    threads: int | None = None
    context: int | None = None
    device: str = "cpu"
    vram: tuple[int, ...] | None = None
    graphs: bool | None = None


def parse_vram(text: str | None) -> tuple[int, ...] | None:
    """One size, or one for each GPU. Raises UsageError for what is none."""
    return None if text is None else tuple(parse_bytes(size) for size in text.split(","))


@dataclass(frozen=True, kw_only=True)
class PagingFlags:
    """How experts are held; see localmoe.experts.paging.Paging."""

    ram: str | None = None
    slots: int | None = None
    policy: Policy = "best"
    trace: Path | None = None
    warm: Path | None = None
    pack: Path | None = None

    def paging(self) -> Paging:
        """Imports torch. Raises UsageError for a size that is none."""
        from localmoe.experts.paging import Paging

        ram = None if self.ram is None else parse_bytes(self.ram)
        return Paging(ram=ram, slots=self.slots, policy=self.policy, trace=self.trace, warm=self.warm, pack=self.pack)


def open_model(
    model: Path | None,
    flags: SamplingFlags,
    compute: ComputeFlags,
    paging: PagingFlags,
    *,
    quiet: bool,
) -> tuple[LLM, SamplingParams]:
    """Load a model, saying so on a terminal if it takes long; returns it with the parameters to sample it with.

    Imports torch. Raises ModelError for a model that there is not, UsageError for flags out of range before the load,
    ModelError or ResourceError from it."""
    model = find_model(model)
    name = "localmoe-mini" if model is None else str(model)
    with render.Waiting(render.open_console(), f"loading {name}", quiet=quiet) as waiting:
        from localmoe.api import LLM
        from localmoe.sampler import SamplingParams

        def show(done: int, total: int) -> None:
            waiting.update(f"loading {name}: {100 * done // total} %")

        flags.over(SamplingParams())
        llm = LLM(model, **asdict(compute), paging=paging.paging(), progress=show)
    for notice in (llm.kernels_notice, llm.graphs_notice if compute.graphs else None):
        if notice and not quiet:
            render.say(render.open_console(), notice, kind="warning")
    return llm, flags.over(llm.default_params())
