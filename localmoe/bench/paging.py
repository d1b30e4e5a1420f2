"""Decoding with experts on disk: a model of published shape whose experts do not fit in the RAM it is given.

The experts lie in one safetensors file, in the published layout, which is kept for the next run. What the disk can give
is measured on the same file, in turn with the tokens. Memory: what the model is given."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localmoe.bench import synthetic
from localmoe.bench.endtoend import trace
from localmoe.bench.experts_file import experts_file, layout_of
from localmoe.bench.measure import MemoryReader, Spread, circumstances
from localmoe.bench.rates import layer_seconds, product_rate
from localmoe.bench.report import Column, Record, number, significant, text
from localmoe.bench.subject import Computing
from localmoe.bench.synthetic import Source
from localmoe.device import resident_memory
from localmoe.engine import Engine
from localmoe.errors import UsageError
from localmoe.experts.file import File
from localmoe.experts.paging import PagerStats, Paging
from localmoe.experts.reader import Reader
from localmoe.memory import SlotMemory
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.family import build, tensor_inventory
from localmoe.models.model import ModelConfig
from localmoe.models.sizes import sizes_of_config
from localmoe.models.tensors import LOOKED_UP
from localmoe.pager import open_paged
from localmoe.placement import Budget, place
from localmoe.plan import Hits, Rates, plan
from localmoe.safetensors_io import open_shard
from localmoe.session import Session

Report = Callable[[str], None]
# Experts read for one sample of what the disk can give.
_DISK_EXPERTS = 24
# Tokens between two such samples, and between two passes over the dense weights.
_TOKENS_PER_SAMPLE = 8
# What a plan adds to a record.
_PLANNED = ("planned_tokens_per_s", "planned_slots", "planned_parts", "planned_prompt_tokens_per_s")
# Of the experts of a layer, this share is preferred with skewed routing, by so much that it gets three picks of four.
_PREFERRED, _PREFERENCE = 0.25, 0.85


@dataclass(frozen=True)
class Trial:
    """Tokens to produce, after so many to fill the slots; skewed: a quarter of the experts gets most of the picks.

    prompt: tokens of a prompt before all of them, 0 for none."""

    tokens: int
    warm_up: int
    skewed: bool
    prompt: int = 0


class Paged:
    """The model to measure, and the file its experts are in."""

    def __init__(
        self, name: str, config: ModelConfig, folder: Path, computing: Computing, paging: Paging, report: Report,
        *, skewed: bool,
    ) -> None:  # fmt: skip
        self.name, self.config, self.computing, self.ram = name, config, computing, paging.ram
        if not isinstance(config, DeepseekV4Config):
            raise UsageError(f"bench paging makes models of the shape of DeepSeek-V4 only, not of {config.model_type}")
        path = experts_file(folder, name, config, report)
        # Now, because it needs memory that the model is about to take.
        self.layer_seconds = layer_seconds(computing.library, name)
        fd, refs = open_shard(path)
        info = os.fstat(fd)
        os.close(fd)
        self.layout = layout_of(config, refs)
        self.open_file = lambda _number: File(path, info.st_size, (info.st_dev, info.st_ino))
        weights = synthetic.synthetic_weights(config, computing.held, dense_only=True)
        prefer(config, weights, skewed=skewed)
        self.dense = tuple(piece for weight in weights.values() for piece in _pieces(weight))
        self.experts = open_paged(
            name, config, self.layout, self.open_file, paging, dtype=computing.dtype, backend=computing.backend
        )
        model = build(
            config, weights.__getitem__, dtype=computing.dtype, experts=self.experts, backend=computing.backend
        )
        self.engine = Engine(model)

    @property
    def dense_bytes_per_token(self) -> int:
        """What a token reads beside routed experts: all but the other rows of the embedding and hash tables."""
        total = sum(piece.nbytes for piece in self.dense)
        rows = [spec.shape for name, spec in tensor_inventory(self.config).items() if name.endswith(LOOKED_UP)]
        tables = sum(math.prod(shape) * (8 if shape[1] != self.config.hidden_size else 2) for shape in rows)
        return total - tables


def _pieces(weight: Source) -> tuple[Tensor, ...]:
    return (weight,) if isinstance(weight, Tensor) else (weight.data, weight.scale)


def prefer(config: DeepseekV4Config, weights: dict[str, Source], *, skewed: bool) -> None:
    """Make the routing even, or let a quarter of the experts get most of the picks."""
    generator = torch.Generator().manual_seed(3)
    count = config.num_experts
    for layer in range(config.num_moe_layers):
        preferred = torch.randperm(count, generator=generator)[: round(_PREFERRED * count)]
        name = f"layers.{layer}.ffn.gate."
        if not config.is_hash(layer):
            bias = weights[name + "bias"]
            assert isinstance(bias, Tensor), "a bias is plain"
            bias.zero_()
            if skewed:
                bias[preferred] = _PREFERENCE
        elif skewed:
            table = weights[name + "tid2eid"]
            assert isinstance(table, Tensor), "a table is plain"
            odds = torch.ones(4096, count)
            odds[:, preferred] = 9.0
            choices = torch.multinomial(odds, config.experts_per_token, generator=generator)
            table.copy_(choices[torch.randint(len(choices), (len(table),), generator=generator)])


def run(paged: Paged, trial: Trial, report: Report) -> Iterator[Record]:
    """Fill the slots, then produce tokens in turn with reads of the same file; yields one record."""
    engine, session = paged.engine, paged.engine.new_session()
    ids = trace(trial.warm_up + trial.tokens, paged.config.vocab_size)
    rss = [resident_memory()]
    prompt_seconds = _read_prompt(engine, session, trial, rss, report)
    for i in range(trial.warm_up):
        report(f"filling slots: token {i + 1} of {trial.warm_up}")
        engine.advance([(session, ids[i : i + 1])])
    library = paged.computing.library
    disk, reader = _Disk(paged), MemoryReader(library)
    rates, drams = [disk.rate()], [reader.bytes_per_s(paged.dense)]
    seconds = []
    before = paged.experts.stats
    for i in range(trial.warm_up, trial.warm_up + trial.tokens):
        report(f"token {i - trial.warm_up + 1} of {trial.tokens}")
        started = time.perf_counter()
        engine.advance([(session, ids[i : i + 1])])
        seconds.append(time.perf_counter() - started)
        rss.append(resident_memory())
        if (i - trial.warm_up) % _TOKENS_PER_SAMPLE == _TOKENS_PER_SAMPLE - 1:
            rates.append(disk.rate())
            drams.append(reader.bytes_per_s(paged.dense))
    stats = paged.experts.stats - before
    disk.close()
    rate = trial.prompt / prompt_seconds if trial.prompt else None
    found = {"prompt_tokens": trial.prompt, "prompt_tokens_per_s": rate} | _record(
        paged, trial, Spread(tuple(seconds)), stats, Spread(tuple(rates)), Spread(tuple(drams)), rss
    )
    yield found | _planned(paged, trial, found) | circumstances(library)


def _read_prompt(engine: Engine, session: Session, trial: Trial, rss: list[int], report: Report) -> float:
    """Seconds that a prompt takes, in the chunks the scheduler makes."""
    ids = trace(max(trial.prompt, 1), engine.model.config.vocab_size)
    started = time.perf_counter()
    for at in range(0, trial.prompt, engine.prefill_tokens):
        report(f"reading the prompt: token {at} of {trial.prompt}")
        engine.advance([(session, ids[at : min(at + engine.prefill_tokens, trial.prompt)])])
        rss.append(resident_memory())
    return time.perf_counter() - started


def _planned(paged: Paged, trial: Trial, found: Record) -> Record:
    """What localmoe plan says of this budget with the rates of this run, and how far from it the run was.

    Even routing is planned without knowing anything of the run; for the skewed one, the hit rate is what was measured.
    None without a budget in bytes, or where plan would refuse it: it is more careful than the pager."""
    sizes = sizes_of_config(paged.config, paged.name)
    budget = Budget(paged.ram or 0, context=trial.prompt or trial.warm_up + trial.tokens)
    if place(sizes, budget).short:
        return dict.fromkeys(_PLANNED)
    library = paged.computing.library
    speed = Rates(found["dram_bytes_per_s"], found["disk_bytes_per_s"], product_rate(library), paged.layer_seconds)
    hits: Hits = found["hit_percent"] / 100 if trial.skewed else "uniform"
    planned = plan(sizes, budget, speed, hits)
    return {
        "planned_tokens_per_s": planned.decode.tokens_per_s,
        "planned_slots": planned.placement.ram_slots,
        "planned_parts": planned.decode.parts,
        "planned_prompt_tokens_per_s": planned.prefill.tokens_per_s,
    }


class _Disk:
    """What the disk gives when nothing but experts is read from it, as the pager reads them."""

    def __init__(self, paged: Paged) -> None:
        self._layout, self._reader = paged.layout, Reader(paged.open_file)
        self._memory = SlotMemory(2, paged.layout.slot_bytes)
        self._random = random.Random(5)

    def rate(self) -> float:
        """Bytes per second of experts at random."""
        started, before = time.perf_counter(), self._reader.bytes_read
        jobs = []
        for i in range(_DISK_EXPERTS):
            at = self._random.randrange(self._layout.num_layers), self._random.randrange(self._layout.num_experts)
            jobs.append(self._reader.submit(self._layout.place(*at).ranges, self._memory.view(i % 2), lambda: None))
        for job in jobs:
            self._reader.wait(job)
        return (self._reader.bytes_read - before) / (time.perf_counter() - started)

    def close(self) -> None:
        self._reader.close()


def _record(
    paged: Paged, trial: Trial, seconds: Spread, stats: PagerStats, disk: Spread, dram: Spread, rss: list[int]
) -> Record:
    tokens = trial.tokens
    total = sum(seconds.samples)
    disk_bytes, expert_bytes = stats.bytes_read / tokens, stats.bytes_computed / tokens
    # Disk and memory can work at the same time.
    floor = max(disk_bytes / disk.median, (paged.dense_bytes_per_token + expert_bytes) / dram.median)
    capacity, all_ = paged.experts.capacity, paged.config.num_moe_layers * paged.config.num_experts
    return {
        "model": f"{paged.name} synthetic, {paged.config.num_layers} layers",
        "routing": "skewed" if trial.skewed else "even",
        "slots": capacity,
        "share": 100 * capacity / all_,
        "tokens": tokens,
        "tokens_per_s": tokens / total,
        "median_seconds": seconds.median,
        "hit_percent": 100 * stats.hit_rate,
        "guesses_per_token": stats.guesses / tokens,
        "true_guess_percent": 100 * stats.true_guesses / stats.guesses if stats.guesses else None,
        "disk_bytes_per_token": disk_bytes,
        "memory_bytes_per_token": paged.dense_bytes_per_token + expert_bytes,
        "disk_bytes_per_s": disk.median,
        "dram_bytes_per_s": dram.median,
        "busy_bytes_per_s": stats.bytes_read / max(stats.busy_seconds, 1e-9),
        "percent_of_disk": 100 * stats.bytes_read / max(stats.busy_seconds, 1e-9) / disk.median,
        "percent_of_limit": 100 * floor * tokens / total,
        "wait_share": 100 * stats.wait_seconds / total,
        "peak_rss_bytes": max(rss),
        "samples_rss_bytes": rss,
        "samples_seconds": list(seconds.samples),
        "samples_disk_bytes_per_s": list(disk.samples),
        "samples_dram_bytes_per_s": list(dram.samples),
    }


def _curve(samples: list[int]) -> str:
    shown = (samples[0], samples[len(samples) // 2], samples[-1], max(samples))
    return ", ".join(f"{nbytes / 1e9:.2f}" for nbytes in shown)


COLUMNS = (
    Column("model", text("model"), 30, "left"),
    Column("routing", text("routing"), 7, "left"),
    Column("slots", lambda r: f"{r['slots']} ({r['share']:.0f} %)", 12),
    Column("t/s", lambda r: significant(r["tokens_per_s"]), 7),
    Column("planned", lambda r: "" if r["planned_tokens_per_s"] is None else significant(r["planned_tokens_per_s"]), 7),
    Column("prompt t/s", number("prompt_tokens_per_s"), 10),
    Column("hits %", number("hit_percent"), 6),
    Column("true guesses %", number("true_guess_percent"), 14),
    Column("disk GB/token", lambda r: significant(r["disk_bytes_per_token"] / 1e9), 13),
    Column("GB/s while reading", lambda r: significant(r["busy_bytes_per_s"] / 1e9), 18),
    Column("disk alone GB/s", lambda r: significant(r["disk_bytes_per_s"] / 1e9), 15),
    Column("% of disk", number("percent_of_disk"), 9),
    Column("% of limit", number("percent_of_limit"), 10),
    Column("waiting %", number("wait_share"), 9),
    Column("RSS GB begin, middle, end, peak", lambda r: _curve(r["samples_rss_bytes"]), 31),
)
