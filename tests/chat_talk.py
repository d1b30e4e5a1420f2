"""What the tests of chat share; the fixtures are in conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from tests.fake_llm import FakeLLM

# Runs a chat whose input is the given lines; returns its exit code.
Talk = Callable[..., int]


def said(model: type[FakeLLM]) -> list[list[str]]:
    """What the model was sent in each turn, as texts."""
    return [[message["content"] for message in asked["messages"]] for asked in model.made[0].asked]
