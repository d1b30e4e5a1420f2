"""A model's reply taken apart while it streams: reasoning, answer, tool calls.

Knows DeepSeek-V4's reply format as text; the turn's end is a matter of token ids (prompt.turn_end_ids). Never raises on
what a model writes: markup that is not exactly a tool call stays text. Memory: the reply.
Source: the parser of deepseek-recipe 0.2.0 for well-formed replies; it drops malformed calls, this one shows them."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from localmoe.tokenizer import begun

# Undecided: reasoning if the reply begins with <think>, else the answer.
Stage = Literal["reasoning", "answer", "tool_calls", "undecided"]

THINK_START = "<think>"
THINK_END = "</think>"
BLOCK = "<｜DSML｜tool_calls>"
BLOCK_END = "</｜DSML｜tool_calls>"
_INVOKE = re.compile(r'\s*<｜DSML｜invoke name="(.*?)">')
_OPEN_INVOKE = re.compile(r'<｜DSML｜invoke name="((?:(?!">).)*)')
_INVOKE_END = re.compile(r"\s*</｜DSML｜invoke>")
_PARAMETER_END = "</｜DSML｜parameter>"
_OPENED = r'\s*<｜DSML｜parameter name="((?:(?!">).)*?)" string="(true|false)">'
_PARAMETER = re.compile(rf"{_OPENED}([\s\S]*?){_PARAMETER_END}")
_OPEN_VALUE = re.compile(rf"{_OPENED}([\s\S]*)")
_OPEN_KEY = re.compile(r'\s*<｜DSML｜parameter name="((?:(?!">).)*)')
# What may stand, unfinished, where a reply was cut between two parts of a call, or between two calls.
_INSIDE_CALL = ('<｜DSML｜parameter name="', "</｜DSML｜invoke>")
_OUTSIDE_CALL = ('<｜DSML｜invoke name="', BLOCK_END)


@dataclass(frozen=True)
class Piece:
    """Some text of a reply. A "tool_call" piece is one whole block of calls as the model wrote it."""

    kind: Literal["reasoning", "answer", "tool_call"]
    text: str


@dataclass(frozen=True)
class Call:
    """arguments: a JSON object; incomplete, and so invalid JSON, if the reply was cut inside it."""

    name: str
    arguments: str


class ReplyParser:
    """Feed it text with push(), then finish() once; message() is the reply as a message of the conversation.

    The pieces' texts are the reply's, less the marks between its parts and the line breaks next to them."""

    def __init__(self, begins_in: Stage = "answer", *, tools: bool = False, continued: bool = False) -> None:
        """begins_in: what the prompt ended inside of ("reasoning" after <think>, "answer" after </think>).

        tools: whether the prompt offered any; without, call markup is text. continued: the prompt ended with the first
        words of the reply, so line breaks at the start of the stream belong to it."""
        self._stage: Stage | Literal["done"] = begins_in
        self._tools = tools
        self._skip_newlines = not continued
        self._pending = ""
        self._texts: dict[str, list[str]] = {"reasoning": [], "answer": []}
        self._thinking = begins_in == "reasoning"
        self._calls: list[Call] = []
        # Where a block that turns out malformed belongs, and the text that led into it.
        self._around: Literal["reasoning", "answer"] = "answer"
        self._lead = ""
        self._searched = 0

    def push(self, text: str) -> list[Piece]:
        """The pieces this text completes. Held back: what may be the beginning of a mark, and an unfinished call."""
        self._pending += text
        pieces: list[Piece] = []
        if self._stage == "undecided" and not self._decide():
            return pieces
        while self._take_block(pieces) if self._stage == "tool_calls" else self._take_text(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The end of the reply: what was held back. A call that was cut off is kept if its name is known."""
        pieces: list[Piece] = []
        if self._stage == "undecided":
            self._stage = "answer"
        pending, self._pending = self._pending, ""
        if self._stage == "tool_calls":
            calls, _ = parse_calls(pending)
            self._close_block(pieces, calls, pending)
        else:
            self._emit(pieces, pending)
        self._stage = "done"
        return pieces

    def message(self) -> dict[str, Any]:
        """The reply so far as an assistant message, with reasoning_content if the prompt asked for reasoning."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._texts["answer"])}
        if self._thinking or self._texts["reasoning"]:
            message["reasoning_content"] = "".join(self._texts["reasoning"])
        if self._calls:
            message["tool_calls"] = [_tool_call(index, call) for index, call in enumerate(self._calls)]
        return message

    def _decide(self) -> bool:
        """Whether the reply has said what it begins with."""
        start = self._pending.lstrip()
        if len(start) < len(THINK_START) and THINK_START.startswith(start):
            return False
        self._stage = "answer"
        if start.startswith(THINK_START):
            self._stage, self._thinking, self._skip_newlines = "reasoning", True, True
            self._pending = start.removeprefix(THINK_START)
        return True

    def _take_text(self, pieces: list[Piece]) -> bool:
        """Pass text on up to the next mark. True if there was one, so that more may follow."""
        if self._stage == "done":
            # As in the source: a block of calls ends the reply, whatever the model adds.
            self._pending = ""
            return False
        marks = (THINK_END, BLOCK) if self._tools else (THINK_END,)
        found = [(at, mark) for mark in marks if (at := self._pending.find(mark)) >= 0]
        if not found:
            self._pass_on(pieces, marks)
            return False
        at, mark = min(found)
        before, self._pending = self._pending[:at], self._pending[at + len(mark) :]
        kept = before if self._stage == "answer" and mark == THINK_END else before.rstrip("\n")
        self._emit(pieces, kept)
        if mark == BLOCK:
            assert self._stage in ("reasoning", "answer"), "text is only taken outside of a block"
            self._around, self._lead, self._searched = self._stage, before[len(kept) :] + mark, 0
            self._stage = "tool_calls"
        else:
            self._skip_newlines = self._stage == "reasoning"
            self._stage = "answer"
        return True

    def _pass_on(self, pieces: list[Piece], marks: tuple[str, ...]) -> None:
        kept = self._pending[: len(self._pending) - begun(self._pending, marks)]
        # Line breaks before the end of reasoning, or before a block, are not part of the text.
        if self._stage == "reasoning" or self._tools:
            kept = kept.rstrip("\n")
        self._pending = self._pending[len(kept) :]
        self._emit(pieces, kept)

    def _take_block(self, pieces: list[Piece]) -> bool:
        """Close the block if its end has arrived. True if it was."""
        end = self._pending.find(BLOCK_END, self._searched)
        if end < 0:
            self._searched = max(0, len(self._pending) - len(BLOCK_END) + 1)
            return False
        calls, complete = parse_calls(self._pending[:end])
        if calls and not complete:
            # The mark stands inside an argument.
            self._searched = end + 1
            return True
        end += len(BLOCK_END)
        block, self._pending = self._pending[:end], self._pending[end:]
        self._close_block(pieces, calls, block)
        return True

    def _close_block(self, pieces: list[Piece], calls: list[Call], block: str) -> None:
        if calls:
            self._calls = calls
            self._stage = "done"
            pieces.append(Piece("tool_call", self._lead.lstrip("\n") + block))
        else:
            self._stage = self._around
            self._emit(pieces, self._lead + block)

    def _emit(self, pieces: list[Piece], text: str) -> None:
        if self._stage not in ("reasoning", "answer"):
            return
        if self._skip_newlines:
            text = text.lstrip("\n")
        if text:
            self._skip_newlines = False
            self._texts[self._stage].append(text)
            pieces.append(Piece(self._stage, text))


def parse_calls(block: str) -> tuple[list[Call], bool]:
    """The calls between the marks of a tool-call block, and whether the block is complete.

    No calls if any of it is malformed: nothing is called unless all of it was understood."""
    calls: list[Call] = []
    at = 0
    while opened := _INVOKE.match(block, at):
        arguments, at = _arguments(block, opened.end())
        closed = _INVOKE_END.match(block, at)
        if arguments is None or (closed is None and (cut := _cut(block[at:])) is None):
            return [], False
        if closed is None:
            return [*calls, Call(opened[1], _opened_object([*arguments, cut] if cut else arguments))], False
        calls.append(Call(opened[1], "{" + ", ".join(arguments) + "}"))
        at = closed.end()
    rest = block[at:].lstrip()
    if rest and not _OPEN_INVOKE.fullmatch(rest) and not _starts_one(_OUTSIDE_CALL, rest):
        return [], False
    return calls, not rest


def _arguments(block: str, at: int) -> tuple[list[str] | None, int]:
    """The complete parameters from `at` on as `"key": value`, and where they end; None if one is malformed."""
    members: dict[str, str] = {}
    while found := _PARAMETER.match(block, at):
        key, is_text, value = found.groups()
        if key in members or (is_text == "false" and not _is_json(value)):
            return None, at
        members[key] = _json(value) if is_text == "true" else value
        at = found.end()
    return [f"{_json(key)}: {value}" for key, value in members.items()], at


def _cut(rest: str) -> str | None:
    """The member that a cut-off call was in the middle of, as far as it goes; None if `rest` is malformed."""
    if value := _OPEN_VALUE.fullmatch(rest):
        text = value[3][: len(value[3]) - begun(value[3], [_PARAMETER_END])]
        return f"{_json(value[1])}: {_json(text)[:-1] if value[2] == 'true' else text}"
    if opened := _OPEN_KEY.fullmatch(rest):
        key, quote, _ = opened[1].partition('"')
        return f"{_json(key)}: " if quote else _json(key)[:-1]
    rest = rest.lstrip()
    return "" if _starts_one(_INSIDE_CALL, rest) else None


def _opened_object(members: list[str]) -> str:
    return "{" + ", ".join(members) if members else ""


def _starts_one(marks: tuple[str, ...], text: str) -> bool:
    return any(mark.startswith(text) for mark in marks)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=int)
    # int refuses the words NaN and Infinity with a ValueError.
    except (ValueError, RecursionError):
        return False
    return True


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _tool_call(index: int, call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": index, "id": f"call_{index:02}_{secrets.token_hex(12)}", "type": "function", "function": function}
