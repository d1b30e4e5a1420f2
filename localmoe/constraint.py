"""What a reply must look like: JSON, JSON of a schema, a regular expression, a grammar; checked without a model.

Knows llguidance's grammars, imported when the first is checked; does not know tokens of a model (localmoe.guide does).
Memory: the last few grammars that were found good."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from localmoe.errors import UsageError
from localmoe.files import shown
from localmoe.tokenizer import refuse_surrogates

Kind = Literal["json_object", "json_schema", "regex", "grammar"]

# Between two parts of JSON: without a bound, a small model can write blanks until its tokens run out.
_WHITESPACE = r" |\n {0,24}"
# Silent: what is wrong is raised, not printed.
_QUIET = 0


@dataclass(frozen=True)
class Constraint:
    """source: the schema as JSON text, the regular expression in Rust's syntax, or the grammar in llguidance's Lark.

    lenient: keywords of a schema that cannot be enforced are passed over, not refused."""

    kind: Kind
    source: str = ""
    lenient: bool = False

    @classmethod
    def of_schema(cls, schema: Mapping[str, Any], *, lenient: bool = False) -> Constraint:
        """JSON that the schema describes; its properties come in the order of the schema."""
        return cls("json_schema", json.dumps(schema, ensure_ascii=False), lenient)

    def response_format(self) -> dict[str, Any] | None:
        """As a chat request says it to the model; None for what there is no such word for."""
        if self.kind == "json_object":
            return {"type": "json_object"}
        if self.kind == "json_schema":
            return {"type": "json_schema", "json_schema": {"name": "reply", "schema": json.loads(self.source)}}
        return None

    def grammar(self) -> str:
        """As llguidance reads it."""
        from llguidance import LLMatcher

        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.source)
        if self.kind == "grammar":
            return LLMatcher.grammar_from_lark(self.source)
        schema = self.source if self.kind == "json_schema" else '{"type": "object"}'
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _WHITESPACE, "lenient": self.lenient}
        )


@functools.lru_cache(maxsize=256)
def check(constraint: Constraint) -> None:
    """Raises UsageError for a constraint that cannot be compiled, or that no text meets."""
    from llguidance import LLTokenizer

    compiled(constraint, LLTokenizer("byte"))


def compiled(constraint: Constraint, tokens: Any) -> Any:
    """A matcher at its start, to be copied. tokens: an LLTokenizer. Raises UsageError as check() does."""
    from llguidance import LLMatcher, LLParserLimits

    refuse_surrogates(constraint.source)
    what = constraint.kind.replace("_", " ")
    try:
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(tokens, constraint.grammar(), log_level=_QUIET, limits=limits)
    except ValueError as cause:
        raise UsageError(f"the {what} is not accepted: {shown(cause, 300)}") from None
    problem = matcher.get_error()
    if not problem:
        # Only now it is known whether there is a way on.
        matcher.compute_bitmask()
        problem = "no text meets it" if matcher.is_stopped() and not matcher.is_accepting() else ""
    if problem:
        raise UsageError(f"the {what} is not accepted: {shown(' '.join(problem.split()), 300)}")
    return matcher
