"""Attention of many queries in the C++ kernels against its twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from localmoe import backend, ops
from localmoe.engine import Engine
from localmoe.kernels import reference
from localmoe.kernels.native_attention import ExpandedAttention
from localmoe.models import mla
from localmoe.models.family import build, config_of
from tests.loops import noise
from tests.native_kernels import ISAS, library, needs_native, using
from tests.tiny_engine import difference, run, token_ids
from tests.tiny_mla import random_state, tiny_config

pytestmark = needs_native

RANK = 16
# Queries, the first one's position, keys of a call, heads, dn, dr, dv.
SHAPES = [
    (1, 0, 4, 1, 16, 8, 16),
    (1, 700, 512, 2, 16, 8, 16),
    (7, 0, 3, 3, 6, 4, 5),
    (97, 0, 512, 16, 16, 8, 16),
    (100, 57, 64, 2, 40, 24, 56),
    (129, 31, 1, 1, 8, 2, 1),
    (230, 90, 200, 2, 128, 64, 128),
    (300, 511, 512, 3, 128, 64, 128),
    (65, 0, 512, 1, 512, 64, 256),
]


def rounds(isa: str) -> bool:
    """Whether products are of numbers rounded to bf16."""
    with using(isa) as lib:
        return lib.rounds_to_bf16


class Case:
    """Random inputs; exact: their numbers are of bf16, so that nothing is rounded but the weights of the softmax."""

    def __init__(self, shape: tuple[int, ...], *, exact: bool, largest: float = 8.0) -> None:
        """largest: how far scores go."""
        n, self.first, self.block, self.heads, self.dn, dr, self.dv = shape
        self.q, self.cache = noise(n, self.heads * (self.dn + dr)), noise(self.first + n, RANK + dr, seed=1)
        self.q = self.q.unflatten(1, (self.heads, -1))
        self.up = noise(self.heads * (self.dn + self.dv), RANK, seed=2) / RANK**0.5
        self.rounding: Callable[[Tensor], Tensor] = (lambda x: x.bfloat16().float()) if exact else (lambda x: x)
        self.q, self.cache = self.rounding(self.q), self.rounding(self.cache)
        self.scale = largest / (4 * math.sqrt(self.dn + dr))

    def expand(self, latents: Tensor) -> Tensor:
        return self.rounding((latents @ self.up.t()).unflatten(-1, (self.heads, -1)))

    @property
    def largest_value(self) -> float:
        return float(self.expand(self.cache[:, :RANK])[..., self.dn :].abs().max())

    def expected(self) -> Tensor:
        options = {"width": RANK, "first": self.first, "scale": self.scale, "block": self.block}
        return reference.expanded_attention(self.q, self.cache, self.expand, **options)  # type: ignore[arg-type]

    def found(self, isa: str, threads: int | None = None) -> Tensor:
        end = self.first + len(self.q)
        with using(isa, threads) as lib:
            attended = lib.expanded_attention(self.q, value_width=self.dv, first=self.first, scale=self.scale)
            for at in range(0, end, self.block):
                rows = self.cache[at : min(at + self.block, end)]
                attended.add(self.expand(rows[:, :RANK]), rows[:, RANK:])
        return attended.out


@pytest.mark.parametrize("largest", [8.0, 80.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_attention_equals_its_twin(isa: str, shape: tuple[int, ...], largest: float) -> None:
    """Fails if a key is hidden or shown that should not be, a head, row or column is taken for another, or sums are
    not scaled to a new maximum.

    bf16 moves a weight of the softmax by 2 ** -9 of it, and so a sum by 2 ** -9 of the largest value; float32 scores
    of 80 are off by some 1e-5, and weights by as much of themselves."""
    case = Case(shape, exact=True, largest=largest)
    found, expected = case.found(isa), case.expected()
    assert found.shape == expected.shape
    assert difference(found, expected) <= (2**-9 * rounds(isa) + 1e-4) * case.largest_value


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_are_rounded_to_nearest(isa: str) -> None:
    """The same bits as of rounded inputs where the CPU multiplies bf16, else as good as the twin."""
    raw, exact = (Case(SHAPES[6], exact=exact) for exact in (False, True))
    found = raw.found(isa)
    if not rounds(isa):
        assert difference(found, raw.expected()) <= 1e-4
        return
    exact.cache[:, :RANK] = raw.cache[:, :RANK]
    assert torch.equal(found, exact.found(isa))


@pytest.mark.parametrize("shape", SHAPES[4:7])
@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa: str, shape: tuple[int, ...]) -> None:
    case = Case(shape, exact=False)
    assert torch.equal(case.found(isa, threads=1), case.found(isa, threads=3))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_broken_breaks_the_queries_that_see_it(isa: str, broken: float) -> None:
    """Fails if a maximum or a weight of zero would hide a broken number, or it would reach queries of long before."""
    case = Case((300, 10, 100, 2, 16, 8, 16), exact=False)
    case.cache[290, 3] = broken  # makes NaN of keys and values: infinities meet both signs
    found = case.found(isa)
    assert not found[280:].isfinite().all(-1).any()
    assert found[:90].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_broken_query_breaks_itself_only(isa: str) -> None:
    case = Case((300, 10, 100, 2, 16, 8, 16), exact=False)
    case.q[7, 1, 3] = math.nan
    found = case.found(isa).isfinite().all(-1)
    assert not found[7, 1]
    assert found.sum() == found.numel() - 1


def test_tensors_that_do_not_fit_are_refused() -> None:
    """Fails if the library, which believes every pointer, were given fewer numbers than it reads."""
    lib = library()
    q, expanded, rotated = noise(5, 3 * 10).unflatten(1, (3, 10)), torch.zeros(4, 3, 13), torch.zeros(4, 9)[:, 5:]
    options: dict[str, Any] = {"value_width": 7, "first": 2, "scale": 1.0}
    attended = lib.expanded_attention(q, **options)
    wrong: list[tuple[Tensor, Tensor]] = [
        (expanded[:3], rotated),
        (expanded[:, :2], rotated),
        (expanded[..., :-1], rotated),
        (expanded.double(), rotated),
        (expanded, rotated.double()),
        (expanded, torch.zeros(4, 11)),
        (expanded, torch.zeros(4, 4, 1)),
        (expanded, torch.zeros(4, 4).t()),
        (torch.zeros(8, 3, 13), torch.zeros(8, 4)),
        (expanded[:0], rotated[:0]),
    ]
    for pair in wrong:
        with pytest.raises(ValueError):
            attended.add(*pair)
    attended.add(expanded, rotated)
    with pytest.raises(ValueError, match="from position 4"):
        attended.add(expanded, rotated)
    attended.add(expanded[:3], rotated[:3])
    for queries, more in [(q.double(), {}), (q[:0], {}), (q[0], {}), (q, {"value_width": 0}), (q, {"first": -1})]:
        with pytest.raises(ValueError):
            lib.expanded_attention(queries, **options | more)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scale"):
            lib.expanded_attention(q, **options | {"scale": scale})


def test_torch_computes_what_the_library_does_not() -> None:
    """Other dtypes, and machines that do not multiply bf16; fails if the library were given any of them."""
    case = Case(SHAPES[4], exact=True)
    options: dict[str, Any] = {"width": RANK, "first": case.first, "scale": case.scale, "block": 64}

    def found(q: Tensor) -> Tensor:
        with mock.patch.object(ExpandedAttention, "add", side_effect=AssertionError):
            return ops.expanded_attention(q, case.cache.to(q.dtype), case.expand, library=library(), **options)

    for isa in ISAS:
        if not rounds(isa):
            with using(isa):
                found(case.q)
    case.up = case.up.bfloat16()
    assert found(case.q.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["v2-lite", "v3", "v3.2"])
def test_a_prompt_is_close_to_strict_mode(name: str) -> None:
    """bf16 activations move logits, which are about 1, by hundredths, and more where another expert is chosen. Fails if
    fast mode would not get here, or strict mode would."""
    config = tiny_config(name)
    state = {n: t.bfloat16() if t.dim() == 2 and "embed" not in n else t for n, t in random_state(config).items()}
    ids, found, calls = token_ids(2 * mla.EXPAND_FROM + 7), [], []
    choices: tuple[backend.KernelChoice, ...] = "strict", "native"
    for kernels in choices:
        options: dict[str, Any] = {"dtype": torch.float32, "backend": backend.choose(kernels, 2)}
        engine = Engine(build(config_of(config), state.__getitem__, **options))
        with mock.patch.object(ExpandedAttention, "add", autospec=True, side_effect=ExpandedAttention.add) as added:
            found.append(run(engine, ids, mla.EXPAND_FROM))
        calls.append(added.call_count)
    # Two chunks, each within one block of keys. V3.2 picks its tokens in a prompt of so many; other tokens, if rounded.
    compiled = name != "v3.2" and library().rounds_to_bf16
    assert calls == [0, 2 * config["num_hidden_layers"] if compiled else 0]
    if name != "v3.2":
        assert float((found[0] - found[1]).abs().amax(-1).quantile(0.9)) <= 0.05
