"""Experts that a layer will probably ask for, read while the disk has nothing else to do.

Knows keys, slots and jobs; does not know how a guess is made. The slots are its own, so that a wrong guess pushes
nothing out, and what the table of residents decides does not depend on guesses. Stops where they do not come true."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from localmoe.experts.reader import Job, Reader

# Guesses are stopped when fewer than this share of them come true, judged over so many, for so many layers: a wrong
# one costs what is read of it before the layer's own reads go first, and the disk's time if others use it.
_LEAST_TRUE, _JUDGED, _PAUSE = 0.25, 128, 2048


@dataclass
class GuessCounts:
    """Experts read on a guess, and those of them that were asked for."""

    made: int = 0
    true: int = 0


class Guesses:
    """What has been read, or is being read, and not been asked for."""

    def __init__(self, slots: Sequence[int], reader: Reader, clear: Callable[[int], None]) -> None:
        """slots: its own to begin with; claim() exchanges them. clear(key): a guess's slot is used for another."""
        self.counts = GuessCounts()
        self._spare, self._reader, self._clear = list(slots), reader, clear
        self._read: dict[int, tuple[int, Job]] = {}
        self._recent = GuessCounts()
        self._pause = 0

    def worthwhile(self) -> bool:
        """Whether to guess now; to be asked once a layer."""
        if self._pause:
            self._pause -= 1
            return False
        return bool(self._spare or self._read)

    def begin(self, keys: Iterable[int], read: Callable[[int, int], Job]) -> None:
        """read(key, slot) those of the keys that there is room for, the likeliest first."""
        wanted = [key for key in keys if key not in self._read]
        for key in wanted[: len(self._spare) + len(self._read)]:
            slot = self._room()
            self._read[key] = slot, read(key, slot)
            self.counts.made += 1
            self._recent.made += 1

    def claim(self, key: int, slot: int) -> tuple[int, Job] | None:
        """The key is asked for: its slot and job, in exchange for a slot; None if it was not guessed."""
        found = self._read.pop(key, None)
        if found is None:
            return None
        if found[1].error is not None:
            # Cancelled, perhaps while it was being read; or failed, and then read again so that who asked is told.
            self._reader.settle(found[1])
            self._spare.append(found[0])
            self._clear(key)
            return None
        self._reader.hurry(found[1])
        self._spare.append(slot)
        self.counts.true += 1
        self._recent.true += 1
        return found

    def judge(self, needed: Collection[int]) -> None:
        """A layer has said what it needs: stop reading what it does not, and see whether guessing is worth it."""
        for key, (_slot, job) in self._read.items():
            if key not in needed:
                self._reader.cancel(job)
        if self._recent.made >= _JUDGED:
            if self._recent.true < _LEAST_TRUE * self._recent.made:
                self._pause = _PAUSE
            self._recent = GuessCounts()

    def begin_again(self, slots: Sequence[int]) -> None:
        """After an interruption: nothing has been guessed, and these slots are its own."""
        self._read.clear()
        self._spare = list(slots)

    def _room(self) -> int:
        """A slot that nothing reads into, the oldest guess's if need be."""
        if self._spare:
            return self._spare.pop()
        key = next(iter(self._read))
        slot, job = self._read.pop(key)
        self._reader.cancel(job)
        self._reader.settle(job)
        self._clear(key)
        return slot
