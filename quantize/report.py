"""What quantizing did to the numbers: errors by class of tensor, the worst of them, and how large everything is.

Knows tensors and names; reads and writes no model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from localmoe.files import sized
from localmoe.quantize.numbers import compared

_NUMBERS = re.compile(r"\.\d+(?=\.)")
_WORST = 10


@dataclass(frozen=True)
class Measured:
    """One tensor. error: root of the squared differences over that of the squares; cosine: between before and after."""

    name: str
    source: str
    format: str
    elements: int
    bytes_in: int
    bytes_out: int
    error: float
    cosine: float
    nonfinite: int


def measure(name: str, formats: tuple[str, str], nbytes: tuple[int, int], before: Tensor, after: Tensor) -> Measured:
    """before, after: the matrix as float32, before finite."""
    sums = compared(before, after)
    if sums.difference == 0:
        error, cosine, broken = 0.0, 1.0, 0
    elif math.isfinite(sums.difference) and sums.a and sums.b:
        # No digits that depend on the order of additions.
        error = _rounded(math.sqrt(sums.difference / sums.a))
        cosine, broken = _rounded(sums.product / math.sqrt(sums.a * sums.b)), 0
    else:
        # Cannot be measured; JSON has no infinity.
        error, cosine, broken = 1.0, 0.0, int((~after.isfinite()).sum())
    return Measured(name, *formats, before.numel(), *nbytes, error, cosine, broken)


def _rounded(x: float) -> float:
    return float(f"{x:.9g}")


def class_of(name: str) -> str:
    """A tensor's name without the numbers of its layer and expert."""
    return _NUMBERS.sub(".N", name)


def summary(measured: Iterable[Measured], bytes_in: int, bytes_out: int) -> dict[str, Any]:
    """The report as data. bytes_in, bytes_out: of the whole model."""
    everything = list(measured)
    classes: dict[tuple[str, str, str], list[Measured]] = {}
    for one in everything:
        classes.setdefault((class_of(one.name), one.source, one.format), []).append(one)
    rows = [
        {
            "class": name,
            "source": source,
            "format": format_,
            "tensors": len(found),
            "bytes_in": sum(one.bytes_in for one in found),
            "bytes_out": sum(one.bytes_out for one in found),
            "bits_per_weight": 8 * sum(one.bytes_out for one in found) / sum(one.elements for one in found),
            "mean_error": sum(one.error for one in found) / len(found),
            "largest_error": max(one.error for one in found),
            "least_cosine": min(one.cosine for one in found),
            "nonfinite": sum(one.nonfinite for one in found),
        }
        for (name, source, format_), found in classes.items()
    ]
    worst = sorted(everything, key=lambda one: -one.error)[:_WORST]
    return {"bytes_in": bytes_in, "bytes_out": bytes_out, "classes": rows, "worst": [asdict(one) for one in worst]}


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{sized(report['bytes_in'])} in, {sized(report['bytes_out'])} out.",
        "",
        "| tensors | from | to | count | bits per weight | mean error | largest | least cosine | not finite |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['class']} | {row['source']} | {row['format']} | {row['tensors']} | {row['bits_per_weight']:.2f} "
        f"| {_percent(row['mean_error'])} | {_percent(row['largest_error'])} | {row['least_cosine']:.5f} "
        f"| {row['nonfinite']} |"
        for row in report["classes"]
    ]
    lines += ["", "Worst:", ""]
    lines += [f"- {one['name']}: {_percent(one['error'])}" for one in report["worst"]]
    return "\n".join(lines) + "\n"


def _percent(error: float) -> str:
    return "exact" if error == 0 else f"{100 * error:.2f} %"
