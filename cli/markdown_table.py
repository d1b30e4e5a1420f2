"""A table of markdown as aligned columns. The first rows are waited for, because they fix the widths; every later row
is shown as soon as it is complete, wrapped in its cells."""

from __future__ import annotations

import re

from rich.cells import cell_len

from localmoe.cli.markdown_flow import Flow
from localmoe.cli.markdown_spans import BOLD, DIM, painted, spans

# The rows that are waited for. A slow model takes a minute for more.
_ROWS = 6
_LEAST, _GAP = 3, 3
_BAR = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")


def begins(header: str, rule: str) -> bool:
    """Whether two lines are the beginning of a table."""
    return _RULE.fullmatch(rule) is not None and len(_cells(header)) == len(_cells(rule))


class Table:
    """Rows go in; lines come out."""

    def __init__(self, header: str, rule: str, width: int, *, colors: bool) -> None:
        """width: of the terminal, which must have room: see fits()."""
        self._rows = [_cells(header)]
        self._columns = len(self._rows[0])
        self._right = [cell.endswith(":") and not cell.startswith(":") for cell in _cells(rule)]
        self._width, self._colors = width, colors
        self._widths: list[int] = []

    @property
    def fits(self) -> bool:
        """Whether the columns can be wide enough to be read."""
        return self._room >= (_LEAST + 1) * self._columns

    @property
    def _room(self) -> int:
        return self._width - _GAP * (self._columns - 1)

    def add(self, line: str) -> str:
        """Take a row; returns the lines that can be shown now."""
        cells = _cells(line)
        # More than there are columns are dropped by others; here nothing is.
        cells[self._columns - 1 :] = [" | ".join(cells[self._columns - 1 :])]
        self._rows.append(cells + [""] * (self._columns - len(cells)))
        return self.end() if self._widths or len(self._rows) > _ROWS else ""

    def end(self) -> str:
        """The rows that were not shown yet."""
        rows, self._rows = self._rows, []
        if self._widths:
            return "".join(self._row(row, "") for row in rows)
        self._fix(rows)
        rule = painted(("─┼─".join("─" * width for width in self._widths), DIM), colors=self._colors)
        return "".join([self._row(rows[0], BOLD), f"{rule}\n", *(self._row(row, "") for row in rows[1:])])

    def _fix(self, rows: list[list[str]]) -> None:
        """As wide as the widest cell; where that is too much, the widest columns share what is left."""
        wanted = [max(_LEAST, *(_natural(row[at]) for row in rows)) for at in range(self._columns)]
        most = next(most for most in range(self._room, 0, -1) if sum(min(w, most) for w in wanted) <= self._room)
        self._widths = [min(width, most) for width in wanted]

    def _row(self, cells: list[str], style: str) -> str:
        columns = [self._wrapped(cell, at, style) for at, cell in enumerate(cells)]
        height = max(map(len, columns))
        for column, width in zip(columns, self._widths, strict=True):
            column += [" " * width] * (height - len(column))
        bar = painted((" │ ", DIM), colors=self._colors)
        return "".join(f"{bar.join(line).rstrip(' ')}\n" for line in zip(*columns, strict=True))

    def _wrapped(self, cell: str, at: int, style: str) -> list[str]:
        """The lines of a cell, each as wide as its column."""
        flow = Flow(self._widths[at], colors=self._colors, hard=True)
        flow.put(spans(cell, style, colors=self._colors))
        lines = []
        for line, cells in flow.lines():
            space = " " * max(self._widths[at] - cells, 0)
            lines.append(space + line if self._right[at] else line + space)
        return lines


def _cells(line: str) -> list[str]:
    parts = _BAR.split(line.strip(" \t").removeprefix("|"))
    if len(parts) > 1 and not parts[-1].strip(" \t"):
        parts.pop()
    return [part.strip(" \t").replace("\\|", "|") for part in parts]


def _natural(cell: str) -> int:
    return sum(cell_len(text) for text, _ in spans(cell))
