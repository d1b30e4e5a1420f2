"""What a request says its reply must look like: OpenAI's response_format, or guided_regex, or grammar.

Knows these fields; what a constraint can be is in localmoe.constraint."""

from __future__ import annotations

import re
from typing import Any

from localmoe.constraint import Constraint, Kind, check
from localmoe.errors import UsageError
from localmoe.files import shown

FIELDS = frozenset({"response_format", "guided_regex", "grammar"})

_TEXTS: dict[str, Kind] = {"guided_regex": "regex", "grammar": "grammar"}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def constraint_of(body: dict[str, Any]) -> dict[str, Constraint | None]:
    """The field `constraint` of SamplingParams, if the request sets it; None is what {"type": "text"} asks for.

    Raises UsageError for one that cannot be held to."""
    given = sorted(FIELDS & body.keys())
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are given; leave all but one of them out")
    if not given:
        return {}
    field, value = given[0], body[given[0]]
    if field == "response_format":
        found = _response_format(value)
    elif isinstance(value, str) and value:
        found = Constraint(_TEXTS[field], value)
    else:
        raise UsageError(f"{field} is {shown(value)}, expected a text of at least one character")
    if found is not None:
        check(found)
    return {"constraint": found}


def _response_format(value: Any) -> Constraint | None:
    kind = value.get("type") if isinstance(value, dict) else None
    allowed = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind not in ("text", "json_object", "json_schema") or value.keys() != allowed:
        raise UsageError(
            f"response_format is {shown(value)}, expected a type of text or json_object, or json_schema with one"
        )
    if kind == "json_schema":
        return _schema(value["json_schema"])
    return Constraint("json_object") if kind == "json_object" else None


def _schema(value: Any) -> Constraint:
    """strict, unless it is false, refuses a schema with keywords that cannot be enforced."""
    known = {"name", "schema", "strict", "description"}
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict) or not value.keys() <= known:
        raise UsageError(f"json_schema is {shown(value)}, expected an object of name, schema and strict")
    name, strict = value.get("name", "reply"), value.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"the name of json_schema is {shown(name)}, expected 1 to 64 letters, digits, _ and -")
    if strict not in (None, True, False):
        raise UsageError(f"strict is {shown(strict)}, expected true or false")
    return Constraint.of_schema(value["schema"], lenient=strict is False)
