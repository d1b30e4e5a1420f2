"""How many of a layer's experts go to an accelerator, decided by the times of real steps.

Seconds and counts only. An expert that lies in RAM can be computed there by the CPU, or copied to the accelerator and
computed by it; both work at the same time, so the best division is the one that ends both together. Steps of many
tokens let experts pass through, which costs both something."""

from __future__ import annotations

from typing import Literal

# cpu: computing an expert in RAM. copy: bringing one to the accelerator. accelerator: computing one there. Of one that
# passes through: stage, what the CPU does for it; pass, what is copied.
Work = Literal["cpu", "copy", "accelerator", "stage", "pass"]

# A new time counts this much: the last few decide, so that one that is rarely measured is not believed for long.
_WEIGHT = 0.25
# After so many decisions of a kind, one is made otherwise, or a time that is never measured again would stay for ever.
RECHECK = 64
# Before anything is known of experts that pass through, the CPU computes one of so many, to be measured.
FIRST = 8


def load_of(uses: int, experts: int) -> int:
    """Experts with about as many tokens each take about as long: the power of two of their number."""
    return max(round(uses / max(experts, 1)), 1).bit_length()


class Costs:
    """Seconds per expert for each kind of work and load."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Work, int], float] = {}
        self._decisions: dict[tuple[Work, int], int] = {}

    def note(self, work: Work, load: int, experts: int, seconds: float) -> None:
        """So many experts took so long."""
        if not experts:
            return
        one, known = seconds / experts, self._seconds.get((work, load))
        self._seconds[work, load] = one if known is None else known + _WEIGHT * (one - known)

    def seconds(self, work: Work, load: int) -> float | None:
        """Of one expert, None if it has not been seen yet."""
        return self._seconds.get((work, load))

    def copies(self, load: int, resident: int, in_ram: int) -> int:
        """How many of in_ram experts to copy, when the accelerator has `resident` others to compute anyway."""
        if not in_ram:
            return 0
        return self._rechecked("copy", load, self._best(load, resident, in_ram), in_ram)

    def through(self, load: int, resident: int, others: int) -> int:
        """How many of `others` to let pass through the accelerator, which has `resident` ones to compute anyway."""
        if not others:
            return 0
        cpu, one, accelerator, stage = (self.seconds(work, load) for work in ("cpu", "pass", "accelerator", "stage"))
        if cpu is None or one is None or accelerator is None or stage is None:
            return others - others // FIRST

        def seconds(passing: int) -> float:
            # Copies overlap with what is computed there.
            device = max(passing * one, (resident + passing) * accelerator)
            return max(passing * stage + (others - passing) * cpu, device)

        return self._rechecked("pass", load, min(range(others + 1), key=seconds), others)

    def _rechecked(self, work: Work, load: int, best: int, most: int) -> int:
        self._decisions[work, load] = self._decisions.get((work, load), 0) + 1
        if self._decisions[work, load] % RECHECK:
            return best
        # The neighbour that measures what the best choice does not.
        return best - 1 if best == most else best + 1

    def _best(self, load: int, resident: int, in_ram: int) -> int:
        cpu, copy, accelerator = (self.seconds(work, load) for work in ("cpu", "copy", "accelerator"))
        if cpu is None:
            return 0
        if copy is None or accelerator is None:
            return 1

        def seconds(copies: int) -> float:
            # Copies overlap with what is computed meanwhile.
            device = max(copies * copy, resident * accelerator) + copies * accelerator
            return max((in_ram - copies) * cpu, device)

        return min(range(in_ram + 1), key=seconds)
