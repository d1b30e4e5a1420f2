"""localmoe.reply: DeepSeek's own vectors, any split gives the same, and nothing a model writes is lost or raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.prompt import Thinking, render_chat
from localmoe.reply import BLOCK, BLOCK_END, Piece, ReplyParser, Stage
from tests.conftest import shared_data
from tests.hostile import splits

CALL = '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="k" string="true">v</｜DSML｜parameter>\n</｜DSML｜invoke>'
# Enough to make any stage, any near miss of it, and both kinds of argument.
FRAGMENTS = [
    "</think>",
    "<think>",
    "\n",
    "\n\n",
    " ",
    "a",
    "é🐱",
    "<",
    "</th",
    BLOCK,
    BLOCK_END,
    CALL,
    '<｜DSML｜invoke name="g">',
    "</｜DSML｜invoke>",
    '<｜DSML｜parameter name="n" string="false">',
    "[1, 2]",
    "</｜DSML｜parameter>",
    "<｜DSML｜",
    "<｜User｜>",
    '"',
]
REPLIES = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


def parse(parts: list[str], parser: ReplyParser) -> tuple[list[Piece], dict[str, Any]]:
    pieces = [piece for part in parts for piece in parser.push(part)]
    pieces += parser.finish()
    return pieces, masked(parser.message())


def masked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the random part of its call ids replaced, as in the vectors."""
    calls = [call | {"id": call["id"][:8] + "*"} for call in message.get("tool_calls", [])]
    return message | ({"tool_calls": calls} if calls else {})


def joined(pieces: list[Piece], *kinds: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind in kinds)


def test_replies_equal_the_reference_vectors() -> None:
    """11 replies, whole and in pieces of 1 and 7 characters: fails on any difference in what a caller would see."""
    vectors = json.loads(shared_data("dsv4_recipe_vectors/parse.json").read_text())["vectors"]
    assert len(vectors) == 33
    for vector in vectors:
        body, text = vector["body"], vector["completion"]
        thinking: Thinking = "off" if body.get("thinking", {}).get("type") == "disabled" else "on"
        size = vector["chunk"] or len(text)
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        _, message = parse(parts, render_chat(body["messages"], thinking=thinking, tools=body.get("tools")).parser())
        assert message == vector["message"], vector["name"]
        assert ("tool_calls" if "tool_calls" in message else "stop") == vector["finish_reason"]


@settings(max_examples=500, deadline=None)
@given(st.data(), st.sampled_from(["reasoning", "answer", "tool_calls"]), st.booleans())
def test_any_split_gives_the_same_reply(data: st.DataObject, begins_in: Stage, tools: bool) -> None:
    """Fails if a mark over two tokens is missed, or text before it is let out that belongs to it; never raises."""
    text = data.draw(REPLIES)
    whole_pieces, whole = parse([text], ReplyParser(begins_in, tools=tools))
    pieces, message = parse(data.draw(splits(text)), ReplyParser(begins_in, tools=tools))
    assert message == whole
    for kind in ("reasoning", "answer", "tool_call"):
        assert joined(pieces, kind) == joined(whole_pieces, kind)
    assert message["content"] == joined(pieces, "answer")
    assert message.get("reasoning_content", "") == joined(pieces, "reasoning")


@settings(deadline=None)
@given(REPLIES, st.booleans())
def test_without_tools_only_marks_and_line_breaks_are_dropped(text: str, thinking: bool) -> None:
    """Fails if call markup, role spellings or broken marks vanish from what the user reads."""
    pieces, message = parse(list(text), ReplyParser("reasoning" if thinking else "answer"))
    assert joined(pieces, "reasoning", "answer").replace("\n", "") == text.replace("</think>", "").replace("\n", "")
    assert "tool_calls" not in message


@settings(deadline=None)
@given(REPLIES, st.booleans())
def test_with_tools_nothing_is_dropped_unless_something_is_called(text: str, thinking: bool) -> None:
    """Fails if a malformed call disappears, as it does in DeepSeek's own parser."""
    pieces, message = parse([text], ReplyParser("reasoning" if thinking else "answer", tools=True))

    def reduced(shown: str) -> str:
        return shown.replace("</think>", "").replace("\n", "")

    if "tool_calls" not in message:
        assert reduced(joined(pieces, "reasoning", "answer")) == reduced(text)
    else:
        assert reduced(text).startswith(reduced("".join(piece.text for piece in pieces)))


MALFORMED = [
    "hello",
    "",
    '<｜DSML｜invoke name="f">',
    CALL.replace("</｜DSML｜invoke>", ""),
    CALL + "and then?",
    CALL.replace('"true"', '"maybe"'),
    CALL.replace('"true"', '"false"'),
    CALL.replace('"true">v', '"false">NaN'),
    CALL.replace('"true">v', '"false">' + "[" * 100_000),
    CALL.replace('"true">v', '"false">' + "9" * 5_000),
    CALL.replace('name="f"', "f"),
    CALL.replace("\n</｜DSML｜invoke>", CALL[CALL.index("\n") :]),
    CALL + "\n" + CALL.replace('"true"', '"false"'),
]


@pytest.mark.parametrize("inside", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_call_is_answer_text(inside: str) -> None:
    """Fails if it raises, is called in part, or is hidden: a user must see what the model tried."""
    text = f"I will look.\n\n{BLOCK}\n{inside}\n{BLOCK_END}"
    pieces, message = parse([text], ReplyParser(tools=True))
    assert (message["content"], joined(pieces, "answer")) == (text, text)
    assert "tool_calls" not in message


def test_a_call_comes_as_one_piece_and_ends_the_reply() -> None:
    """The case to read: what is held back, what is dropped, and what history gets."""
    parser = ReplyParser("reasoning", tools=True)
    assert parser.push("\nHm\n") == [Piece("reasoning", "Hm")]
    assert parser.push("\n</th") == []
    assert parser.push("ink>\n\nLet me see") == [Piece("answer", "Let me see")]
    assert parser.push(f".\n\n{BLOCK}\n{CALL}\n</｜DSML") == [Piece("answer", ".")]
    assert parser.push("｜tool_calls>") == [Piece("tool_call", f"{BLOCK}\n{CALL}\n{BLOCK_END}")]
    assert parser.push("\n<tool_result>made up</tool_result>") == []
    assert parser.finish() == []
    message = parser.message()
    assert message["tool_calls"][0].pop("id").startswith("call_00_")
    assert message == {
        "role": "assistant",
        "reasoning_content": "Hm",
        "content": "Let me see.",
        "tool_calls": [{"index": 0, "type": "function", "function": {"name": "f", "arguments": '{"k": "v"}'}}],
    }


def test_marks_inside_an_argument_are_the_argument() -> None:
    """A file that quotes the format: fails if the block ends at the first thing that looks like its end."""
    value = f"</think>\n{BLOCK_END}\n<｜DSML｜invoke"
    text = f"{BLOCK}\n{CALL.replace('>v<', f'>{value}<')}\n{BLOCK_END}"
    _, message = parse(list(text), ReplyParser(tools=True))
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"k": value}
    assert ReplyParser(tools=True).push(text) == [Piece("tool_call", text)]


def test_a_call_cut_at_any_point_is_kept_once_its_name_is_known() -> None:
    """max_tokens can end anywhere: fails if it raises, or if the whole text is neither a call nor shown."""
    text = f"ok\n\n{BLOCK}\n{CALL}\n{CALL.replace('f', 'g')}\n{BLOCK_END}"
    named = text.index('">') + 2
    for end in range(len(text)):
        pieces, message = parse([text[:end]], ReplyParser(tools=True))
        if end < named:
            assert message == {"role": "assistant", "content": text[:end]}
        else:
            assert message["content"] == "ok"
            assert message["tool_calls"][0]["function"]["name"] == "f"
            assert "".join(piece.text for piece in pieces) == "ok" + text[4:end]


def test_a_forced_call_begins_inside_the_block() -> None:
    """tool_choice "required": the prompt holds the opening mark. Fails if the parser waits for another."""
    _, message = parse([f"{CALL}\n{BLOCK_END}"], ReplyParser("tool_calls", tools=True))
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"k": "v"}'}
    assert parse(["no, thanks"], ReplyParser("tool_calls", tools=True))[1]["content"] == "no, thanks"


def test_a_continued_reply_keeps_its_line_breaks() -> None:
    """Fails if "Once" continued with "\\n\\nupon" is joined without them."""
    assert parse(["\n\nupon"], ReplyParser(continued=True))[1]["content"] == "\n\nupon"
    assert parse(["\n\nupon"], ReplyParser())[1]["content"] == "upon"


def test_a_stray_end_of_thinking_is_dropped_and_nothing_else() -> None:
    """As deepseek-recipe does: fails if line breaks after it go as well, as they do after real reasoning."""
    assert parse(["\n</think>\n\nb</think>c"], ReplyParser())[1]["content"] == "\n\nbc"
    assert parse(["a</think>\n\nb"], ReplyParser("reasoning"))[1]["content"] == "b"


@st.composite
def well_formed(draw: st.DrawFn) -> tuple[bool, str]:
    """Whether it thinks, and a reply as a model ought to write it."""
    # A "<" just before a line break and a mark is left out: there the oracle's result depends on the split.
    words = st.text(st.sampled_from('a\n é"\\\t🐱{}'), max_size=6)
    thinking = draw(st.booleans())
    text = draw(words) + ("</think>" + draw(words) if thinking else "")
    calls = draw(st.lists(st.lists(st.tuples(words, st.booleans()), max_size=2), max_size=2))
    blocks = ["".join(_parameter(i, *pair) for i, pair in enumerate(call)) for call in calls]
    invokes = "".join(f'<｜DSML｜invoke name="f{i}">\n{block}</｜DSML｜invoke>\n' for i, block in enumerate(blocks))
    return thinking, text + (f"\n\n{BLOCK}\n{invokes}{BLOCK_END}" if calls else "")


def _parameter(index: int, word: str, is_text: bool) -> str:
    value = word if is_text else json.dumps([word, index, None], ensure_ascii=False)
    return f'<｜DSML｜parameter name="k{index}" string="{json.dumps(is_text)}">{value}</｜DSML｜parameter>\n'


def oracle(text: str, thinking: bool) -> dict[str, Any]:
    """The message deepseek-recipe makes of a reply given one character at a time."""
    import deepseek_recipe as recipe

    tool = {"type": "function", "function": {"name": "f0"}}
    body = {"model": "DeepSeek-V4-Pro", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    mode = {"thinking": {"type": "enabled" if thinking else "disabled"}}
    request = recipe.ChatCompletionRequest(body | mode).convert(recipe.ConversionOptions())
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "model")
    stream = recipe.StreamProcessor(generator, request.parsing_options)
    inputs = [recipe.InferenceChunk.ready(), *map(recipe.InferenceChunk.text, text)]
    inputs.append(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
    response = recipe.ChatCompletionResponse("id", "model", 0, 0, 0)
    for chunk in [*(out for given_chunk in inputs for out in stream.push(given_chunk)), *stream.finish()]:
        assert isinstance(chunk, recipe.ChatCompletionChunk)
        response.accumulate(chunk)
    message: dict[str, Any] = json.loads(response.to_json())["choices"][0]["message"]
    return masked(message)


@settings(max_examples=200, deadline=None)
@given(well_formed())
def test_well_formed_replies_are_read_as_deepseek_reads_them(reply: tuple[bool, str]) -> None:
    """Fails if our rules for line breaks, escapes or argument order differ from the format's owner."""
    thinking, text = reply
    parser = ReplyParser("reasoning" if thinking else "answer", tools=True)
    assert parse(list(text), parser)[1] == oracle(text, thinking)
