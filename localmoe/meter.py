"""The limit meter: what a reply of a paged model waited for, in a phrase. Arithmetic on counts; measures nothing."""

from __future__ import annotations

from localmoe.events import Stats
from localmoe.experts.paged import PagerStats

# A share of the time above which a resource is called the limit.
_MOST_OF_IT = 0.5


def seconds(stats: Stats) -> float:
    """Of prompt and reply."""
    return stats.prefill_seconds + stats.decode_seconds


def tokens(stats: Stats) -> int:
    """Computed, prompt and reply."""
    return stats.prompt_tokens - stats.reused_tokens + stats.generated_tokens


def disk_bytes_per_s(paging: PagerStats) -> float:
    """While there was something to read."""
    return paging.bytes_read / paging.busy_seconds if paging.busy_seconds else 0.0


def verdict(stats: Stats, paging: PagerStats) -> str:
    """For example `hits 71 % | disk 0.53 GB/tok at 3.1 GB/s | bound by the disk (59 % of the time)`."""
    total = seconds(stats)
    waiting = min(paging.wait_seconds / total, 1.0) if total else 0.0
    bound = "the disk" if waiting > _MOST_OF_IT else "memory and computing"
    share = waiting if waiting > _MOST_OF_IT else 1 - waiting
    parts = [f"hits {100 * paging.hit_rate:.0f} %"]
    if paging.bytes_read:
        per_token = paging.bytes_read / max(tokens(stats), 1) / 1e9
        parts.append(f"disk {per_token:.2f} GB/tok at {disk_bytes_per_s(paging) / 1e9:.1f} GB/s")
    parts.append(f"bound by {bound} ({100 * share:.0f} % of the time)")
    return " | ".join(parts)
