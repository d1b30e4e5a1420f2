"""How fast a model would be on a machine: arithmetic on sizes, places and rates.

Owns the hit model and the model of time. Knows no files, no torch and no hardware; measures nothing. A prediction is
what these rates allow, not a promise: see step_seconds for what it leaves out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from localmoe.experts.residency import MOST_GUESSES
from localmoe.models.sizes import ModelSizes
from localmoe.placement import Budget, Placement, place, refuse

# Stand-ins where there is no GPU to measure: PCIe 5 x16 as peers measure it, a mid-range card's memory, bf16 products.
ASSUMED_PCIE, ASSUMED_HBM, ASSUMED_GPU_FLOPS = 52e9, 1000e9, 100e12

# Share of experts held -> share of uses that hit, in the decoding of chat text: between the points of V4-like models
# that others have published (SGLang's expert pack, colibri, Crow, club-3090). They scatter by 10 points and more with
# the text, and count warm caches: a short run sees its cold misses as well.
TYPICAL_HITS = ((0.0, 0.0), (0.06, 0.10), (0.14, 0.50), (0.227, 0.75), (0.33, 0.81), (0.45, 0.85), (1.0, 1.0))

# Of the experts that a layer will ask for, the share that is known before its attention is computed: of those of the
# embedded model, by layer, 0.65 to 0.81; of made-up weights, 0.85. Hash layers are known entirely.
FORESEEN = 0.7

# uniform: every expert alike, the worst case. typical: TYPICAL_HITS. A number: measured, for all that is held.
Hits = Literal["uniform", "typical"] | float
Part = Literal["disk", "dram", "pcie", "hbm", "compute", "python"]


@dataclass(frozen=True)
class Rates:
    """Bytes and operations per second; those of a GPU are None without one. seconds_per_layer: of Python, in a step."""

    dram: float
    disk: float
    flops: float
    seconds_per_layer: float
    pcie: float | None = None
    hbm: float | None = None
    gpu_flops: float | None = None

    def with_assumed_gpu(self) -> Rates:
        """The same, with a stand-in for every rate of a GPU that is not known."""
        return replace(
            self,
            pcie=self.pcie or ASSUMED_PCIE,
            hbm=self.hbm or ASSUMED_HBM,
            gpu_flops=self.gpu_flops or ASSUMED_GPU_FLOPS,
        )


@dataclass(frozen=True)
class Step:
    """One step of so many tokens. parts: seconds of each, which overlap, so that `seconds` is less than their sum."""

    tokens: int
    seconds: float
    parts: dict[Part, float]

    @property
    def bound(self) -> Part:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Plan:
    """hits, vram_hits: share of an expert's uses that finds it in memory, and of those in VRAM, with one sequence.

    decode: one token of every sequence. prefill: one chunk of a prompt."""

    sizes: ModelSizes
    budget: Budget
    rates: Rates
    placement: Placement
    hits: float
    vram_hits: float
    decode: Step
    prefill: Step


@dataclass(frozen=True)
class _Tier:
    """Experts of one layer that lie in one place, and the share of all uses that goes to them."""

    experts: float
    share: float


def plan(sizes: ModelSizes, budget: Budget, rates: Rates, hits: Hits = "typical") -> Plan:
    """Place everything and predict the speed.

    Raises UsageError for a budget that makes no sense, ResourceError with the shortage if the model does not fit."""
    placed = place(sizes, budget)
    refuse(sizes, budget, placed)
    rates = rates.with_assumed_gpu() if budget.vram else replace(rates, pcie=None, hbm=None, gpu_flops=None)
    held = hit_rate((placed.ram_slots + placed.vram_slots) / sizes.experts, hits)
    in_vram = _vram_hits(placed, sizes, held, hits)
    counts = (placed.vram_slots, placed.ram_slots, placed.disk_experts)
    shares = (in_vram, held - in_vram, 1 - held)
    tiers = [_Tier(count / sizes.moe_layers, share) for count, share in zip(counts, shares, strict=True)]
    decode = step_seconds(sizes, placed, rates, tiers, (budget.batch, budget.batch * budget.context))
    # A prompt's chunks see half of the context on average, and nearly all experts, whatever is used most.
    chunk = placed.prefill_tokens
    evicted = placed.ram_slots - placed.prompt_slots
    counts = (placed.vram_slots, placed.prompt_slots, placed.disk_experts + evicted)
    tiers = [_Tier(count / sizes.moe_layers, count / sizes.experts) for count in counts]
    prefill = step_seconds(sizes, placed, rates, tiers, (chunk, budget.context // 2))
    return Plan(sizes, budget, rates, placed, held, in_vram, decode, prefill)


def decode_in_ram(sizes: ModelSizes, rates: Rates, held: float, context: int, hits: Hits = "typical") -> Step:
    """One token of one sequence with everything in RAM but the experts beyond a share `held` of them."""
    placed = place(sizes, Budget(sys.maxsize, context=max(min(context, sizes.context), 1)))
    found = hit_rate(held, hits)
    tiers = [_Tier(0, 0), _Tier(held * sizes.num_experts, found), _Tier((1 - held) * sizes.num_experts, 1 - found)]
    return step_seconds(sizes, placed, replace(rates, pcie=None, hbm=None, gpu_flops=None), tiers, (1, context))


def hit_rate(share_of_experts: float, hits: Hits) -> float:
    """The share of uses that finds its expert in memory, when so large a share of all experts is there."""
    if share_of_experts >= 1:
        return 1.0
    if isinstance(hits, float):
        return hits
    if hits == "uniform":
        return share_of_experts
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(TYPICAL_HITS) if share_of_experts <= pair[1][0])
    return y0 + (y1 - y0) * (share_of_experts - x0) / (x1 - x0)


def _vram_hits(placed: Placement, sizes: ModelSizes, held: float, hits: Hits) -> float:
    """A measured rate says nothing of the tiers: it is split as the typical one would be."""
    kind: Hits = "typical" if isinstance(hits, float) else hits
    of_all = hit_rate((placed.vram_slots + placed.ram_slots) / sizes.experts, kind)
    return held * hit_rate(placed.vram_slots / sizes.experts, kind) / of_all if of_all else 0.0


def distinct(experts: float, uses_per_token: float, tokens: int) -> float:
    """How many of so many experts a step needs, when its tokens choose among them alike and independently."""
    if experts <= 0:
        return 0.0
    return experts * (1 - (1 - min(uses_per_token / experts, 1.0)) ** tokens)


def step_seconds(sizes: ModelSizes, placed: Placement, rates: Rates, tiers: list[_Tier], work: tuple[int, int]) -> Step:
    """The model of time: a step of work = (tokens, tokens of context that they attend to). tiers: VRAM, RAM, disk.

    A tier's experts are each read once, however many tokens need them. In a layer, reading from disk overlaps with the
    experts that are there and, as far as a layer is foreseen, with the dense part before it; what was read is computed
    after it. What lies in VRAM is computed there, what lies in RAM by the CPU, or by the GPU over PCIe where that is
    faster. A device takes the longer of moving bytes and multiplying. Left out: the prefetch of hash layers, latency of
    transfers, and the arithmetic of attention that has no weights."""
    tokens, attended = work
    layers = sizes.moe_layers
    dense_flops = tokens * (sizes.flops_per_token - layers * sizes.top_k * sizes.flops_per_expert)
    kv = attended * sizes.kv_read_per_token
    on_gpu = placed.dense_vram / sizes.dense_bytes_per_token
    kv_on_gpu = placed.kv_vram / (placed.kv_vram + placed.kv_ram)
    times = _Times(rates)
    dense = times.cpu(placed.dense_ram + (1 - kv_on_gpu) * kv, (1 - on_gpu) * dense_flops)
    dense += times.gpu(placed.dense_vram + kv_on_gpu * kv, on_gpu * dense_flops)
    seconds = dense + times.add("python", sizes.num_layers * rates.seconds_per_layer)
    for chance, read, picks in _outcomes(sizes.top_k, tiers, tokens):
        times.weight = chance * layers
        nbytes = [experts * sizes.expert_bytes for experts in read]
        flops = [uses * sizes.flops_per_expert for uses in picks]
        disk = times.add("disk", nbytes[2] / rates.disk)
        disk -= min(FORESEEN * disk, dense / layers, MOST_GUESSES * sizes.expert_bytes / rates.disk)
        there = max(times.gpu(nbytes[0], flops[0]), times.either(nbytes[1], flops[1]))
        seconds += times.weight * (max(disk, there) + times.either(nbytes[2], flops[2]))
    return Step(tokens, seconds, times.parts)


def _outcomes(
    top_k: int, tiers: list[_Tier], tokens: int
) -> Iterator[tuple[float, tuple[float, ...], tuple[float, ...]]]:
    """What a layer may ask of each tier: the chance of it, distinct experts, and uses of them.

    One token misses now more and now less, and a layer that misses much is not made up for by one that misses little.
    With many tokens it is the mean that counts."""
    shares = [tier.share for tier in tiers]
    if tokens > 1:
        read = (distinct(tier.experts, top_k * tier.share, tokens) for tier in tiers)
        yield 1.0, tuple(read), tuple(top_k * tokens * share for share in shares)
        return
    held = shares[0] + shares[1]
    for missed in range(top_k + 1):
        chance = math.comb(top_k, missed) * shares[2] ** missed * held ** (top_k - missed)
        found = [(top_k - missed) * share / held if held else 0.0 for share in shares[:2]]
        yield chance, (*found, missed), (*found, missed)


class _Times:
    """Adds up the seconds of each part, `weight` times; a method returns how long its own work takes once."""

    def __init__(self, rates: Rates) -> None:
        self._rates, self.weight = rates, 1.0
        self.parts: dict[Part, float] = dict.fromkeys(("disk", "dram", "pcie", "hbm", "compute", "python"), 0.0)

    def add(self, part: Part, seconds: float) -> float:
        self.parts[part] += self.weight * seconds
        return seconds

    def cpu(self, nbytes: float, flops: float) -> float:
        return max(self.add("dram", nbytes / self._rates.dram), self.add("compute", flops / self._rates.flops))

    def gpu(self, nbytes: float, flops: float) -> float:
        if not nbytes:
            return 0.0
        hbm, speed = self._rates.hbm, self._rates.gpu_flops
        assert hbm and speed, "bytes in VRAM need the rates of a GPU"
        return max(self.add("hbm", nbytes / hbm), self.add("compute", flops / speed))

    def either(self, nbytes: float, flops: float) -> float:
        """Bytes in RAM: by the CPU, or by the GPU over PCIe, which reads them no faster than RAM gives them."""
        pcie, speed = self._rates.pcie, self._rates.gpu_flops
        by_cpu = max(nbytes / self._rates.dram, flops / self._rates.flops)
        if not (pcie and speed) or by_cpu <= max(nbytes / min(pcie, self._rates.dram), flops / speed):
            return self.cpu(nbytes, flops)
        return max(self.add("pcie", nbytes / min(pcie, self._rates.dram)), self.add("compute", flops / speed))
