"""What `localmoe batch` says while it runs and at the end, and what --report writes.

Knows counts; does not know requests or files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from localmoe.cli import render
from localmoe.device import peak_memory

if TYPE_CHECKING:
    from rich.console import Console

    from localmoe.batch.estimate import Estimate
    from localmoe.batch.run import Counts
    from localmoe.experts.paging import PagerStats

SECONDS_A_LINE = 60.0


def shower(console: Console, waiting: render.Waiting, total: int, *, quiet: bool) -> Callable[[Counts], None]:
    """What shows progress: a line that changes on a terminal, in a log one more line each minute."""
    said = 0.0

    def show(counts: Counts) -> None:
        nonlocal said
        waiting.update(progress(counts, total))
        if not quiet and not console.is_terminal and counts.seconds - said >= SECONDS_A_LINE:
            said = counts.seconds
            render.say(console, progress(counts, total))

    return show


def progress(counts: Counts, total: int) -> str:
    """For example `12 of 80 done, 1 failed, 140 tok/s, 2m05s left`."""
    ready = counts.done + counts.skipped
    parts = [f"{ready:,} of {total:,} done"]
    if counts.failed:
        parts.append(f"{counts.failed:,} failed")
    if counts.seconds and counts.done:
        parts.append(f"{counts.generated_tokens / counts.seconds:,.1f} tok/s")
        if ready < total:
            parts.append(f"{render.time_text((total - ready) * counts.seconds / counts.done)} left")
    return ", ".join(parts)


def tokens_text(found: Estimate) -> str:
    """For example `1,200 tokens of prompts, at most 4,000 of replies`."""
    parts = [f"{found.prompt_tokens:,} tokens of prompts"]
    if found.reply_tokens:
        parts.append(f"at most {found.reply_tokens:,} of replies")
    if found.open_ended:
        parts.append(f"{found.open_ended:,} replies without max_tokens, which only the context ends")
    return ", ".join(parts)


def last_lines(counts: Counts, total: int) -> list[str]:
    """What is said at the end: what was done, and what decoding more replies at once was worth."""
    lines = [progress(counts, total)]
    if counts.tokens_per_s:
        rates = ", ".join(f"{rate:,.1f} with {size}" for size, rate in counts.tokens_per_s.items())
        lines.append(f"decoding, in tokens per second by replies at once: {rates}")
    return lines


def summary(counts: Counts, total: int, pager: PagerStats | None) -> dict[str, Any]:
    """What --report writes. Latencies in seconds, from the start of a request's prompt to its last token; bytes.

    pager: what reading experts came to; None where all are in memory, as the fields about it are then."""
    ordered, seconds = sorted(counts.latencies), counts.seconds
    found = {name: value for name, value in asdict(counts).items() if name != "latencies"} | {"requests": total}
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        found[f"latency_{name}"] = ordered[int(share * (len(ordered) - 1))] if ordered else None
    found["generated_tokens_per_s"] = counts.generated_tokens / seconds if seconds else None
    found["requests_per_hour"] = 3600 * counts.done / seconds if seconds else None
    found["expert_hit_rate"] = None if pager is None else pager.hit_rate
    found["disk_bytes"] = None if pager is None else pager.bytes_read
    found["disk_wait_seconds"] = None if pager is None else pager.wait_seconds
    found["peak_memory_bytes"] = peak_memory()
    return found
