"""What a chat has cost so far: sums over its replies, for /stats and the line under the input. Plain arithmetic."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from localmoe.cli.meter import reading
from localmoe.cli.render import rate_text

if TYPE_CHECKING:
    from localmoe.api import LLM
    from localmoe.events import Completion, Stats


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

        memory = f"memory: {resident_memory() / 2**30:.2f} GiB of this process"
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
        meter = reading(self._llm, replace(self.last, stats=stats), self._before)
        if meter is None:
            return [*shown, "experts: all in memory"]
        from localmoe.meter import verdict

        # What was planned is of one length of context, and this is a sum.
        return [*shown, f"experts: {verdict(replace(meter, planned_tokens_per_s=None))}"]

    def toolbar(self, used: int) -> str:
        """The line under the input: model, context in use, speed of the last reply, and hits if experts are paged."""
        parts = [self._llm.name, f"context {used:,} of {self._llm.context:,}"]
        if self.last is not None:
            parts.append(rate_text(self.last.stats.decode_tokens_per_s).strip())
        paged = self._llm.pager
        if paged is not None:
            parts.append(f"expert hits {100 * paged.hit_rate:.0f} %")
        return " | ".join(part for part in parts if part)


def plus(one: Stats, other: Stats) -> Stats:
    """The sum of each count and time."""
    sums = {field.name: getattr(one, field.name) + getattr(other, field.name) for field in fields(one)}
    return replace(one, **sums)
