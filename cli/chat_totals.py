"""What a chat has cost so far: sums over its replies, for /stats and the line under the input. Plain arithmetic."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from rich.cells import cell_len

from localmoe.cli.meter import reading
from localmoe.cli.render import rate_text
from localmoe.files import sized

if TYPE_CHECKING:
    from localmoe.api import LLM
    from localmoe.events import Completion, Stats
    from localmoe.experts.paging import PagerStats

BAR_CELLS = 10


class Totals:
    """Counts since the chat began; what was undone or cleared has been computed and stays counted."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._before = llm.pager
        self.replies = 0
        self.last: Completion | None = None
        self._sum: Stats | None = None

    def add(self, completion: Completion) -> None:
        """Count one more reply."""
        self.replies += bool(completion.token_ids)
        self.last = completion
        self._sum = completion.stats if self._sum is None else plus(self._sum, completion.stats)

    def lines(self) -> list[str]:
        """What /stats shows."""
        from localmoe.device import resident_memory, total_memory
        from localmoe.events import rate

        memory = f"memory: {sized(resident_memory())} of this process"
        total = total_memory()
        shown = [memory if total is None else f"{memory}, {total / 2**30:.1f} GiB in the machine"]
        if self.last is None or self._sum is None:
            return ["nothing was generated yet", *shown]
        stats = self._sum
        shown = [
            f"{self.replies} {'reply' if self.replies == 1 else 'replies'}",
            f"read: {stats.prompt_tokens:,} tok, {stats.reused_tokens:,} of them reused"
            f"{rate_text(stats.prefill_tokens_per_s)}",
            # Without the first token of each reply, which the prefill gave.
            f"generated: {stats.generated_tokens:,} tok"
            f"{rate_text(rate(stats.generated_tokens - self.replies, stats.decode_seconds))}",
            *shown,
        ]
        if self._llm.graphs_notice is not None:
            shown.append(self._llm.graphs_notice)
        meter = reading(self._llm, replace(self.last, stats=stats), self._before)
        if meter is None:
            return [*shown, "experts: all in memory"]
        from localmoe.meter import verdict

        # What was planned is of one length of context, and this is a sum.
        return [*shown, f"experts: {verdict(replace(meter, planned_tokens_per_s=None))}"]

    def toolbar(self, used: int, columns: int) -> str:
        """The line under the input, in at most so many columns: what is least needed goes first."""
        from localmoe.device import resident_memory

        speed = "" if self.last is None else rate_text(self.last.stats.decode_tokens_per_s).strip()
        memory = sized(resident_memory())
        context = f"{used:,} of {self._llm.context:,}"
        tiers = "" if self._llm.pager is None else tier_bar(self._llm.pager)
        name = self._llm.name
        for parts in (
            (name, f"context {context}", speed, tiers and f"experts {tiers}", memory),
            (f"context {context}", speed, tiers and f"experts {tiers}", memory),
            (f"context {context}", speed, tiers, memory),
            (f"context {context}", speed, tiers),
            (context, speed, tiers[:BAR_CELLS]),
            (context, speed),
            (context,),
        ):
            line = " | ".join(part for part in parts if part)
            if cell_len(line) <= columns:
                return line
        return f"{used:,}"


def tier_bar(paged: PagerStats) -> str:
    """Where experts were found when they were used, for example `█████▒▒▒░░ VRAM 52 RAM 31 disk 17 %`."""
    found = _uses(paged)
    uses = sum(found.values())
    if not uses:
        return ""
    bar, upto = "", 0
    for count, mark in zip(found.values(), "█▒░", strict=True):
        upto += count
        bar += mark * (round(BAR_CELLS * upto / uses) - len(bar))
    return f"{bar} {' '.join(tier_shares(paged))} %"


def tier_shares(paged: PagerStats) -> list[str]:
    """In which tier experts were found, in percent: `RAM 83`, `disk 17`. VRAM only where it has some."""
    found = _uses(paged)
    uses = max(sum(found.values()), 1)
    return [f"{name} {100 * count / uses:.0f}" for name, count in found.items() if count or name != "VRAM"]


def _uses(paged: PagerStats) -> dict[str, int]:
    return {"VRAM": paged.vram_hits, "RAM": paged.hits, "disk": paged.misses}


def plus(one: Stats, other: Stats) -> Stats:
    """The sum of each count and time."""
    sums = {field.name: getattr(one, field.name) + getattr(other, field.name) for field in fields(one)}
    return replace(one, **sums)
