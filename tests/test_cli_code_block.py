"""cli/code_block.py: exactly what stands between the first two fences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.cli.code_block import CodeBlock, first_block


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("no code", None),
        ("inline ```code``` only", None),
        ("```code``` at the start of a line", None),
        ("Here:\n```python\nprint(1)\n```\nand\n```\nmore\n```", CodeBlock("print(1)\n", closed=True)),
        ("~~~\na\n```\nb\n~~~~", CodeBlock("a\n```\nb\n", closed=True)),
        ("````md\n```\nx\n```\n````", CodeBlock("```\nx\n```\n", closed=True)),
        ("1. do\n\n      ```sh\n      ls\n        -l\n\n   x\n      ```", CodeBlock("ls\n  -l\n\nx\n", closed=True)),
        ("```\r\na\r\n```\r\n", CodeBlock("a\r\n", closed=True)),
        ("```\na\x0c\x1b[2J\u202e\x00b\n```", CodeBlock("a\x0c\x1b[2J\u202e\x00b\n", closed=True)),
        ("```\n```", CodeBlock("", closed=True)),
        ("```\na\nb", CodeBlock("a\nb", closed=False)),
        ("```", CodeBlock("", closed=False)),
    ],
)
def test_examples(text: str, block: CodeBlock | None) -> None:
    assert first_block(text) == block


@given(st.lists(st.sampled_from(["```", "````", "```py", "``` a`b", "~~~", "~~~~ x", "a", "", "\tb", "``"])))
def test_it_agrees_with_a_markdown_parser(lines: list[str]) -> None:
    """Text without lists. Fails if another block is found, or a line more or less of it."""
    parser = pytest.importorskip("markdown_it")
    # Behind words, where a tab begins no code of its own.
    text = "\n".join(["words", *lines, ""])
    expected = [token.content for token in parser.MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    found = first_block(text)
    assert (found.text if found else None) == (expected[0] if expected else None)
