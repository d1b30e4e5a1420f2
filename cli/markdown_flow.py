"""Words put into lines of a terminal's width, with what hangs before them. Only appends: a word that is out stays.

Knows widths and styles; does not know markdown. Keeps the current column, and what has been written until it is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.cells import cell_len, chop_cells

from localmoe.cli.markdown_spans import Piece, painted

# Scripts that are written without spaces: a line may end after any character, but not before a closing one or after
# an opening one.
_WIDE = "\u2e80-\u9fff\uf900-\ufaff\uff01-\uff60\U00020000-\U0003ffff"
_OPENING = "（「『【《〈〔［｛"
_CLOSING = "），。！？；：、」』】》〉〕］｝ー…"
_BETWEEN = rf"(?<=[{_WIDE}])(?<![{_OPENING}])(?=[^ \t{_CLOSING}])"
_SPLIT = re.compile(rf"[ \t]+|{_BETWEEN}")
# In text that goes on: what follows must be there, or it would matter in which pieces it comes.
BREAK = re.compile(rf"[ \t]+(?=[^ \t])|{_BETWEEN}")


class Flow:
    """Lines of at most `width` cells, if no word is longer.

    hard: whether a longer word is cut; if not, it is left to the terminal, so that an address can still be copied."""

    def __init__(self, width: int = 80, *, colors: bool, hard: bool = False) -> None:
        """width: may be changed at any time and holds for what comes."""
        self.width = width
        self._colors, self._hard = colors, hard
        self._column = 0
        self._hanging: list[Piece] = []
        self._space = False
        self._written: list[str] = []
        self._ended: list[int] = []

    def take(self) -> str:
        """What was written since the last call."""
        text = "".join(self._written)
        self._written.clear()
        return text

    def append(self, lines: str) -> None:
        """Lines that are complete and painted already; the flow is at the beginning of one."""
        self._written.append(lines)

    def begin(self, first: list[Piece], hanging: list[Piece]) -> None:
        """Begin a line with `first`; the lines that it is wrapped into begin with `hanging`, if there is room."""
        self._hanging = hanging if 2 * _cells(hanging) <= self.width else []
        self._space = False
        self._emit(first)

    def lines(self) -> list[tuple[str, int]]:
        """What was written since the last call as lines, each with its cells; of a flow that is `hard`."""
        cells = [*self._ended, self._column]
        self._ended.clear()
        return list(zip(self.take().split("\n"), cells, strict=True))

    def end(self) -> None:
        """End the line."""
        if self._hard:
            self._ended.append(self._column)
        self._written.append("\n")
        self._column = 0

    def put(self, pieces: Iterable[Piece], *, glued: bool = False) -> None:
        """Continue the line. glued: with the second half of a word that was too long to wait for."""
        unit: list[Piece] = []
        for text, style in pieces:
            at = 0
            for found in _SPLIT.finditer(text):
                unit.append((text[at : found.start()], style))
                self._place(unit, glued=glued)
                self._space |= bool(found[0])
                unit, glued, at = [], False, found.end()
            unit.append((text[at:], style))
        self._place(unit, glued=glued)

    def _place(self, unit: list[Piece], *, glued: bool) -> None:
        cells = _cells(unit)
        if not cells:
            self._emit(unit)
            return
        space = self._space and not glued
        begins = self._column <= _cells(self._hanging)
        self._space = False
        if not glued and not begins and self._column + space + cells > self.width:
            self.end()
            self._emit(self._hanging)
        elif space and not begins:
            self._emit([(" ", "")])
        if self._hard and cells > self.width:
            self._emit_cut(unit)
        else:
            self._emit(unit)

    def _emit_cut(self, unit: list[Piece]) -> None:
        for text, style in unit:
            for part in chop_cells(text, max(self.width, 2)):
                if self._column + cell_len(part) > self.width and self._column:
                    self.end()
                self._emit([(part, style)])

    def _emit(self, pieces: list[Piece]) -> None:
        for text, style in pieces:
            if text:
                self._written.append(painted((text, style), colors=self._colors))
                self._column += cell_len(text)
        if self._column > self.width:
            # The terminal has gone on in its next line.
            self._column = (self._column - 1) % self.width + 1


def _cells(pieces: list[Piece]) -> int:
    return sum(cell_len(text) for text, _ in pieces)
