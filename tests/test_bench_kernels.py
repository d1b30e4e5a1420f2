"""Kernel rows: the right experts, bytes and operations, on memory that no cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from localmoe.bench import bank, kernels
from localmoe.bench.bank import PACKINGS, Bank, TorchExperts, bank_size, expert_bytes, pool_size
from localmoe.bench.shapes import EXPERT_SHAPES, ExpertShape
from localmoe.errors import ResourceError
from localmoe.formats import FORMATS
from tests.native_kernels import library, needs_native

SMALL = ExpertShape(256, 128, 2, 8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(kernels.EXPERT_SHAPES, "small", SMALL)
    monkeypatch.setattr(bank, "WORKING_SET", 500_000)
    before = torch.get_num_threads()
    monkeypatch.setattr(kernels, "use_threads", lambda *_: None)
    assert torch.get_num_threads() == before
    return "small"


@pytest.mark.parametrize("format", PACKINGS)
def test_a_bank_is_a_working_set_and_holds_the_pool(format: str) -> None:
    """Fails if a cache could keep it, or a prompt of another format would choose among fewer experts."""
    for shape in EXPERT_SHAPES.values():
        count = bank_size(shape, format)
        assert count % shape.top_k == 0 or count == pool_size(shape)
        assert count * expert_bytes(shape, format) > 1e9
        assert pool_size(shape) <= count


@pytest.mark.parametrize(
    ("format", "same"), [("fp4", "fp4"), ("int4", "int4_g128"), ("int8", "int8_g128"), ("fp8_block", "fp8_block")]
)
def test_the_bytes_are_those_of_the_format(format: str, same: str) -> None:
    """Fails if GB/s would count other bytes than a model of that format has."""
    weights = [FORMATS[same].quantize(torch.randn(matrix)) for matrix in SMALL.matrices]
    assert expert_bytes(SMALL, format) == sum(weight.nbytes for weight in weights)


@needs_native
@pytest.mark.parametrize("format", PACKINGS)
def test_experts_give_finite_sums_of_sane_size(format: str) -> None:
    """Fails for NaN codes, for scales in the wrong place, or matrices that overlap."""
    experts = Bank(SMALL, format, 4)
    x = torch.randn(5, SMALL.hidden_size)
    ids, weights = torch.tensor([[0, 3]]).expand(5, -1), torch.ones(5, 2)
    y = library().experts(experts.table, x, ids, weights)
    assert bool(y.isfinite().all())
    assert 0.002 < float(y.std()) < 20


@needs_native
def test_rotation_uses_every_expert_before_one_again() -> None:
    """Fails if a call would find its experts in a cache."""
    experts = Bank(SMALL, "fp4", 6)
    assert [experts.rotate() for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_torch_multiplies_as_many_rows_as_each_expert_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the other side of the comparison would do less or more work."""
    flops: list[int] = []
    linear = bank.F.linear

    def count(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        flops.append(2 * len(x) * w.numel())
        return linear(x, w)

    other = TorchExperts(SMALL, 7)
    monkeypatch.setattr(bank.F, "linear", count)
    other.run([3, 7])
    assert sum(flops) == 2 * (3 + 7) * SMALL.num_weights


def rows_of(name: str, **selection: Any) -> list[dict[str, Any]]:
    what = kernels.Selection([name], selection.get("formats", ["fp4"]), selection.get("tokens", [1, 4]))
    return list(kernels.run(library(), what, 3, lambda _doing: None))


@needs_native
def test_few_tokens_are_compared_with_reading_the_same_bytes(small: str) -> None:
    """Fails if four tokens would be counted as four times the bytes, or a ratio compare two modes."""
    rows = rows_of(small)
    assert [(row["tokens"], row["mode"]) for row in rows] == [(1, "fast"), (1, "strict"), (4, "fast"), (4, "strict")]
    assert {row["weight_bytes"] for row in rows} == {2 * expert_bytes(SMALL, "fp4")}
    for row, one in zip(rows[2:], rows[:2], strict=True):
        assert row["times_one_token"] == pytest.approx(row["seconds"] / one["seconds"])
        assert row["percent_of_read"] == pytest.approx(100 * row["bytes_per_s"] / row["read_bytes_per_s"])
        assert row["torch_flops_per_s"] is None
        assert row["flops_per_s"] == pytest.approx(2 * 4 * 2 * SMALL.num_weights / row["seconds"])


@needs_native
def test_many_tokens_are_compared_with_torch(small: str) -> None:
    """Fails if the ratio would be upside down, or the bytes not be those of the experts that were chosen."""
    rows = rows_of(small, tokens=[64])
    assert [row["op"] for row in rows] == ["experts"] * 2
    for row in rows:
        assert row["times_torch"] == pytest.approx(row["flops_per_s"] / row["torch_flops_per_s"])
        assert row["weight_bytes"] == 8 * expert_bytes(SMALL, "fp4")
        assert row["read_bytes_per_s"] is None


@needs_native
def test_a_single_matrix_is_measured_with_512_tokens(small: str) -> None:
    rows = rows_of(small, tokens=[512], formats=["bf16"])
    assert [row["op"] for row in rows] == ["experts", "experts", "linear", "linear"]
    assert rows[2]["weight_bytes"] == 2 * 256 * 128
    assert rows[2]["flops_per_s"] == pytest.approx(2 * 512 * 256 * 128 / rows[2]["seconds"])


def test_a_bank_that_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available_memory", lambda: 2 << 30)
    with pytest.raises(ResourceError, match=r"v4-pro in bf16 needs \d\.\d GiB of RAM and 2\.0 GiB are available"):
        kernels.check_fits("v4-pro", "bf16")
