"""/set of a chat: sampling parameters as words. What a value may be is decided by SamplingParams alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from localmoe.errors import UsageError
from localmoe.files import shown

if TYPE_CHECKING:
    from localmoe.sampler import SamplingParams

# The parameters that a chat has a use for, and how their text becomes a value.
_KINDS: dict[str, type[float] | type[int] | type[str]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
    "stop": str,
}
NAMES = tuple(_KINDS)
# As the options are called.
_ALIASES = {"temp": "temperature"}


def changed(params: SamplingParams, defaults: SamplingParams, name: str, text: str) -> SamplingParams:
    """params with one more value. text: a number; a text to end at; none, for what can be unset; or default.

    Raises UsageError for an unknown name or a value out of range."""
    name = field_name(name)
    value: Any = _value(name, text)
    if text == "default":
        value = getattr(defaults, name)
    elif text == "none":
        value = () if name == "stop" else None
    return replace(params, **{name: value})


def lines(params: SamplingParams, name: str = "") -> list[str]:
    """What /set shows: one parameter, or all. Raises UsageError for an unknown name."""
    names = [field_name(name)] if name else NAMES
    return [f"{each} {_shown(getattr(params, each))}" for each in names]


def field_name(name: str) -> str:
    """The field of SamplingParams that is meant. Raises UsageError if there is none."""
    asked = name.replace("-", "_")
    asked = _ALIASES.get(asked, asked)
    if asked not in _KINDS:
        raise UsageError(f"{shown(name)} cannot be set, expected one of {', '.join(NAMES)}")
    return asked


def _value(name: str, text: str) -> Any:
    try:
        return _KINDS[name](text)
    except ValueError:
        # Refused by SamplingParams, which knows what was expected.
        return text


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(shown(text) for text in value) or "none"
    return "none" if value is None else str(value)
