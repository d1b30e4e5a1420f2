"""A plan as text, as JSON, or as a table of decode speeds for several sizes of memory.

Knows what a plan holds; does not know how it came about. Sizes print in GiB, rates in GB/s."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localmoe.models.sizes import ModelSizes
    from localmoe.placement import Budget
    from localmoe.plan import Hits, Plan, Rates, Step

_GIB = 1 << 30
# The sizes of --table, in GB of 10^9 bytes as they are sold.
TABLE_RAM, TABLE_VRAM = (32, 64, 128, 256), (0, 24, 32, 80)
_PARTS = {"disk": "disk", "dram": "DRAM", "pcie": "PCIe", "hbm": "VRAM", "compute": "arithmetic", "python": "Python"}


@dataclass(frozen=True)
class Question:
    """What is asked of a plan beside its budget: a model, the rates as measured, and the hit model."""

    sizes: ModelSizes
    rates: Rates
    hits: Hits

    @property
    def assumes_gpu(self) -> bool:
        return self.rates.hbm is None


def record(found: Plan, asked: Question) -> dict[str, Any]:
    """A plan as JSON: sizes in bytes, rates per second."""
    steps = {"decode": found.decode, "prefill": found.prefill}
    return {
        "model": asdict(found.sizes),
        "budget": asdict(found.budget),
        "rates": asdict(found.rates),
        "gpu_rates_assumed": bool(found.budget.vram) and asked.assumes_gpu,
        "placement": asdict(found.placement),
        "hits": found.hits,
        "vram_hits": found.vram_hits,
        **{
            name: asdict(step) | {"tokens_per_s": step.tokens_per_s, "bound": step.bound}
            for name, step in steps.items()
        },
    }


def lines(found: Plan, asked: Question) -> list[tuple[str, str]]:
    """A plan as a person reads it."""
    s, p, budget, rates = found.sizes, found.placement, found.budget, found.rates
    evicted = p.ram_slots - p.prompt_slots
    result = [
        ("model", f"{s.name}, {_gib(s.total_bytes)}: {s.experts} experts of {s.expert_bytes / 1e6:.1f} MB, "
                  f"{s.top_k} of {s.num_experts} in each of {s.moe_layers} layers"),
        ("", f"context {budget.context:,}, {budget.batch} sequence{'s' * (budget.batch != 1)}; "
             f"each token of it keeps {s.kv_bytes_per_token:,.0f} bytes"),
        ("RAM", f"{_gib(budget.ram)} given"),
        *_held(
            {
                "Python and the system": p.base,
                "working memory": p.work,
                "page-locked, to copy to the GPU from": p.staging,
                "weights": p.tables + p.dense_ram,
                "KV cache": p.kv_ram,
            },
            p.ram_slots,
            s,
        ),
    ]  # fmt: skip
    if budget.vram:
        parts = {"CUDA, working memory": p.gpu_base, "weights": p.dense_vram, "KV cache": p.kv_vram,
                 "experts on their way": p.vram_spare * s.expert_bytes}  # fmt: skip
        result += [("VRAM", f"{_gib(budget.vram)} given"), *_held(parts, p.vram_slots, s)]
    source = f"measured at {found.hits:.0%}" if isinstance(asked.hits, float) else f"{asked.hits}"
    result += [
        ("disk", "the rest" if p.disk_experts else "nothing"),
        *_held({}, p.disk_experts, s),
        ("hits", f"{found.hits:.0%} of expert uses ({source}{', give or take 10 points' * (asked.hits == 'typical')})"),
        ("decode", _speed(found.decode)),
        ("prefill", _speed(found.prefill)),
        *([("", f"meanwhile {evicted} experts make room for {_gib(p.prompt_work)} of work")] if evicted else []),
        ("rates", f"DRAM {rates.dram / 1e9:.1f} GB/s, disk {rates.disk / 1e9:.2f} GB/s, {_tflops(rates.flops)}"),
    ]
    if budget.vram:
        result.append(("", _gpu_rates(found.rates, asked)))
    return result


def _held(parts: dict[str, int], experts: int, sizes: ModelSizes) -> list[tuple[str, str]]:
    rows = [("", f"{_gib(nbytes):>12}  {name}") for name, nbytes in parts.items() if nbytes]
    if experts:
        share = experts / sizes.experts
        rows.append(("", f"{_gib(experts * sizes.expert_bytes):>12}  {experts} experts, {share:.1%} of all"))
    return rows


def _speed(step: Step) -> str:
    spent = {_PARTS[part]: seconds for part, seconds in step.parts.items() if seconds}
    listed = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in spent.items())
    return (
        f"{step.tokens_per_s:.2f} tok/s, bound by {_PARTS[step.bound]}; "
        f"a step of {step.tokens} takes {1000 * step.seconds:.1f} ms: {listed}"
    )


def _gpu_rates(rates: Rates, asked: Question) -> str:
    known = rates.with_assumed_gpu()
    assert known.pcie and known.hbm and known.gpu_flops, "with_assumed_gpu leaves no rate out"
    return (
        f"PCIe {known.pcie / 1e9:.0f} GB/s, VRAM {known.hbm / 1e9:.0f} GB/s, {_tflops(known.gpu_flops)} on the GPU"
        f"{': assumed, not measured, for there is no GPU here' * asked.assumes_gpu}"
    )


def print_table(asked: Question, budget: Budget, *, as_json: bool) -> None:
    """Decode tokens per second for every pair of TABLE_RAM and TABLE_VRAM, or what is missing."""
    from localmoe.bench.report import Column, MarkdownWriter, text

    rows = [{"ram": f"{ram} GB"} | {f"{vram}": _cell(asked, budget, ram, vram) for vram in TABLE_VRAM}
            for ram in TABLE_RAM]  # fmt: skip
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(row | {"model": asked.sizes.name}) + "\n")
        return
    rates = asked.rates
    sys.stdout.write(
        f"{asked.sizes.name}, decode tok/s; context {budget.context}, batch {budget.batch}, hits {asked.hits}\n"
        f"DRAM {rates.dram / 1e9:.1f} GB/s, disk {rates.disk / 1e9:.2f} GB/s, {_tflops(rates.flops)}\n"
        f"GPU: {_gpu_rates(rates, asked)}\n\n"
    )
    titles = {str(vram): f"{vram} GB VRAM" if vram else "no GPU" for vram in TABLE_VRAM}
    columns = [Column("RAM", text("ram")), *(Column(title, text(key), 12) for key, title in titles.items())]
    writer = MarkdownWriter(sys.stdout, columns)
    for row in rows:
        writer.row(row)


def _cell(asked: Question, budget: Budget, ram: int, vram: int) -> str:
    from localmoe.placement import place
    from localmoe.plan import plan as predict

    tried = replace(budget, ram=ram * 10**9, vram=vram * 10**9)
    short = place(asked.sizes, tried).short
    if short:
        return f"no: short by {short / _GIB:.1f} GiB"
    return f"{predict(asked.sizes, tried, asked.rates, asked.hits).decode.tokens_per_s:.2f}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB"


def _tflops(flops: float) -> str:
    return f"{flops / 1e12:.2f} TFLOP/s"
