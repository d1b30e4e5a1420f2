"""Notices a reply that goes round in circles: the same words three times in a row, or the same line four times.

Pure functions of text, so it does not matter how the tokens fall. Time: a check looks at the last 8,000 characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words counted in a repeated piece: fewer is emphasis, a refrain or a list; more than that is a copied page.
SHORTEST, LONGEST = 8, 500
# How often in a row. In code and tables the same row may well stand three times.
PIECES, LINES = 3, 4
PIECES_IN_CODE, LINES_IN_CODE = 8, 12
# Enough for PIECES of LONGEST in most languages.
TAIL = 8_000
# A loop need not be seen at the very token; a check every few words costs nothing beside a model.
STEP = 48
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# Chinese, Japanese and Korean have no spaces: a character is a word. Signs are words too.
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+|[^\\w\\s]")
_FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)


class LoopGuard:
    """Fed with a reply piece by piece. found: the repeated words, once there is a loop."""

    def __init__(self) -> None:
        self.found: str | None = None
        self._kind = ""
        self._text = ""
        self._checked = 0

    def push(self, kind: str, text: str) -> None:
        """One more piece of text; a change of kind, such as from reasoning to answer, begins anew."""
        if kind != self._kind:
            self._kind, self._text, self._checked = kind, "", 0
        self._text += text
        if self.found is None and len(self._text) - self._checked >= STEP:
            self._checked = len(self._text)
            self.found = loop(self._text)


def loop(text: str) -> str | None:
    """What the end of a text repeats over and over; None if it does not."""
    tail = text[-TAIL:]
    # The last line is not complete, and what it will be is not known.
    *lines, last = tail.split("\n")
    ordered = len(_FENCE.findall(text)) % 2 == 1 or last.lstrip().startswith("|")
    words = _WORD.findall(tail)
    # The last word may not be complete either.
    return repeated_line(lines, LINES_IN_CODE if ordered else LINES) or repeated_piece(
        words[:-1], PIECES_IN_CODE if ordered else PIECES
    )


def repeated_line(lines: Sequence[str], times: int) -> str | None:
    """The line that stands `times` in a row at the end, blank ones not counted. Only of signs, it is a ruler."""
    ends = [line.rstrip() for line in lines if line.strip()][-times:]
    if len(ends) < times or len(set(ends)) > 1 or sum(map(len, _of_letters(_WORD.findall(ends[0])))) < 3:
        return None
    return ends[0].strip()


def repeated_piece(words: Sequence[str], times: int) -> str | None:
    """The shortest piece of SHORTEST to LONGEST words that stands `times` in a row at the end.

    A quarter of it must be words of letters: rows of numbers, dashes and table rulers repeat themselves rightly."""
    for size in range(SHORTEST, min(LONGEST, len(words) // times) + 1):
        # Nearly all sizes end here, before anything is copied.
        if words[-1 - size] != words[-1]:
            continue
        piece = list(words[-size:])
        if list(words[-times * size :]) == piece * times and 4 * len(_of_letters(piece)) >= size:
            return " ".join(piece)
    return None


def _of_letters(words: Sequence[str]) -> list[str]:
    """Words, names and Chinese characters, but no signs, numbers or 0x00."""
    return [word for word in words if word[0].isalpha()]
