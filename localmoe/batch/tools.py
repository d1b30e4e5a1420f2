"""What tools a chat request offers, and the calls in a reply to it, as OpenAI writes both.

Knows these fields; how tools are told to a model is in localmoe.prompt, how calls are read in localmoe.reply."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from localmoe.errors import UsageError
from localmoe.files import shown

FIELDS = frozenset({"tools", "tool_choice"})

MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FUNCTION = {"name", "description", "parameters", "strict"}


def tools_of(body: dict[str, Any], raw: bool) -> list[dict[str, Any]]:
    """The tools that the model is told of: none of them if tool_choice is "none". raw: a text is continued.

    Raises UsageError for what is no tool, and for what nothing would hold the model to."""
    given, choice = body.get("tools"), body.get("tool_choice", "auto")
    if FIELDS & body.keys() and raw:
        raise UsageError("tools and tool_choice are of /v1/chat/completions; leave them out")
    if "tool_choice" in body and given is None:
        raise UsageError("tool_choice is given without tools; leave it out")
    if choice not in ("auto", "none"):
        raise UsageError(
            f"tool_choice is {shown(choice)}, expected auto or none: a model cannot be made to call a tool"
        )
    if given is None:
        return []
    if not isinstance(given, list) or not 0 < len(given) <= MOST_TOOLS:
        raise UsageError(f"tools is {shown(given)}, expected a list of 1 to {MOST_TOOLS} tools")
    names = [_checked(at, tool) for at, tool in enumerate(given)]
    double = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if double is not None:
        raise UsageError(f"two tools have the name {double}; names must differ")
    return [] if choice == "none" else given


def calls_of(calls: Sequence[dict[str, Any]], of: str) -> Iterator[dict[str, Any]]:
    """The calls of a reply, under ids that depend on `of`, which stands for the reply, and their place only."""
    for at, call in enumerate(calls):
        name = hashlib.sha256(f"{of}\0{at}".encode()).hexdigest()[:24]
        yield {"id": f"call_{name}", "type": call["type"], "function": call["function"]}


def _checked(at: int, tool: Any) -> str:
    """The name of a tool. Raises UsageError if it is none, or has more than its function."""
    kind = tool.get("type") if isinstance(tool, dict) else tool
    function = tool.get("function") if kind == "function" else None
    if not isinstance(function, dict):
        raise UsageError(f"tools[{at}] is of type {shown(kind)}, expected an object of type function with one")
    more = sorted((tool.keys() - {"type", "function"}) | (function.keys() - _FUNCTION))
    if more:
        raise UsageError(f"tools[{at}] has {shown(more[0])}, which is not known; a model is told nothing of it")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"the name of tools[{at}] is {shown(name)}, expected 1 to 64 letters, digits, _ and -")
    if not isinstance(function.get("description"), str | None):
        raise UsageError(f"the description of tools[{at}] is {shown(function['description'])}, expected a text")
    if not isinstance(parameters, dict | None):
        raise UsageError(f"parameters of tools[{at}] are {shown(parameters)}, expected a JSON schema of an object")
    if function.get("strict") not in (None, False):
        raise UsageError(f"strict of tools[{at}] is {shown(function['strict'])}, but calls are not held to a schema")
    return name
