"""Which of a session's marks are kept when there is room for no more: the latest, and ever fewer of what is longer ago.

Knows lengths and bytes only."""

from __future__ import annotations

from collections.abc import Sequence

# A mark copies windows and open compressor rows: 0.1 MiB of localmoe-mini, 23 MiB of V4-Flash.
MARK_BYTES = 64 << 20
LEAST_MARKS, MAX_MARKS = 8, 32
# Never dropped: where the last two turns and their questions begin.
LATEST = 4


def most_marks(mark_nbytes: int) -> int:
    """How many marks of so many bytes a session keeps."""
    return min(max(MARK_BYTES // max(mark_nbytes, 1), LEAST_MARKS), MAX_MARKS)


def least_useful(lengths: Sequence[int]) -> int:
    """Index of the mark to drop. lengths: of all marks, ascending, more than LATEST.

    Going back by d tokens should mean reading again a share of d, however large d is: the one whose neighbours are
    nearest to each other goes, measured by how long ago it was."""
    ends = [0, *lengths]

    def gap(index: int) -> float:
        # ends is shifted by one: ends[index] is the mark before.
        return (ends[index + 2] - ends[index]) / (ends[-1] - ends[index + 1])

    return min(range(len(lengths) - LATEST), key=gap)
