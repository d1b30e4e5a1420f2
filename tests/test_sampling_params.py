"""localmoe.sampler.SamplingParams: out of range is refused by name, and what the field writes is understood."""

from __future__ import annotations

import math
from typing import Any

import pytest

from localmoe.errors import UsageError
from localmoe.sampler import SamplingParams


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 1.0},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": (3,)},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": ("a",)},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_a_parameter_out_of_range_is_named(options: dict[str, Any]) -> None:
    """Fails if it is accepted, corrected in silence, or refused without its name."""
    with pytest.raises(UsageError, match=next(iter(options))):
        SamplingParams(**options)


def test_stops_may_be_one_text_or_a_list() -> None:
    """Fails if "END" becomes the stops "E", "N" and "D"."""
    one: Any = "END"
    several: Any = ["a", "b"]
    assert SamplingParams(stop=one).stop == ("END",)
    assert SamplingParams(stop=several, stop_token_ids=(3,)).stop == ("a", "b")
    assert hash(SamplingParams(stop=several)) == hash(SamplingParams(stop=("a", "b")))
