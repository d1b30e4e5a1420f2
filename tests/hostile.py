"""Texts made to break tokenizers and parsers, every way to cut them, and the vocabulary they are tried on."""

from __future__ import annotations

import functools
import itertools

from hypothesis import strategies as st

from localmoe.tokenizer import Tokenizer
from tests.conftest import shared_data


@functools.cache
def real_tokenizer() -> Tokenizer:
    return Tokenizer.load(shared_data("tokenizers/deepseek_v4"))


def hostile_texts(spellings: list[str]) -> st.SearchStrategy[str]:
    """Texts made of control spellings, pieces of them, and anything else."""
    pieces = sorted({spelling[:n] for spelling in spellings for n in range(1, len(spelling))})
    some = st.one_of(st.sampled_from(spellings), st.sampled_from(pieces), st.text(max_size=8))
    return st.lists(some, max_size=8).map("".join)


@functools.cache
def hostile_texts_for_deepseek() -> st.SearchStrategy[str]:
    tokenizer = real_tokenizer()
    return hostile_texts([tokenizer.decode([number]) for number in sorted(tokenizer.control_ids)])


def splits(text: str) -> st.SearchStrategy[list[str]]:
    def cut(at: set[int]) -> list[str]:
        points = [0, *sorted(at), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(points)]

    return st.sets(st.integers(0, len(text))).map(cut)
