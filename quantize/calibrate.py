"""Calibration: a model is run over a text while the inputs of its matrices are added up. Can be stopped, and goes on.

The model is opened with an observer, so its experts are computed one product at a time, by whichever kernels were
chosen: those that compute a whole expert do not show what goes into w2. Knows steps and tokens; does not know how a
file is laid out. Memory: beside the model and the sums, 4 bytes for each input that was met in a step."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from localmoe.api import LLM
from localmoe.device import free_disk
from localmoe.errors import CheckpointError, GenerationError, ResourceError, UsageError
from localmoe.files import shown, sized
from localmoe.loader import read_config
from localmoe.models.family import expert_names
from localmoe.quantize.imatrix import Collected, columns, expert_of, fingerprint, read, write
from localmoe.weights import Observer, See

# Between two saves; and of the time, at most this much is spent on saving.
_SAVE_SECONDS, _SAVE_SHARE = 60, 0.05

# Tokens that have been read, all of them, and how many were read per second.
Progress = Callable[[int, int, float], None]
Open = Callable[[Observer], LLM]


class Watcher:
    """An Observer that adds up the squares of a step's inputs."""

    def __init__(self, wanted: Mapping[str, int]) -> None:
        self._wanted = wanted
        self._found: dict[str, tuple[Tensor, int]] = {}

    def __call__(self, name: str) -> See | None:
        """See Observer."""
        return partial(self._see, name) if name in self._wanted else None

    def take(self) -> dict[str, tuple[Tensor, int]]:
        """Sums [cols] float32 and rows by name, of what was seen since the last time."""
        found, self._found = self._found, {}
        return found

    def _see(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        square, before = rows.square().sum(0), self._found.get(name)
        self._found[name] = (square, len(rows)) if before is None else (before[0] + square, before[1] + len(rows))


@dataclass(frozen=True)
class Text:
    """ids: those to read. digest: of all of the text. bos: what stands before each chunk, if the model has it."""

    ids: Sequence[int]
    digest: str
    bos: int | None

    def chunks(self, at: int, size: int, count: int) -> list[list[int]]:
        """Up to `count` chunks of the text from token `at` on, `size` tokens each with their BOS."""
        start = [] if self.bos is None else [self.bos]
        own = size - len(start)
        firsts = range(at, min(at + count * own, len(self.ids)), own)
        return [[*start, *self.ids[first : first + own]] for first in firsts]


def collect(model: Path, text: Text, out: Path, chunk: int, opener: Open, progress: Progress) -> Collected:
    """Run a model over a text, or go on where `out` ends. Each chunk is a context of its own; some share a step.

    What is complete is saved every minute and whatever ends the run: going on ends with the same bits. Raises
    UsageError for a file of another model, text or chunk, GenerationError for numbers that are not finite."""
    if not text.ids:
        raise UsageError("the text has no tokens; give one of some thousand words")
    limit = read_config(model).max_position_embeddings
    if not 2 <= chunk <= limit:
        raise UsageError(f"--chunk is {chunk}, expected 2 to {limit}, the model's own limit")
    total = begun(model, text, out, chunk)
    if total.tokens >= len(text.ids):
        return total
    wanted = columns(read_config(model))
    _check_room(out, sum(wanted.values()))
    watcher, saver = Watcher(wanted), Saver(out, total)
    with contextlib.closing(opener(watcher)) as llm:
        try:
            _run(llm, text, chunk, watcher, saver, progress)
        finally:
            saver.now()
    return total


def _run(llm: LLM, text: Text, chunk: int, watcher: Watcher, saver: Saver, progress: Progress) -> None:
    total = saver.total
    started, first = time.monotonic(), total.tokens
    # As many as a prompt's step has room for, or experts on disk would be read once for each chunk.
    at_once = max(llm.engine.prefill_tokens // chunk, 1)
    while total.tokens < len(text.ids):
        chunks = text.chunks(total.tokens, chunk, at_once)
        _read(llm, chunks, f"{shown(llm.name)}: after token {total.tokens:,} of the text")
        found = watcher.take()
        infinite = next((name for name, (square, _) in found.items() if not square.isfinite().all()), None)
        if infinite is not None:
            raise GenerationError(f"{shown(llm.name)}: {infinite} has inputs too large to be squared; it is of no use")
        rows = sum(map(len, chunks))
        total.add(found, rows - (0 if text.bos is None else len(chunks)), rows)
        progress(total.tokens, len(text.ids), (total.tokens - first) / max(time.monotonic() - started, 1e-3))
        saver.maybe()


def _read(llm: LLM, chunks: Sequence[Sequence[int]], where: str) -> None:
    size = max(llm.engine.prefill_tokens // len(chunks), 1)
    sessions = [llm.session() for _ in chunks]
    for at in range(0, max(map(len, chunks)), size):
        work = [(one, ids[at : at + size]) for one, ids in zip(sessions, chunks, strict=True) if at < len(ids)]
        faults = llm.engine.advance(work).faults
        if faults:
            fault = next(iter(faults.values()))
            raise GenerationError(f"{where}, {fault}: numbers are not finite; see whether the model's files are sound")


def begun(model: Path, text: Text, out: Path, chunk: int) -> Collected:
    """What `out` holds already, or nothing. Raises UsageError if it is of something else."""
    config = read_config(model)
    if not out.exists():
        if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
            raise UsageError(f"{shown(out.parent)}: is no folder that can be written to; choose another --output")
        places = itertools.product(range(config.num_moe_layers), range(config.num_experts))
        every = (expert_names(config, layer, expert)[0] for layer, expert in places)
        return Collected(fingerprint(model), [text.digest], chunk, {expert_of(w1) for w1 in every})
    found = read(out)
    for what, same in {
        "model": found.model == fingerprint(model),
        "text": found.texts == [text.digest],
        f"chunk ({found.chunk})": found.chunk == chunk,
    }.items():
        if not same:
            raise UsageError(f"{shown(out)}: was begun with another {what}; choose another --output, or remove it")
    wanted = columns(config)
    odd = next((name for name, total in found.sums.items() if wanted.get(name) != len(total)), None)
    if odd is not None:
        raise CheckpointError(
            f"{shown(out)}: has {len(found.sums[odd])} inputs of {shown(odd)}, expected {wanted.get(odd, 'none')}; "
            "make it again with localmoe imatrix"
        )
    return found


def _check_room(out: Path, inputs: int) -> None:
    # The old file stays until the new one is whole.
    need, free = 2 * 8 * inputs, free_disk(out.parent)
    if free is not None and free < need:
        raise ResourceError(
            f"{shown(out)}: up to {sized(need)} will be written and {sized(free)} are free; "
            "free some disk space, or choose another disk"
        )


class Saver:
    """Writes a file now and then."""

    def __init__(self, out: Path, total: Collected) -> None:
        self._out, self.total, self._saved = out, total, total.tokens
        self._next = time.monotonic() + _SAVE_SECONDS

    def maybe(self) -> None:
        """Save, if the last time is long enough ago."""
        if time.monotonic() >= self._next:
            self.now()

    def now(self) -> None:
        """Save, if there is something new and no step was interrupted while it was being added."""
        if not self.total.whole or self.total.tokens == self._saved:
            return
        started = time.monotonic()
        write(self._out, self.total)
        self._saved, ended = self.total.tokens, time.monotonic()
        self._next = ended + max(_SAVE_SECONDS, (ended - started) / _SAVE_SHARE)
