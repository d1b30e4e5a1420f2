"""How experts that do not fit are held, and what came of it. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localmoe.experts.policy import PolicyName


@dataclass(frozen=True)
class Paging:
    """How experts that do not fit are held. ram: bytes the process may take, None for what the machine can give.

    slots: experts held in RAM, instead of what `ram` allows. prefetch: read the experts of hash layers as soon as the
    tokens are known. guess: while a layer's attention runs, read what it will probably choose. trace: a file to record
    the routing in. warm: such a file; begin with the experts that it ended with. policy: what stays; see localmoe
    simulate. pack: a folder that localmoe pack has made of the model, to read from instead of its shards."""

    ram: int | None = None
    slots: int | None = None
    policy: PolicyName = "best"
    prefetch: bool = True
    guess: bool = True
    trace: Path | None = None
    warm: Path | None = None
    pack: Path | None = None


@dataclass(frozen=True)
class PagerStats:
    """Counts since the beginning; subtract two of them for what happened between.

    hits, misses, first: uses of experts, as in residency.Counts. bytes_read: from disk. bytes_computed: of experts.
    wait_seconds: the model waited for the disk. busy_seconds: the disk had something to read. guesses: experts read
    before it was sure that they were needed; true_guesses: and they were (such a use is still a miss). vram_hits: uses
    that found the expert in VRAM, which are no hits in RAM; copies: uses of experts that were copied there for it."""

    hits: int = 0
    misses: int = 0
    first: int = 0
    bytes_read: int = 0
    bytes_computed: int = 0
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0
    guesses: int = 0
    true_guesses: int = 0
    vram_hits: int = 0
    copies: int = 0

    def __add__(self, other: PagerStats) -> PagerStats:
        return PagerStats(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __sub__(self, before: PagerStats) -> PagerStats:
        return PagerStats(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))

    @property
    def hit_rate(self) -> float:
        """Share of uses that found the expert in memory, 0 if there was none."""
        found = self.hits + self.vram_hits
        return found / max(found + self.misses, 1)
