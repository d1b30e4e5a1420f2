"""cli/chat_loops.py: real loops are noticed soon, and text that repeats itself for a reason is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from localmoe.cli.chat_loops import STEP, LoopGuard, loop
from tests.chat_talk import Talk
from tests.fake_llm import FakeLLM

SENTENCE = "The little frog went to the pond and he was very happy. "
PARAGRAPH = " ".join(f"word{i % 90} and" for i in range(100)) + ".\n\n"
LOOPS = {
    "a sentence": "Once upon a time. " + SENTENCE * 40,
    "a paragraph": "It began well. " + PARAGRAPH * 4,
    "a word": "I think that " + "very " * 200,
    "laughter without end": "ha, " * 200,
    "a line": "Here it is:\n" + "I am sorry.\n" * 40,
    "a line with blank ones": "So:\n\n" + "Let me check.\n\n" * 40,
    "a bullet": "- eat vegetables\n" * 40,
    "Chinese": "从前有一只小青蛙。" + "它很高兴地去了池塘。" * 30,
    "code": "```python\n" + "x = compute(x)\n" * 60,
    "a line of code inside one line": "```\n" + "result = result + step(result, 1) ; " * 40,
    "a table row": "| a | b |\n|---|---|\n" + "| yes it is | no it is not |\n" * 60,
    "two lines in turn": "A: What did you say to me?\nB: I said nothing to you.\n" * 20,
}
TABLE = "| name | done | tested | shipped |\n|---|---|---|---|\n"
HONEST = {
    "a table of the same answers": TABLE + "".join(f"| part {i} | yes | yes | yes |\n" for i in range(60)),
    "three equal rows": TABLE + "| open | yes | yes | yes |\n" * 3 + "| shut | no | no | no |\n" * 3,
    "a wide ruler": "|" + "---|" * 60 + "\n|" + " a |" * 20 + "\n",
    "rulers": "-" * 300 + "\n" + "=" * 300 + "\n" + ("* * * * * * * * * *\n" * 6),
    "a list": "".join(f"- item {i}: buy milk and bread at the shop\n" for i in range(60)),
    "empty boxes": "- [ ]\n" * 30,
    "numbers": "0, " * 300 + "\n" + "0x00, 0x00, 0x00, 0x00,\n" * 30,
    "closing braces": "```c\n" + "".join(" " * (40 - i) + "}\n" for i in range(40)),
    "equal lines of code": "```python\n" + "    assert step(state) == (None, None)\n" * 6 + "```\nThat is all of it.\n",
    "a row of None": "```python\nrow = [" + "None, " * 24 + "]\n",
    "a test file": "```python\n" + "".join(f"def test_{i}():\n    assert f({i}) == {i}\n\n\n" for i in range(60)),
    "indented JSON": "```json\n" + '  {\n    "name": "x",\n    "value": null\n  },\n' * 6 + "```\n",
    "a refrain": ("Row, row your boat,\ngently down the stream,\n" * 2 + "merrily, merrily, merrily, merrily,\n") * 2,
    "three cheers": "Hip hip hooray! Hip hip hooray! Hip hip hooray!\n",
    "a poem of no, no": "No, no, no, no, no, no, no!\nNo, no, no, no!\n",
    "verses": "".join(f"{n} green bottles hanging on the wall,\n{n} green bottles hanging on the wall,\n"
                      f"and if one green bottle should fall, there'd be {n - 1}.\n" for n in range(10, 0, -1)),
    "Chinese": "".join(f"第{i}只小青蛙去了池塘,它很高兴。" for i in range(60)),
}  # fmt: skip


def first_loop(text: str, size: int) -> int | None:
    """How many characters of a text went by, in pieces of a size, before the guard spoke."""
    guard = LoopGuard()
    for at in range(0, len(text), size):
        guard.push("answer", text[at : at + size])
        if guard.found is not None:
            return at + size
    return None


@pytest.mark.parametrize("size", [1, 5, 17])
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_noticed_before_the_text_ends(name: str, size: int) -> None:
    """Fails if it depends on where a token ends."""
    assert first_loop(LOOPS[name], size) is not None


@pytest.mark.parametrize("size", [1, 5, 17])
@pytest.mark.parametrize("name", HONEST)
def test_text_that_repeats_itself_for_a_reason_is_left_alone(name: str, size: int) -> None:
    assert first_loop(HONEST[name], size) is None


def test_three_times_is_enough_and_two_are_not() -> None:
    assert loop("Well. " + SENTENCE * 2) is None
    assert loop("Well. " + SENTENCE * 3 + "The") == loop(SENTENCE * 3 + "The") is not None
    noticed = first_loop("Well. " + SENTENCE * 20, 4)
    assert noticed is not None and noticed < 4 * len(SENTENCE) + STEP


def test_the_same_line_four_times_is_enough() -> None:
    assert loop("I see.\n" * 3 + "I s") is None
    assert loop("I see.\n" * 4 + "I s") == "I see."


def test_what_was_thought_is_not_a_repetition_of_what_is_said() -> None:
    guard = LoopGuard()
    for kind in ("reasoning", "answer", "reasoning", "answer"):
        guard.push(kind, SENTENCE)
    assert guard.found is None


LOOPING: Any = [("answer", "again and again.\x1b\n")] * 100


def test_a_chat_stops_a_loop_and_says_what_helps(fake_model: type[FakeLLM], talk: Talk, capsys: Any) -> None:
    """Also: the part that was said stays, and the words of the model come sanitised."""
    fake_model.replies = [LOOPING, [("answer", "better")]]
    talk("a", "/set repetition_penalty 1.1", "/retry")
    out, err = capsys.readouterr()
    assert 4 <= out.count("again and again") < 12 and "better" in out
    assert "it repeats itself: again and again.␛" in err and "/retry" in err and "\x1b" not in err
    assert fake_model.made[0].asked[1]["params"].repetition_penalty == 1.1


def test_without_the_guard_a_reply_may_loop(fake_model: type[FakeLLM], talk: Talk, capsys: Any) -> None:
    fake_model.replies = [LOOPING]
    talk("a", options=("--no-loop-guard",))
    assert capsys.readouterr().out.count("again and again") == 100
