"""bitsandbytes beside our kernels: the same products, and who is chosen. bitsandbytes computes on the CPU here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe import gpus, kernel_choice
from localmoe.formats import FORMATS
from localmoe.kernel_choice import FasterLinear, seconds_of
from localmoe.kernels.triton.matrix import Matrix
from localmoe.spread import Gpu
from localmoe.weights import device_matrix
from tests.triton_kernels import DEVICE, error

# isort: split
from localmoe.kernels.triton.ops import TritonOps

ROWS, COLS = 96, 192


def matrix_in(name: str, rows: int = ROWS, cols: int = COLS) -> tuple[Matrix, Tensor]:
    """A matrix and what it stands for."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols))
    packed = FORMATS[name].quantize(weight).to(DEVICE)
    found = device_matrix(packed)
    assert found is not None
    return found, packed.dequantize()


def inputs(tokens: int, cols: int = COLS) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 33])
@pytest.mark.parametrize(("rows", "cols"), [(96, 192), (33, 64), (64, 64)])
def test_products_are_those_of_our_twin(tokens: int, rows: int, cols: int) -> None:
    """Fails if bytes, scales or the order of the two codes in a byte are taken otherwise."""
    module = pytest.importorskip("localmoe.kernels.bits_and_bytes")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    matrix, weight = matrix_in("nf4", rows, cols)
    x = inputs(tokens, cols)
    found = module.BitsAndBytes().linear(x, matrix)
    assert found.dtype == torch.float32
    # Its kernels for the CPU and its products of many rows round to bfloat16.
    assert error(found, x @ weight.T) < 0.02


def test_what_it_cannot_compute() -> None:
    """Fails if scales in groups would be taken for those of rows, or one of many matrices in a slab for all of them."""
    from localmoe.kernels.bits_and_bytes import takes

    assert takes(matrix_in("nf4")[0])
    for name in ("int8_g64", "int4_g64", "fp4"):
        assert not takes(matrix_in(name)[0])
    whole = matrix_in("nf4")[0]
    assert not takes(Matrix.within("nf4", (ROWS // 2, COLS), whole.data, whole.scale, group=64))


class Other:
    """A library that multiplies well, or not."""

    version = "1"

    def __init__(self, weight: Tensor, wrong: float = 0.0) -> None:
        self.weight, self.wrong, self.calls = weight, wrong, 0

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        self.calls += 1
        return x @ self.weight.T * (1 + self.wrong) + 1e-4


def chooser(path: Path, other: Other, *seconds: float) -> tuple[FasterLinear, list[float]]:
    """seconds: of what is timed, in this order: ours, then the other's."""
    left = list(seconds)

    def timed(_work: Callable[[], object], _device: torch.device) -> float:
        return left.pop(0)

    return FasterLinear(lambda: other, path / "choices" / "table.json", timed), left  # type: ignore[return-value, arg-type]


def test_the_faster_is_chosen_for_each_number_of_rows(tmp_path: Path) -> None:
    """Fails if a choice is made twice, or holds for other numbers of rows or other shapes."""
    matrix, weight = matrix_in("nf4")
    other = Other(weight)
    choose, left = chooser(tmp_path, other, 2.0, 1.0, 1.0, 2.0)
    ops = TritonOps(choice=choose)
    few, more = inputs(3), inputs(7)
    assert torch.equal(ops.linear(few, matrix), few @ weight.T + 1e-4)
    assert torch.equal(ops.linear(few[:2], matrix), few[:2] @ weight.T + 1e-4)
    plain = TritonOps()
    assert torch.equal(ops.linear(more, matrix), plain.linear(more, matrix))
    assert torch.equal(ops.linear(more, matrix), plain.linear(more, matrix))
    assert not left and other.calls == 4


def test_choices_are_kept(tmp_path: Path) -> None:
    """Fails if the next run times again, or a file that is none ends it."""
    matrix, weight = matrix_in("nf4")
    first, _ = chooser(tmp_path, Other(weight), 2.0, 1.0)
    TritonOps(choice=first).linear(inputs(1), matrix)
    path = tmp_path / "choices" / "table.json"
    [(key, chosen)] = json.loads(path.read_text()).items()
    assert chosen == "bitsandbytes" and f"nf4 {ROWS} x {COLS}" in key
    again, left = chooser(tmp_path, Other(weight))
    assert torch.equal(TritonOps(choice=again).linear(inputs(1), matrix), inputs(1) @ weight.T + 1e-4)
    path.write_text("{")
    once_more, left = chooser(tmp_path, Other(weight), 1.0, 2.0)
    TritonOps(choice=once_more).linear(inputs(1), matrix)
    assert not left and list(json.loads(path.read_text()).values()) == ["ours"]


def test_who_computes_something_else_is_not_chosen(tmp_path: Path) -> None:
    """Fails if a library that reads the bytes otherwise would be taken for being fast."""
    matrix, weight = matrix_in("nf4")
    choose, left = chooser(tmp_path, Other(weight, wrong=0.2), 2.0, 1.0)
    ops = TritonOps(choice=choose)
    assert torch.equal(ops.linear(inputs(2), matrix), TritonOps().linear(inputs(2), matrix))
    assert left == [2.0, 1.0]


def test_what_must_be_exact_is_ours(tmp_path: Path) -> None:
    """Fails if strict mode, a matrix in parts, another format or no row would ask the other."""
    matrix, weight = matrix_in("nf4")
    other = Other(weight)
    choose, _ = chooser(tmp_path, other, 2.0, 1.0)
    TritonOps(exact=True, choice=choose).linear(inputs(1), matrix)
    ops = TritonOps(choice=choose)
    ops.linear(inputs(1), matrix, exact=True)
    ops.linear(inputs(2)[:, None].expand(-1, 2, -1), matrix, 2)
    ops.linear(inputs(1), matrix_in("int8_g64")[0])
    ops.linear(inputs(0), matrix)
    assert other.calls == 0 and not (tmp_path / "choices").exists()


def test_without_the_library_ours_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise ImportError("no")

    matrix, _ = matrix_in("nf4")
    choose = FasterLinear(absent, tmp_path / "table.json")
    assert torch.equal(TritonOps(choice=choose).linear(inputs(2), matrix), TritonOps().linear(inputs(2), matrix))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert kernel_choice.installed() is None


def test_only_auto_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if strict would compute by kernels whose sums are not ours, or bitsandbytes be imported at the start."""
    choice: Any = object()
    monkeypatch.setattr(kernel_choice, "installed", lambda: choice)
    ops = {kernels: gpus.kernels_for([Gpu(DEVICE, 1)], kernels)[0] for kernels in ("auto", "native", "strict")}  # type: ignore[arg-type]
    assert [getattr(ops[kernels], "choice") for kernels in ops] == [choice, None, None]  # noqa: B009


def test_the_least_time_is_taken() -> None:
    calls: list[int] = []
    assert seconds_of(lambda: calls.append(1), torch.device("cpu")) >= 0
    assert len(calls) == 30
