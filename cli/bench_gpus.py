"""Options of `localmoe bench` about GPUs, and the models they ask for, one after the other.

Owns the options; does not know how anything is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli import options
from localmoe.cli.bench_subject import Choice
from localmoe.cli.places import find_model
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.bench.endtoend import Trial
    from localmoe.bench.on_gpus import Using
    from localmoe.bench.report import Record
    from localmoe.bench.subject import Computing, Subject
    from localmoe.models.model import ModelConfig

Report = Callable[[str], None]

ResidentOption = Annotated[
    str | None,
    typer.Option(
        "--resident",
        metavar="PERCENT,...",
        help="With --device cuda: the part of the routed experts that GPUs may hold, for example 100,50,10.",
    ),
]
WarmUpOption = Annotated[
    int | None,
    typer.Option(
        "--warm-up", min=1, metavar="N", help="With --device cuda: tokens before, to fill GPUs' slots; 128 without it."
    ),
]


@dataclass(frozen=True)
class OnGpus:
    """What the options ask for. device, vram, graphs: as of localmoe run."""

    device: str
    vram: str | None
    resident: str | None
    warm_up: int | None
    graphs: bool | None = None

    @property
    def asked(self) -> bool:
        return self.device != "cpu"

    def check(self) -> None:
        """Raises UsageError for options that would have no effect, or are out of range."""
        if not self.asked and (self.vram, self.resident, self.warm_up, self.graphs) != (None, None, None, None):
            raise UsageError("--vram, --resident, --warm-up and --graphs are about GPUs; they need --device cuda")
        self.parts()

    def parts(self) -> list[float]:
        """What GPUs may hold of the experts, each once. Raises UsageError."""
        given = "100" if self.resident is None else self.resident
        try:
            parts = [float(part) / 100 for part in given.split(",")]
        except ValueError:
            parts = [-1.0]
        if not all(0 <= part <= 1 for part in parts):
            raise UsageError(f"--resident is {given!r}, expected percents from 0 to 100, for example 100,50,10")
        return list(dict.fromkeys(parts))

    def using(self, kernels: options.Kernels) -> Using:
        """Find the GPUs and measure how fast they copy. Raises UsageError or ResourceError."""
        from localmoe import gpus
        from localmoe.bench.hardware import copy_rate
        from localmoe.bench.on_gpus import WARM_UP_TOKENS, Using

        gpus.check_graphs(self.graphs, self.device, kernels)
        found = gpus.find(self.device, options.parse_vram(self.vram))
        ops, accelerate = gpus.kernels_for(found, kernels)
        rates = {gpu.device: copy_rate(gpu.device) for gpu in found}
        return Using(tuple(found), ops, accelerate, rates, self.warm_up or WARM_UP_TOKENS, self.graphs)


@dataclass(frozen=True)
class Plan:
    """The model to open on GPUs, several times, and what to measure each time."""

    choice: Choice
    config: ModelConfig
    trials: list[Trial]
    repetitions: int

    @classmethod
    def of(
        cls, choice: Choice, computing: Computing, trials: Callable[[ModelConfig], list[Trial]], repetitions: int
    ) -> Plan:
        """Everything that can be refused before a GPU is asked. Raises UsageError, ModelError or ResourceError."""
        from localmoe.bench import subject, synthetic

        if choice.synthetic is None:
            config = subject.directory_config(find_model(choice.model))
        else:
            config = synthetic.plan(choice.synthetic, computing.held, choice.layers, choice.experts)
        return cls(choice, config, trials(config), repetitions)

    def run(
        self, computing: Computing, using: Using, parts: list[float], report: Report, notice: Callable[[str], object]
    ) -> Iterator[Record]:
        """The rows of each part of the experts on GPUs. One model is gone before the next is made.

        notice: told why decode steps were no graphs, once for each row of them."""
        from localmoe.bench import endtoend
        from localmoe.memory import give_back_device_memory

        for part in parts:
            opened = self._open(computing, using.holding(part), report)
            try:
                for row in endtoend.run(opened, self.trials, self.repetitions, report):
                    if row["graphs_notice"] is not None:
                        notice(row["graphs_notice"])
                    yield row
            finally:
                if opened.gpus is not None and opened.gpus.cache is not None:
                    opened.gpus.cache.close()
            del opened
            gc.collect()
            give_back_device_memory()

    def _open(self, computing: Computing, using: Using, report: Report) -> Subject:
        from localmoe.bench import gpu_subject

        context = max(trial.depth + trial.count for trial in self.trials)
        if self.choice.synthetic is None:
            return gpu_subject.open_directory(find_model(self.choice.model), computing, using, context, report)
        return gpu_subject.open_synthetic(self.choice.synthetic, self.config, computing, using, context, report)
