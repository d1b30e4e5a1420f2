"""A recipe for a number of bytes: it fits, and no other mix of the same size loses less."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.checkpoint import Checkpoint
from localmoe.cli.main import main
from localmoe.errors import UsageError
from localmoe.library import EMBEDDED
from localmoe.models.tensors import is_routed
from localmoe.quantize import convert, fit
from localmoe.quantize.fit import Choice, Part, solve
from localmoe.quantize.recipe import Recipe, Rule, read_text
from tests.tiny_v4 import PUBLISHED_DIMS, published_tensors, random_state, tiny_config, write_model


def silent(_line: str) -> None:
    return


def fitted(memory: int) -> fit.Fit:
    with Checkpoint.open(EMBEDDED) as checkpoint:
        return fit.fit(checkpoint, memory, None, silent)


def memory_for(weights: int) -> int:
    """Of a machine on which so many bytes are left for weights."""
    return int((weights + (1 << 30)) / 0.94) + 2


def least_memory() -> int:
    """On which there is room for all but the routed experts."""
    with Checkpoint.open(EMBEDDED) as checkpoint:
        dense = sum(ref.nbytes for name, ref in checkpoint.refs.items() if not is_routed(name))
    return memory_for(dense)


def parts_of(errors: list[list[float]]) -> list[Part]:
    """Parts whose choices take 4, 3 and 2 bytes."""
    return [
        Part(layer, "w2", tuple(Choice(str(4 - i), 4 - i, error) for i, error in enumerate([0.0, *row])))
        for layer, row in enumerate(errors)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted), min_size=1, max_size=5),
    st.integers(0, 20),
)
def test_it_fits_and_what_is_lost_is_near_the_least(errors: list[list[float]], budget: int) -> None:
    """By trying every mix. Fails if a part goes down that should not: greedy may be off by one step's error."""
    parts = parts_of(errors)
    chosen = solve(parts, budget)
    mixes = list(itertools.product(*(part.choices for part in parts)))
    fitting = [mix for mix in mixes if sum(choice.nbytes for choice in mix) <= budget]
    total = sum(choice.nbytes for choice in chosen)
    if not fitting:
        assert total == sum(part.choices[-1].nbytes for part in parts)
        return
    assert total <= budget
    best = min(sum(choice.error for choice in mix) for mix in fitting)
    largest = max(max(row) for row in errors)
    assert sum(choice.error for choice in chosen) <= best + largest + 1e-9


def test_enough_memory_keeps_everything() -> None:
    assert fitted(1 << 40).recipe == Recipe(())


def test_less_memory_loses_more_and_what_is_made_has_that_size(tmp_path: Path) -> None:
    """Fails if sizes are counted otherwise than they are written, or more bytes do not mean less error."""
    least, most = fitted(least_memory()).nbytes, fitted(1 << 40).nbytes
    found = [fitted(memory_for(int(least + share * (most - least)))) for share in (0.9, 0.5, 0.0)]
    assert [one.nbytes <= one.budget for one in found] == [True] * 3
    assert sorted(one.error for one in found) == [one.error for one in found]
    assert found[0].error < found[2].error
    for one in found:
        assert Recipe(read_text(one.recipe.text).rules) == one.recipe
    made = convert.convert(EMBEDDED, tmp_path / "out", found[2].recipe)
    assert made["bytes_out"] == found[2].nbytes == least


def test_what_cannot_be_made_smaller_is_refused(tmp_path: Path) -> None:
    """Fails if a model of book2 is given a recipe."""
    convert.convert(EMBEDDED, tmp_path / "out", Recipe((Rule(r"\.experts\.", "book2"),)))
    with Checkpoint.open(tmp_path / "out") as checkpoint, pytest.raises(UsageError, match="smallest formats"):
        fit.fit(checkpoint, least_memory(), None, silent)


def test_the_command_says_what_was_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the table is lost, or --fit is taken together with what it decides."""
    assert main(["quantize", str(EMBEDDED), str(tmp_path / "out"), "--fit", "1.15GB", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "of weights for" in shown
    assert "layers: book" in shown
    assert main(["quantize", str(EMBEDDED), str(tmp_path / "out"), "--fit", "2GB", "--experts", "int4"]) == 2


def test_what_is_not_loaded_does_not_count(tmp_path: Path) -> None:
    """Fails if the budget is spent on the tensors of a draft head that stays on disk."""
    config = tiny_config(**PUBLISHED_DIMS)
    tensors = published_tensors(config, random_state(config))
    plain = write_model(tmp_path / "plain", config, tensors)
    more = write_model(tmp_path / "more", config, tensors | {"mtp.0.big.weight": torch.zeros(1 << 20)})
    sizes = []
    for model in (plain, more):
        with Checkpoint.open(model) as checkpoint:
            sizes.append(fit.fit(checkpoint, 1 << 40, None, silent).nbytes)
    assert sizes[0] == sizes[1]


def test_too_small_a_machine_is_refused_before_measuring() -> None:
    with Checkpoint.open(EMBEDDED) as checkpoint, pytest.raises(UsageError, match="fit a larger machine"):
        fit.fit(checkpoint, 500_000_000, None, silent)
