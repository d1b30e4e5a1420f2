"""Source code coloured line by line, as soon as a line is complete, by pygments.

A lexer begins anew at every line, so a comment or string over several lines would be taken for code; what may be inside
of one is read again with its beginning, at most _MAX_LINES of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from localmoe.cli.markdown_spans import BOLD, DIM, Piece

if TYPE_CHECKING:
    from pygments.lexer import Lexer

_MAX_LINES, _MAX_LENGTH = 40, 500
_NAME = re.compile(r"[\w+#.-]+")
# By the names of token types; the longest that fits counts.
_STYLES = {
    "Comment": DIM,
    "Comment.Preproc": "35",
    "Generic.Deleted": "31",
    "Generic.Inserted": "32",
    "Keyword": "35",
    "Literal.Number": "36",
    "Literal.String": "32",
    "Name.Attribute": "36",
    "Name.Builtin": "36",
    "Name.Class": f"{BOLD};34",
    "Name.Decorator": "33",
    "Name.Function": f"{BOLD};34",
    "Name.Tag": "34",
    "Operator.Word": "35",
}


class Highlighter:
    """The lines of one block of code. A language that is not known is not coloured."""

    def __init__(self, info: str) -> None:
        """info: what stands after the fence; its first word is the language."""
        self._lexer = _lexer(info)
        self._open: list[str] = []

    def line(self, text: str) -> list[Piece]:
        """The pieces of the next line, whose texts together are the line."""
        if self._lexer is None or len(text) > _MAX_LENGTH:
            self._open.clear()
            return [(text, "")]
        before = sum(map(len, self._open))
        tokens = list(self._lexer.get_tokens("".join([*self._open, text, "\n"])))
        self._remember(text, tokens)
        pieces = _after(before, tokens)
        # A lexer may drop characters.
        return pieces if "".join(piece[0] for piece in pieces) == text else [(text, "")]

    def _remember(self, text: str, tokens: list[tuple[Any, str]]) -> None:
        last = next((str(kind) for kind, value in reversed(tokens) if value.strip()), "")
        self._open.append(f"{text}\n")
        if not last.startswith(("Token.Literal.String", "Token.Comment")) or len(self._open) > _MAX_LINES:
            self._open.clear()


def _lexer(info: str) -> Lexer | None:
    name = _NAME.search(info)
    if name is None:
        return None
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(name[0], stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


def _after(start: int, tokens: list[tuple[Any, str]]) -> list[Piece]:
    """The tokens behind the first `start` characters, without the newline at the end."""
    pieces: list[Piece] = []
    at = 0
    for kind, value in tokens:
        shown = value[max(start - at, 0) :].rstrip("\n")
        at += len(value)
        if shown:
            pieces.append((shown, _style(str(kind))))
    return pieces


def _style(kind: str) -> str:
    name = kind.removeprefix("Token.")
    while name and name not in _STYLES:
        name = name.rpartition(".")[0]
    return _STYLES.get(name, "")
