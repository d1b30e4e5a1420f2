"""The inline marks of markdown: a stretch of one line taken apart into pieces of one style each. Pure functions.

Only what models write: `code`, **bold**, *italic*, _italic_, ~~struck~~, [label](address) and escaped marks. Anything
else, LaTeX and HTML above all, stays as it was written, and so does a mark without its partner."""

from __future__ import annotations

import re

# A text and its style: the numbers of an SGR sequence, such as "1;36"; empty for plain text.
Piece = tuple[str, str]

BOLD, DIM, ITALIC, STRUCK = "1", "2", "3", "9"
CODE, LINK, TITLE = "36", "34", "35"
_STYLES = {"***": f"{BOLD};{ITALIC}", "**": BOLD, "*": ITALIC, "_": ITALIC, "~~": STRUCK}

_SPAN = re.compile(
    r"\\(?P<escaped>[*_`~#|])"
    r"|(?P<ticks>(?<!`)`+(?!`))(?P<code>.+?)(?<!`)(?P=ticks)(?!`)"
    # No space inside the marks. Inside a word an underscore is a name's and a star is times; nor is it half of two.
    r"|(?P<stars>\*{2,3}|(?<![\w*])\*)(?=[^\s*])(?P<starred>.+?)(?<![\s*])(?P=stars)(?!\*)"
    r"|(?<!\w)_(?=[^\s_])(?P<lined>.+?)(?<![\s_])_(?!\w)"
    r"|~~(?=\S)(?P<struck>.+?)(?<=\S)~~"
    r"|!?\[(?P<label>[^\[\]]+)\]\((?P<address>[^()]*(?:\([^()]*\)[^()]*)*)\)"
)
# What may become a span when more comes. A star inside a word is a product.
_BEGUN = re.compile(r"`|(?<!\w)(?:\*|_(?!_)|~~)\S|\[[^\]]*$|\]\([^)]*$")


def spans(text: str, style: str = "", *, colors: bool = True) -> list[Piece]:
    """The pieces of a text that is in `style`; without colours, code keeps its backticks."""
    pieces: list[Piece] = []
    at = 0
    for found in _SPAN.finditer(text):
        pieces.append((text[at : found.start()], style))
        pieces += _span(found, style, colors=colors)
        at = found.end()
    pieces.append((text[at:], style))
    return [piece for piece in pieces if piece[0]]


def _span(found: re.Match[str], style: str, *, colors: bool) -> list[Piece]:
    if found["escaped"]:
        return [(found["escaped"], style)]
    if found["code"]:
        code = found["code"].strip() or found["code"]
        return [(code, added(style, CODE))] if colors else [(found[0], style)]
    if found["label"]:
        # Never a terminal's own link: it would show one address and open another.
        return [*spans(found["label"], style, colors=colors), (f" ({found['address']})", added(style, LINK))]
    mark = found["stars"] or ("_" if found["lined"] else "~~")
    return spans(found["starred"] or found["lined"] or found["struck"], added(style, _STYLES[mark]), colors=colors)


def added(style: str, more: str) -> str:
    """Both styles."""
    return f"{style};{more}" if style else more


def is_open(text: str) -> bool:
    """Whether more text could complete a span that begins in this one."""
    return bool(_BEGUN.search(_SPAN.sub("", text)))


def painted(piece: Piece, *, colors: bool) -> str:
    """The piece as a terminal takes it. Attributes have one digit and remain without colours."""
    text, style = piece
    codes = style if colors else ";".join(code for code in style.split(";") if len(code) == 1)
    return f"\x1b[{codes}m{text}\x1b[0m" if codes else text
