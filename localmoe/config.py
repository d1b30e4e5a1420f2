"""Strict reading of config.json: every field is typed, bounded and named in its error.

Knows JSON types; does not know any model. What a model does not implement it refuses with must_be()."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from localmoe.errors import ConfigError
from localmoe.files import MIB, read_json, shown

T = TypeVar("T", int, float, str, bool, list[Any], dict[str, Any])

_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
_ABSENT: Any = object()


def load_config(model_dir: Path) -> dict[str, Any]:
    """The model directory's config.json. Raises ConfigError if it is absent, over 4 MiB, or not a JSON object."""
    path = model_dir / "config.json"
    if not os.path.exists(path):
        raise ConfigError(f"{shown(model_dir)}: has no config.json; expected a model directory, check --model")
    return read_json(path, 4 * MIB, ConfigError)


class Reader:
    """One JSON object of a config file. Methods raise ConfigError naming file, field, what was found and expected."""

    def __init__(self, raw: Mapping[str, Any], source: str = "config.json", prefix: str = "") -> None:
        self._raw = raw
        self._source = source
        self._prefix = prefix

    def has(self, name: str) -> bool:
        """True when the field is present and not null."""
        return self._raw.get(name) is not None

    def names(self) -> list[str]:
        """Every field there is, null ones included."""
        return list(self._raw)

    def value(self, name: str) -> Any:
        """The field as it was parsed, None when absent; for fields that may be of more than one kind."""
        return self._raw.get(name)

    def error(self, name: str, problem: str) -> ConfigError:
        """A ConfigError about one field; `problem` says what was found, what was expected, and what to do if known."""
        return ConfigError(f"{self._source}: {shown(self._prefix + name)} {problem}")

    def required(self, name: str, kind: type[T], *, low: float | None = None, high: float | None = None) -> T:
        """The field's value, which must be there, of that kind and in [low, high]. A float field accepts an integer."""
        if not self.has(name):
            raise self.error(name, f"is missing, expected {_WORDS[kind]}; get the model's own config.json")
        return self._checked(name, self._raw[name], kind, low, high)

    def optional(
        self, name: str, kind: type[T], default: T, *, low: float | None = None, high: float | None = None
    ) -> T:
        """As required(), but an absent or null field gives the default."""
        return self._checked(name, self._raw[name], kind, low, high) if self.has(name) else default

    def must_be(self, name: str, *allowed: object, default: object = _ABSENT) -> None:
        """Refuse any value but the allowed ones. An absent or null field counts as the default, if one is given."""
        value = self._raw.get(name)
        if value is None:
            value = default
        if value is _ABSENT:
            raise self.error(name, f"is missing, expected {_choices(allowed)}")
        # 1 == True in Python, not in JSON.
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
            raise self.error(name, f"is {shown(value)}, localmoe implements only {_choices(allowed)}")

    def section(self, name: str) -> Reader:
        """The object under a field; an absent one is an error."""
        return Reader(self.required(name, dict), self._source, f"{self._prefix}{name}.")

    def items(self, name: str, kind: type[T], *, low: float | None = None, high: float | None = None) -> list[T]:
        """A required list whose every element is of one kind and in [low, high]."""
        values = self.required(name, list)
        return [self._checked(f"{name}[{i}]", value, kind, low, high) for i, value in enumerate(values)]

    def agree(self, name: str, value: T, other: str, expected: T) -> T:
        """Refuse two fields that say the same thing differently."""
        if value != expected:
            raise self.error(name, f"says {shown(value)} but {other} says {shown(expected)}; expected them to agree")
        return value

    def _checked(self, name: str, value: Any, kind: type[T], low: float | None, high: float | None) -> T:
        ok = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not ok or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, f"is {shown(value)}, expected {_WORDS[kind]}")
        # A JSON integer may exceed a float, 1e999 parses to infinity.
        if kind is float and not (abs(value) < 1e300 and math.isfinite(value)):
            raise self.error(name, "is too large, expected a finite number")
        if (low is not None and value < low) or (high is not None and value > high):
            raise self.error(name, f"is {shown(value)}, expected {_range(low, high)}")
        return kind(value)


def _choices(allowed: tuple[object, ...]) -> str:
    return " or ".join(shown(choice) for choice in allowed)


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"{low} to {high}"
