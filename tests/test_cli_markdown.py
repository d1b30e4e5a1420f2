"""cli/markdown*.py: what a terminal shows of an answer. pyte is the terminal; what scrolled away is kept."""

from __future__ import annotations

import re
from itertools import pairwise

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.cli.markdown import Markdown
from localmoe.cli.sanitize import sanitize
from tests.markdown_reply import MARKS, REPLY, pieces

SGR = re.compile(r"\x1b\[[0-9;]*m")
SIZES = [(80, 24), (120, 50), (20, 24)]
# Marks of every kind, so that chance finds their combinations.
_PARTS = (
    ["a", "bc ", " ", "  ", "\n", "\n\n", "*", "**", "_", "`", "```", "~~", "```py\n", "|", "|-|\n", "| a | b |\n"],
    [
        "|--|-:|\n",
        "- ",
        "1. ",
        "> ",
        "# ",
        "---\n",
        "[",
        "](",
        ")",
        "\\",
        "中文",
        "，",
        "（",
        "👩\u200d💻",
        "\t",
        "    ",
    ],
    ["'''", '"""', "long " * 60, "w" * 260, "\x1b[2J", "\r", "\u202e", "x" * 4100],
)
TEXTS = st.lists(st.sampled_from([part for some in _PARTS for part in some]) | st.text(max_size=5), max_size=30).map(
    lambda parts: sanitize("".join(parts))
)


def shown(text: str, width: int = 80, *, cuts: list[int] | None = None, colors: bool = True) -> str:
    """The output for a text, cut at these places."""
    page = Markdown(colors=colors)
    at = [0, *sorted(cuts or []), len(text)]
    return "".join(page.write(text[one:other], width) for one, other in pairwise(at)) + page.close()


def plain(text: str, width: int = 80) -> list[str]:
    return SGR.sub("", shown(text, width)).split("\n")[:-1]


def screen(output: str, columns: int, lines: int) -> list[str]:
    """Every line of a terminal after the output, those that scrolled away first."""
    terminal = pyte.HistoryScreen(columns, lines, history=100_000, ratio=1)
    pyte.Stream(terminal).feed(output.replace("\n", "\r\n"))
    rows = [*terminal.history.top, *(terminal.buffer[row] for row in range(lines))]
    return ["".join(row[column].data for column in range(columns)).rstrip() for row in rows]


@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_a_terminal_and_its_scrollback_hold_everything_once(columns: int, lines: int) -> None:
    """Fails if anything is drawn twice, lost or in another order. Cells of a narrow table are wrapped, and left out."""
    text = "".join(screen("".join(page_writes(columns)), columns, lines))
    marks = [mark for mark in MARKS if not mark.endswith("t")]
    assert re.findall(r"M\d\d[a-f]", text) == marks


def page_writes(columns: int) -> list[str]:
    page = Markdown(colors=True)
    return [*(page.write(piece, columns) for piece in pieces(REPLY)), page.close()]


@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_a_terminal_gets_few_bytes(columns: int, lines: int) -> None:
    """What was measured of drawing again is 23 to 928 times the text; most of ours is colour."""
    assert len("".join(page_writes(columns)).encode()) <= 3 * len(REPLY.encode())


def test_text_comes_at_the_speed_of_the_model() -> None:
    """Fails if a paragraph would be waited for: a word is shown when the next one begins."""
    page, written = Markdown(colors=True), ""
    for word in ["One", " two", " three", " **four", " five**", " six", " seven"]:
        written += page.write(word, 80)
        if word in (" three", " five**"):
            assert SGR.sub("", written) == {" three": "One two", " five**": "One two three"}[word]
    assert SGR.sub("", written) == "One two three four five six"


def test_a_long_table_is_not_waited_for() -> None:
    page = Markdown(colors=True)
    written = [page.write(f"| {row} | {row} |\n", 80) for row in "a-123456789"]
    assert [bool(lines) for lines in written] == [False] * 7 + [True] * 4


@given(TEXTS, st.data(), st.sampled_from([1, 2, 7, 20, 80]), st.booleans())
def test_the_pieces_do_not_matter(text: str, data: st.DataObject, width: int, colors: bool) -> None:
    """Also: nothing but text, newlines and colours leaves, and without NO_COLOR's colours only attributes."""
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    whole = shown(text, width, colors=colors)
    assert shown(text, width, cuts=cuts, colors=colors) == whole
    assert sanitize(SGR.sub("", whole)) == SGR.sub("", whole)
    if not colors:
        assert {code for found in SGR.findall(whole) for code in found[2:-1].split(";")} <= set("012349")


@given(TEXTS.filter(lambda text: "|" not in text), st.sampled_from([1, 5, 20, 80]))
def test_nothing_is_lost(text: str, width: int) -> None:
    """All letters and digits are there in their order. (Wrapped cells of a table stand beside each other.)"""
    assert letters(SGR.sub("", shown(text, width))) == letters(text)


def letters(text: str) -> str:
    return "".join(character for character in text if character.isalnum())


@pytest.mark.parametrize("text", ["x" * 200_000, "中" * 200_000, "`" * 200_000, "|" + "a*" * 50_000, "- " * 50_000])
@pytest.mark.parametrize("before", ["", "```py\n"])
def test_a_line_without_an_end_is_shown_whole(text: str, before: str) -> None:
    output = SGR.sub("", shown(before + text, 80, cuts=list(range(0, len(text), 1000))))
    assert letters(output) == letters(before + text)
    assert "".join(output.split()).endswith(text[-20:].replace(" ", "").replace("-", output.strip()[-1]))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("**b** *i* _i_ ~~s~~ `c` ***bi*** **a `c` b**", ["b i i s c bi a c b"]),
        ("2*3*4 __init__ snake_case_x a * b * c", ["2*3*4 __init__ snake_case_x a * b * c"]),
        ("\\*x\\* \\(a\\) **open", ["*x* \\(a\\) **open"]),
        ("[label](http://x/a_b_(c)) ![i](j) [ ] a[0]", ["label (http://x/a_b_(c)) i (j) [ ] a[0]"]),
        ("# T\n### **U**\n#tag", ["T", "U", "#tag"]),
        ("- a\n  * b\n10. c\n> - d", ["• a", "  • b", "10. c", "│ • d"]),
        ("\n\na\n\n\n\nb\n\n", ["a", "", "b"]),
        ("a\n---\n- - -", ["a", "─" * 80, "─" * 80]),
        ("```\n\n**x**\n\t- y\n````\nz", ["```", "", "**x**", "\t- y", "````", "z"]),
        ("```a``` b", ["a b"]),
        ("> ```\n> __x__\ny", ["> ```", "> __x__", "y"]),
        ("a\n\n    __x__\n    y\nb", ["a", "", "    __x__", "    y", "b"]),
        ("- a\n\n    __x__ *b*", ["• a", "", "    __x__ b"]),
        ("| a |\nb", ["| a |", "b"]),
        ("| a | b |\n|---|--:|\n| x | 1 |\n| y\\|z | 10 | more |\n\nc",
         ["a   │         b", "────┼──────────", "x   │         1", "y|z │ 10 | more", "", "c"]),
    ],
)  # fmt: skip
def test_what_markdown_looks_like(text: str, lines: list[str]) -> None:
    assert plain(text) == lines


def test_lines_are_wrapped_between_words_and_hang_below_their_text() -> None:
    """Also: an address stays in one piece, so that the terminal can still open it; Chinese breaks anywhere but before a
    comma."""
    assert plain("- one two three", 10) == ["• one two", "  three"]
    assert plain("> one two three", 10) == ["│ one two", "│ three"]
    assert plain("a https://example.org b", 10) == ["a", "https://example.org", "b"]
    assert plain("中文中文，中文", 9) == ["中文中", "文，中文"]


def test_a_table_that_has_no_room_is_text() -> None:
    rows = "| a | b | c | d |\n|---|---|---|---|\n| 1 | 2 | 3 | 4 |"
    assert "".join(plain(rows, 20)).replace(" ", "") == rows.replace(" ", "").replace("\n", "")
    assert plain("| a | b |\n|---|---|\n| one two | 中文中文 |", 13) == [
        "a     │ b",
        "──────┼──────",
        "one   │ 中文",
        "two   │ 中文",
    ]


def test_a_comment_over_several_lines_is_one_colour() -> None:
    """Fails if its words were taken for code because every line is read alone; and if it would never end."""
    lines = shown('```python\n"""for\nfor\n"""\nfor\n```').split("\n")
    assert "\x1b[35mfor" not in lines[1] + lines[2]
    assert "\x1b[35mfor" in lines[4]


def test_a_resize_changes_what_comes_and_nothing_else() -> None:
    page = Markdown(colors=False)
    before = page.write("one two three four ", 10)
    assert before + page.write("five six seven eight\n", 100) == "one two\nthree four five six seven eight\n"


def test_without_colours_the_layout_stays() -> None:
    """And code is still told from text."""
    assert shown("# a\n`b` **c**", colors=False) == "\x1b[1ma\x1b[0m\n`b` \x1b[1mc\x1b[0m\n"
