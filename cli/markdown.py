"""Markdown shown while it is being written, by appending only: what is on the screen is never erased or drawn again.

So it cannot damage what was scrolled away, and a resize in the middle is harmless. The price: what a line is must be
seen from its beginning. Words are shown when they are complete, **marked** ones with their partner mark, code line by
line, tables after some rows. Lines end where the model ended them. Text cut elsewhere gives the same output.

Knows lines and blocks; takes text that is sanitized already and returns what a terminal is to be sent."""

from __future__ import annotations

import re
from dataclasses import dataclass

from localmoe.cli import markdown_table
from localmoe.cli.markdown_code import Highlighter
from localmoe.cli.markdown_flow import BREAK, Flow
from localmoe.cli.markdown_spans import BOLD, CODE, DIM, TITLE, Piece, is_open, spans

# Characters that are waited for: the partner of a mark or the end of a word, and the end of a line of code.
_MAX_WAIT, _MAX_LINE = 240, 4000
_TAB = "    "
_PREFIX = re.compile(r"([ \t]*)(?:(>)[ ]?|([-*+])[ \t]+(?=\S)|(\d{1,9}[.)])[ \t]+(?=\S))")
_HEADING = re.compile(r"(#{1,6})[ \t]+(?=\S)")
_QUOTES = r"(?:[ ]{0,3}>[ ]?)"
_FENCE = re.compile(rf"({_QUOTES}*)[ \t]*(?:(?:[-*+]|\d{{1,9}}[.)])[ \t]+)?(`{{3,}}|~{{3,}})([^`]*)")
_RULE = re.compile(r"[ ]{0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}")
_INDENTED = re.compile(r"(?: {4}| {0,3}\t)[ \t]*")
# A line that may still become a rule, a fence or a row of a table. Holds for every beginning of such a line.
_UNDECIDED = re.compile(r"[ \t>\-*_=+#\d.)]*(?:`{0,2}|~{0,2}|`{3}.*|~{3}.*|\|.*)")


@dataclass
class _Fence:
    """A block of code that is open: in how many quotes, and the fence that it began with."""

    quotes: int
    fence: str
    highlighter: Highlighter | None

    def ends_with(self, line: str) -> bool:
        mark = line.strip(" \t")
        return len(mark) >= len(self.fence) and set(mark) == {self.fence[0]}


class Markdown:
    """One text."""

    def __init__(self, *, colors: bool) -> None:
        self._flow = Flow(colors=colors)
        self._colors = colors
        # The line that is read: not yet known what it is, or words that are shown as they come.
        self._held = ""
        self._flowing = False
        self._style = ""
        self._waiting, self._scanned, self._glued = "", 0, False
        self._code: _Fence | None = None
        self._cut_line = False
        self._table: str | markdown_table.Table | None = None
        # What the lines before say about the next.
        self._empty_line, self._anything = False, False
        self._in_list, self._code_may_begin = False, True

    def write(self, text: str, width: int) -> str:
        """Take a piece of text; returns what can be shown now. width: of the terminal, in cells."""
        self._flow.width = max(width, 1)
        first, *rest = text.split("\n")
        self._add(first)
        for part in rest:
            self._end_line()
            self._add(part)
        return self._flow.take()

    def close(self) -> str:
        """The text is over; returns the rest, which ends its line."""
        if self._held or self._flowing or self._cut_line:
            self._end_line()
        self._leave_table()
        return self._flow.take()

    def _add(self, part: str) -> None:
        """Take a part of a line."""
        if self._flowing:
            self._words(part)
            return
        self._held += part
        if self._code is not None:
            self._code_so_far()
        elif len(self._held) > _MAX_LINE or not self._may_be_more():
            line, self._held = self._held, ""
            self._begin(line)

    def _may_be_more(self) -> bool:
        """Whether the line so far must be complete before it is known what it is."""
        return _UNDECIDED.fullmatch(self._held) is not None or self._is_indented(self._held)

    def _is_indented(self, line: str) -> bool:
        return self._code_may_begin and not self._in_list and _INDENTED.match(line) is not None

    def _end_line(self) -> None:
        if self._flowing:
            self._finish()
            return
        line, self._held = self._held, ""
        if self._code is not None:
            self._line_of_code(self._code, line)
        elif not line.strip(" \t"):
            self._leave_table()
            self._empty_line = self._code_may_begin = True
        elif not self._row(line):
            self._line(line)

    def _line(self, line: str) -> None:
        """Show a complete line."""
        fence = _FENCE.fullmatch(line)
        if fence is not None:
            self._separate()
            self._code = _Fence(fence[1].count(">"), fence[2], Highlighter(fence[3]) if self._colors else None)
            self._show([(line, DIM)])
        elif _RULE.fullmatch(line):
            self._separate()
            self._show([("─" * min(self._flow.width, 80), DIM)])
        elif self._is_indented(line):
            self._separate()
            self._show([(line, CODE)])
        else:
            self._begin(line)
            self._finish()

    def _show(self, pieces: list[Piece]) -> None:
        self._flow.begin(pieces, [])
        self._flow.end()

    def _separate(self) -> None:
        """An empty line before what comes, if there was one."""
        self._leave_table()
        if self._empty_line and self._anything:
            self._flow.end()
        self._empty_line, self._anything = False, True

    # Text.

    def _begin(self, line: str) -> None:
        """Begin a line of text: what stands before its words, then the words so far."""
        self._separate()
        first: list[Piece] = []
        hanging: list[Piece] = []
        indented, at = line[:1] in (" ", "\t"), 0
        while (found := _PREFIX.match(line, at)) is not None:
            for piece, below in _shown_prefix(found):
                first.append(piece)
                hanging.append(below)
            self._in_list |= found[2] is None
            indented, at = True, found.end()
        space = line[at:][: len(line) - at - len(line[at:].lstrip(" \t"))].replace("\t", _TAB)
        at = len(line) - len(line[at:].lstrip(" \t"))
        self._in_list &= indented
        heading = _HEADING.match(line, at)
        self._style = "" if heading is None else BOLD if len(heading[1]) > 2 else f"{BOLD};{TITLE}"
        self._flow.begin([*first, (space, "")], [*hanging, (space, "")])
        self._code_may_begin, self._flowing = False, True
        self._words(line[at if heading is None else heading.end() :])

    def _words(self, text: str) -> None:
        """Show the words that are complete, up to the first mark that waits for its partner."""
        self._waiting += text
        waited = 0
        while (found := BREAK.search(self._waiting, self._scanned)) is not None or len(self._waiting) > _MAX_WAIT:
            if found is None or found.start() > _MAX_WAIT:
                self._put(waited or _MAX_WAIT, glued=not waited)
                waited = 0
            elif not is_open(self._waiting[: found.end()]):
                self._put(found.end())
                waited = 0
            else:
                waited = found.end()
                self._scanned = waited + (not found[0])

    def _put(self, end: int, *, glued: bool = False) -> None:
        """Show what waits, up to `end`. glued: the word goes on behind it."""
        self._flow.put(spans(self._waiting[:end], self._style, colors=self._colors), glued=self._glued)
        self._waiting, self._scanned, self._glued = self._waiting[end:], 0, glued

    def _finish(self) -> None:
        self._put(len(self._waiting))
        self._flow.end()
        self._flowing = False

    # Code.

    def _code_so_far(self) -> None:
        """Show the beginning of a line that is too long to wait for."""
        while len(self._held) > _MAX_LINE:
            self._flow.begin([(self._held[:_MAX_LINE], "")], [])
            self._held, self._cut_line = self._held[_MAX_LINE:], True

    def _line_of_code(self, code: _Fence, line: str) -> None:
        quotes = re.match(f"{_QUOTES}{{{code.quotes}}}", line)
        if self._cut_line:
            self._cut_line = False
            self._show([(line, "")])
        elif quotes is None:
            # The quote is over, and so is the code in it.
            self._code = None
            self._add(line)
            self._end_line()
        elif code.ends_with(line[quotes.end() :]):
            self._code = None
            self._show([(line, DIM)])
        else:
            text = line[quotes.end() :]
            pieces = [(text, "")] if code.highlighter is None else code.highlighter.line(text)
            self._show([(quotes[0], DIM), *pieces])

    # Tables.

    def _row(self, line: str) -> bool:
        """Take a line as a row of a table, or as what may be its header; False if it is neither."""
        if not line.lstrip(" ").startswith("|") or _INDENTED.match(line):
            self._leave_table()
            return False
        if isinstance(self._table, markdown_table.Table):
            self._append(self._table.add(line))
        elif self._table is not None and markdown_table.begins(self._table, line):
            table = markdown_table.Table(self._table, line, self._flow.width, colors=self._colors)
            if not table.fits:
                return False
            self._table = None
            self._separate()
            self._table = table
        else:
            self._leave_table()
            self._table = line
        return True

    def _leave_table(self) -> None:
        """Show what of a table was not shown; a header without rows was a line of text."""
        table, self._table = self._table, None
        if isinstance(table, markdown_table.Table):
            self._append(table.end())
        elif table is not None:
            self._begin(table)
            self._finish()

    def _append(self, lines: str) -> None:
        self._flow.append(lines)


def _shown_prefix(found: re.Match[str]) -> list[tuple[Piece, Piece]]:
    """What a quote's or an item's mark is shown as: on its line, and below it."""
    space, quote, bullet, _number = found.groups()
    space = space.replace("\t", _TAB)
    mark = "│ " if quote else "• " if bullet else f"{_number} "
    below = ("│ ", DIM) if quote else (" " * len(mark), "")
    return [((space, ""), (space, "")), ((mark, DIM if quote else ""), below)]
