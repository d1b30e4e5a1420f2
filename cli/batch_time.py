"""What `localmoe batch` says beforehand of how long it will take: words; localmoe.batch.duration has the numbers.

Measures nothing, so it says something after a run of the same output, or after `localmoe plan` measured the machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from localmoe.cli import render
from localmoe.cli.options import ComputeFlags, PagingFlags

if TYPE_CHECKING:
    from localmoe.batch.duration import Pace
    from localmoe.batch.estimate import Estimate


def time_text(requests: int, pace: Pace | None) -> str:
    """For example `about 2h05m, as the last run of this output went`."""
    if pace is None:
        return "how long that takes is not known before some are done"
    seconds = render.time_text(pace.seconds_of(requests))
    if pace.planned:
        return f"planned: {seconds}, if every reply is as long as it may be"
    return f"about {seconds}, as the last run of this output went"


def planned(
    found: Estimate, folder: Path, compute: ComputeFlags, paging: PagingFlags, replies: int | None
) -> Pace | None:
    """What `localmoe plan` would say of these requests; None if it could not: it knows no strict kernels, it would have
    to ask GPUs for their memory, and this machine must have been measured. replies: at once; None is what fits."""
    from localmoe import backend
    from localmoe.batch import duration
    from localmoe.batch.size import most_at_once
    from localmoe.bench.rates import known_rates
    from localmoe.device import available_memory
    from localmoe.loader import read_config
    from localmoe.models.sizes import sizes_of_config

    unknown = compute.kernels == "strict" or compute.device != "cpu"
    chosen = None if unknown else backend.choose(compute.kernels, compute.threads)
    rates = None if chosen is None else known_rates(folder, chosen.library)
    available = available_memory()
    ram = paging.paging().ram or available
    if rates is None or ram is None:
        return None
    config = read_config(folder)
    sizes = sizes_of_config(config, folder.name)
    context = compute.context or config.max_position_embeddings
    most = replies or min(most_at_once(sizes, context, available), max(found.replies, 1))
    return duration.planned(found, sizes, rates, ram, most)
