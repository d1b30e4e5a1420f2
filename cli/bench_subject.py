"""The model that a `localmoe bench` command measures: a directory, or weights made up in a published shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from localmoe.cli import render
from localmoe.cli.places import find_model
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.bench.subject import Computing, Subject
    from localmoe.models.model import ModelConfig

T = TypeVar("T")

SyntheticOption = Annotated[
    str | None,
    typer.Option("--synthetic", metavar="NAME", help="Made-up weights in the shape of v4-flash, v4-pro, v3, v2-lite."),
]
LayersOption = Annotated[
    int | None, typer.Option("--layers", metavar="N", help="With --synthetic: only the first N layers.")
]
ExpertsOption = Annotated[
    int | None,
    typer.Option("--experts", metavar="N", help="With --synthetic: experts per layer; routing picks among them."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="FORMAT", help="With --synthetic: of all matrices, for example int4_g32."),
]


@dataclass(frozen=True)
class Choice:
    """What the options name. synthetic: a published shape, of which layers, experts and weights may change parts."""

    model: Path | None
    synthetic: str | None
    layers: int | None
    experts: int | None
    weights: str | None

    def check(self) -> None:
        """Raises UsageError for options that would have no effect. Quick, unless --weights must be looked up."""
        if self.synthetic is not None and self.model is not None:
            raise UsageError("--model and --synthetic name two models to measure; leave one of them out")
        if self.synthetic is None and (self.layers, self.experts, self.weights) != (None, None, None):
            raise UsageError("--layers, --experts and --weights shape a made-up model; they need --synthetic")
        if self.weights is None:
            return
        from localmoe.bench.synthetic import MATRICES
        from localmoe.files import shown

        if self.weights not in MATRICES:
            raise UsageError(f"--weights is {shown(self.weights)}, expected one of {', '.join(MATRICES)}")

    def computing(self, computing: Computing) -> Computing:
        """The same, with matrices in the format that is asked for."""
        return replace(computing, matrices=self.weights)

    def open(self, computing: Computing, check: Callable[[ModelConfig], T]) -> tuple[Subject, T]:
        """The model, ready to run, and what check made of its config before anything that takes long.

        Made up without a number of layers or experts, it has as many as fit. Raises ModelError or ResourceError."""
        from localmoe.bench import subject, synthetic

        computing = self.computing(computing)
        if self.synthetic is None:
            model = find_model(self.model)
            checked = check(subject.directory_config(model))
            with render.Waiting(render.open_console(), "loading") as waiting:
                return subject.open_directory(model, computing, waiting.update), checked
        config = synthetic.plan(self.synthetic, computing.held, self.layers, self.experts)
        checked = check(config)
        with render.Waiting(render.open_console(), "filling memory") as waiting:
            return subject.open_synthetic(self.synthetic, config, computing, waiting.update), checked
