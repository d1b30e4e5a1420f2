"""The limit meter: what a reply of a paged model cost, what it waited for, and how near it came to what the machine
can do. Arithmetic on counts and rates; measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from localmoe.events import Stats
from localmoe.experts.paging import PagerStats
from localmoe.models.sizes import ModelSizes
from localmoe.plan import Rates, decode_in_ram

# A share of the time above which a resource is called the limit.
_MOST_OF_IT = 0.5


@dataclass(frozen=True)
class Machine:
    """What a reading is compared with: the model's sizes, what this machine has been measured to do, the share of all
    experts that are held, and tokens of a prompt in one step."""

    sizes: ModelSizes
    rates: Rates
    held: float
    prefill_tokens: int


@dataclass(frozen=True)
class Reading:
    """Of one reply, prompt included. Bytes are per token, percentages of uses (hit, cold) or of the time.

    cold: uses of experts that had never been used before, which no cache can have. guessed: misses that were being read
    before they were sure. Against what the machine can do, None if its rates are not known: limit_percent is the time
    that its busiest part needs at least; planned is what `localmoe plan` says of decoding typical text."""

    hit_percent: float
    cold_percent: float
    guessed_percent: float
    disk_bytes: float
    memory_bytes: float
    disk_bytes_per_s: float
    wait_percent: float
    bound: str
    limit_percent: float | None = None
    planned_tokens_per_s: float | None = None


def read(stats: Stats, paging: PagerStats, machine: Machine | None = None) -> Reading:
    """The meter after a reply; paging: the counts of the reply alone."""
    total = stats.prefill_seconds + stats.decode_seconds
    computed = max(stats.prompt_tokens - stats.reused_tokens + stats.generated_tokens, 1)
    uses = max(paging.hits + paging.misses, 1)
    waiting = 100 * min(paging.wait_seconds / total, 1.0) if total else 0.0
    memory = paging.bytes_computed
    bound = "the disk" if waiting > 100 * _MOST_OF_IT else "memory and computing"
    limit = planned = None
    if machine is not None and total:
        parts = _least_seconds(stats, paging, machine)
        bound, seconds = max(parts.items(), key=lambda part: part[1])
        limit = 100 * seconds / total
        memory += _steps(stats, machine) * machine.sizes.dense_bytes_per_token
        planned = decode_in_ram(machine.sizes, machine.rates, machine.held, stats.prompt_tokens).tokens_per_s
    return Reading(
        hit_percent=100 * paging.hits / uses,
        cold_percent=100 * paging.first / uses,
        guessed_percent=100 * paging.true_guesses / max(paging.misses, 1),
        disk_bytes=paging.bytes_read / computed,
        memory_bytes=memory / computed,
        disk_bytes_per_s=paging.bytes_read / paging.busy_seconds if paging.busy_seconds else 0.0,
        wait_percent=waiting,
        bound=bound,
        limit_percent=limit,
        planned_tokens_per_s=planned,
    )


def _steps(stats: Stats, machine: Machine) -> int:
    """Forwards of a reply that shared none of them."""
    read = stats.prompt_tokens - stats.reused_tokens
    return -(-read // machine.prefill_tokens) + max(stats.generated_tokens - 1, 0)


def _least_seconds(stats: Stats, paging: PagerStats, machine: Machine) -> dict[str, float]:
    """What each part of the machine needs for the work if it never waits for another."""
    sizes, rates, steps = machine.sizes, machine.rates, _steps(stats, machine)
    tokens = stats.prompt_tokens - stats.reused_tokens + max(stats.generated_tokens - 1, 0)
    return {
        "the disk": paging.bytes_read / rates.disk,
        "memory": (paging.bytes_computed + steps * sizes.dense_bytes_per_token) / rates.dram,
        "arithmetic": tokens * sizes.flops_per_token / rates.flops,
        "Python": steps * sizes.num_layers * rates.seconds_per_layer,
    }


def verdict(reading: Reading) -> str:
    """For example `hits 71 % (cold 4 %) | disk 0.53 GB/tok at 3.1 GB/s | bound by the disk, 93 % of the limit`."""
    parts = [f"hits {reading.hit_percent:.0f} % (cold {reading.cold_percent:.0f} %)"]
    if reading.disk_bytes:
        # A small model's experts are a few hundred kB.
        size = (
            f"{reading.disk_bytes / 1e9:.2f} GB" if reading.disk_bytes >= 1e7 else f"{reading.disk_bytes / 1e6:.2f} MB"
        )
        parts.append(f"disk {size}/tok at {reading.disk_bytes_per_s / 1e9:.1f} GB/s")
    if reading.limit_percent is None:
        parts.append(f"bound by {reading.bound} (waited {reading.wait_percent:.0f} % of the time)")
    else:
        parts.append(f"bound by {reading.bound}, {reading.limit_percent:.0f} % of the limit")
    if reading.planned_tokens_per_s is not None:
        parts.append(f"planned {reading.planned_tokens_per_s:.2f} tok/s")
    return " | ".join(parts)
