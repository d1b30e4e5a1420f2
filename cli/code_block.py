"""The first fenced code block of a text, as a script wants it: what stands between the fences, and nothing else.

Pure functions of text. Reads fences as CommonMark does, but at any indentation, because those in list items count too.
Time and memory are linear in the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Backticks with another backtick on their line are inline code.
_OPENING = re.compile(r"([ \t]*)(`{3,}(?=[^`]*$)|~{3,})")


@dataclass(frozen=True)
class CodeBlock:
    """text: the lines between the fences. closed: whether there is a closing fence."""

    text: str
    closed: bool


def first_block(text: str) -> CodeBlock | None:
    """The first fenced block; None if there is none. The fence's own indentation is taken from every line of it."""
    # Not splitlines: a form feed inside code ends no line.
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if opening := _OPENING.match(line):
            return _block(lines[number + 1 :], len(opening[1]), opening[2])
    return None


def _block(lines: list[str], indent: int, fence: str) -> CodeBlock:
    closing = re.compile(rf"[ \t]*{fence[0]}{{{len(fence)},}}[ \t\r]*")
    code: list[str] = []
    for line in lines:
        if closing.fullmatch(line):
            return CodeBlock("".join(f"{each}\n" for each in code), closed=True)
        blank = len(line) - len(line.lstrip(" \t"))
        code.append(line[min(indent, blank) :])
    return CodeBlock("\n".join(code), closed=False)
