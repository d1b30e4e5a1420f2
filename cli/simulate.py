"""`localmoe simulate`: what each cache policy would have hit, at any number of slots, on routing that was recorded.

Owns the options and the table; does not know how a policy decides. Loads no model. Memory: the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from localmoe.cli import render
from localmoe.cli.bench_common import Output, parse_names, parse_sizes, show
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.bench.report import Column, Record
    from localmoe.experts.policy import PolicyName
    from localmoe.experts.trace import Entry, Header

SHARES = "5,10,20,30,45,70"


@dataclass(frozen=True)
class Trace:
    """A whole recording."""

    header: Header
    entries: list[Entry]

    @property
    def total(self) -> int:
        """Experts of the model."""
        return self.header.num_layers * self.header.num_experts


def simulate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace that --trace-routing recorded.")],
    *,
    slots: Annotated[str | None, typer.Option(metavar="N,...", help="Numbers of slots, instead of --share.")] = None,
    share: Annotated[
        str | None, typer.Option(metavar="N,...", help=f"Slots in percent of all experts. [default: {SHARES}]")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Of best, aged, lru, s3fifo; all by default.")
    ] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="A table, CSV, or JSON lines.")] = "md",
) -> None:
    """Write a row for each size. Raises UsageError for a bad option or a file that is no trace."""
    if slots is not None and share is not None:
        raise UsageError("--slots and --share both say how many slots; leave one of them out")
    counts = None if slots is None else parse_sizes("--slots", slots, low=1)
    shares = parse_sizes("--share", SHARES if share is None else share, low=1)
    if max(shares) > 100:
        raise UsageError(f"--share is {share!r}, expected percent of all experts, from 1 to 100")
    from localmoe.experts.policies import POLICIES

    names = cast("list[PolicyName]", parse_names("--policy", policy, POLICIES))
    trace = read(file)
    if counts is None:
        counts = list(dict.fromkeys(max(trace.total * percent // 100, 1) for percent in shares))
    elif max(counts) > trace.total:
        raise UsageError(f"--slots is {slots!r}, expected at most {trace.total}: the experts of the model")
    check(trace)
    show(lambda report: rows(trace, counts, names, report), columns(names), output)


def read(file: Path) -> Trace:
    """Raises UsageError for a file that is no trace, or one of nothing."""
    from localmoe.experts.trace import TracedStep, read_trace
    from localmoe.files import shown

    with render.Waiting(render.open_console(), "reading the trace"):
        header, entries = read_trace(file)
        trace = Trace(header, list(entries))
    if not any(isinstance(entry, TracedStep) and any(use.experts for use in entry.uses) for entry in trace.entries):
        raise UsageError(f"{shown(file)}: holds no step in which an expert was used; record a longer reply")
    return trace


def check(trace: Trace) -> None:
    """Say whether a replay counts what the run did; nothing where all experts were in memory."""
    from localmoe.experts.policies import POLICIES
    from localmoe.experts.simulate import replay
    from localmoe.experts.trace import Counted

    header = trace.header
    if not header.capacity:
        return
    console = render.open_console()
    if header.warm:
        render.say(console, "the run began warm, so what it counted is not compared")
        return
    if header.policy not in POLICIES:
        render.say(console, f"recorded with the policy {header.policy!r}, which is not known here", kind="warning")
        return
    with render.Waiting(console, "replaying as recorded"):
        policy = POLICIES[header.policy](trace.total)
        counts = replay(header, trace.entries, header.capacity, policy, resize=True)
    counted = next((entry for entry in reversed(trace.entries) if isinstance(entry, Counted)), None)
    if counted is None:
        said = "the run was cut short and counted nothing"
    elif (counted.hits, counted.misses) == (counts.hits, counts.misses):
        said = "the run counted the same"
    else:
        said = f"the run counted differently: {counted.hits:,} hits, {counted.misses:,} misses"
    render.say(console, f"as recorded: {counts.hits:,} hits, {counts.misses:,} misses; {said}")


def rows(
    trace: Trace, sizes: Sequence[int], names: Sequence[PolicyName], report: Callable[[str], None]
) -> Iterator[Record]:
    """A record for each number of slots; hits in percent of all uses."""
    from localmoe.experts.paging import Paging
    from localmoe.experts.policies import POLICIES
    from localmoe.experts.simulate import belady, replay
    from localmoe.files import shown

    header, entries = trace.header, trace.entries
    for slots in sizes:
        found = {}
        for name in names:
            report(f"{slots:,} slots: {name}")
            found[name] = replay(header, entries, slots, POLICIES[name](trace.total)).hits
        report(f"{slots:,} slots: belady")
        best = belady(header, entries, slots)
        uses = best.hits + best.misses
        yield {
            "model": shown(header.model),
            "slots": slots,
            "share_percent": 100 * slots / trace.total,
            "slots_bytes": slots * header.expert_bytes,
            "uses": uses,
            **{f"{name}_hit_percent": 100 * hits / uses for name, hits in found.items()},
            "belady_hit_percent": 100 * best.hits / uses,
            "gap_closed_percent": gap_closed(found.get(Paging.policy), found.get("lru"), best.hits),
        }


def gap_closed(default: int | None, lru: int | None, best: int) -> float | None:
    """How much of what Belady gains over lru the default policy gains, in percent; None where it gains nothing."""
    if default is None or lru is None or best == lru:
        return None
    return 100 * (default - lru) / (best - lru)


def columns(names: Sequence[str]) -> list[Column]:
    """The table: a column of hits for each policy."""
    from localmoe.bench.report import Column, number

    return [
        Column("slots", number("slots", ",d")),
        Column("share %", number("share_percent")),
        Column("GiB", lambda record: f"{record['slots_bytes'] / 2**30:,.2f}"),
        *(Column(f"{name} hit %", number(f"{name}_hit_percent", ".2f")) for name in names),
        Column("Belady hit %", number("belady_hit_percent", ".2f")),
        Column("gap closed %", number("gap_closed_percent")),
    ]
