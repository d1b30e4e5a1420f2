"""Which kernels are chosen, and what is said when there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from localmoe import backend
from localmoe.errors import ResourceError, UsageError
from localmoe.kernels import native
from tests.native_kernels import library, needs_native

NONE = "there is no compiler"


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: NONE)


@needs_native
def test_auto_takes_the_library_and_says_nothing() -> None:
    chosen = backend.choose("auto")
    assert chosen is not None
    assert (chosen.library, chosen.mode) == (library(), "fast")
    assert backend.shortfall("auto") is None


@needs_native
def test_strict_is_the_library_with_one_order_of_additions() -> None:
    chosen = backend.choose("strict")
    assert chosen is not None
    assert chosen.mode == "strict"


@needs_native
def test_threads_are_the_librarys() -> None:
    """Fails if --threads is accepted without effect."""
    before = library().threads
    backend.choose("native", 3)
    assert library().threads == 3
    backend.choose("native", before)


def test_the_reference_is_no_backend_and_no_shortfall() -> None:
    assert backend.choose("reference") is None
    assert backend.shortfall("reference") is None


@pytest.mark.usefixtures("no_library")
def test_without_a_library_auto_computes_in_torch_and_says_so() -> None:
    """Fails if a user with no compiler gets an error, or wonders why it is slow."""
    assert backend.choose("auto") is None
    assert NONE in str(backend.shortfall("auto"))


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("kernels", ["native", "strict"])
def test_what_is_asked_for_and_missing_is_an_error(kernels: backend.KernelChoice) -> None:
    """Fails if strict silently becomes something else."""
    with pytest.raises(ResourceError, match=NONE):
        backend.choose(kernels)


@pytest.mark.usefixtures("no_library")
def test_threads_without_a_library_are_an_error() -> None:
    with pytest.raises(UsageError, match="threads"):
        backend.choose("auto", 2)


def test_threads_of_the_reference_are_an_error() -> None:
    with pytest.raises(UsageError, match="threads"):
        backend.choose("reference", 2)


@needs_native
def test_more_threads_than_can_be_are_an_error() -> None:
    with pytest.raises(UsageError, match="expected 1 to 256"):
        backend.choose("native", 1000)


@needs_native
@pytest.mark.parametrize(("tokens", "inside"), [(1, 1), (backend.FEW_TOKENS, 1), (backend.FEW_TOKENS + 1, 2)])
def test_torch_has_one_thread_in_a_step_of_few_tokens(tokens: int, inside: int) -> None:
    """Fails if torch's threads are woken for tiny tensors, or stay away from a prompt, or do not come back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with backend.torch_threads(backend.choose("auto"), tokens):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 2
        with backend.torch_threads(None, tokens):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_torch_is_told_not_to_spin_unless_the_user_says_so(given: str | None, expected: str) -> None:
    """Fails if torch's idle threads take the cores from the kernels, or a user's own setting is overridden."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    code = "import localmoe, os; print(os.environ['OMP_WAIT_POLICY'])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
