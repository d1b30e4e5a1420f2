"""Step: one batch of new tokens, each belonging to the state of one sequence. The unit of every forward.

Knows rows and positions; does not know models. Holds no weights and no decode state of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localmoe.sequence import SequenceState
from localmoe.tape import Tape


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a step extend `state`; position: of the first of them."""

    state: SequenceState
    start: int
    stop: int
    position: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Places:
    """Of a decode step: all that a device knows of where its tokens are. positions: [T] int64. slots: [T] int64 of the
    window. turns: by the size of compressed windows, cos and sin [T, P] of the first position of the window in which
    each token is."""

    positions: Tensor
    slots: Tensor | None = None
    turns: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rows(self, rows: slice) -> Places:
        """Of some of the tokens."""
        if rows.indices(len(self.positions)) == (0, len(self.positions), 1):
            return self
        slots = None if self.slots is None else self.slots[rows]
        return Places(self.positions[rows], slots, {m: (cos[rows], sin[rows]) for m, (cos, sin) in self.turns.items()})


@dataclass(frozen=True)
class RouterRecord:
    """What one layer's router did: scores [T, E] float32 (None for a hash layer) and expert ids [T, K]."""

    layer: int
    scores: Tensor | None
    ids: Tensor


@dataclass(frozen=True)
class Fault:
    """Where a sequence first stopped being finite: "attention", "expert 7", ..."""

    layer: int
    site: str

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.site}"


@dataclass(frozen=True)
class Step:
    """token_ids and positions [T] int64; spans cover all rows in order; logit_rows [R] are the rows to give logits for.

    faults maps a span's index to its first non-finite layer, known after commit(); router_log, when a list, receives
    one record per layer. unsettled: layer, site and sums of rows of what devices have computed, not looked at yet.
    places: on a device, if every span is one token: nothing that it is told depends on positions then, but for
    Model.changes_at(). tape: if what it is told is recorded."""

    token_ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    logit_rows: Tensor
    faults: dict[int, Fault] = field(default_factory=dict)
    router_log: list[RouterRecord] | None = None
    unsettled: list[tuple[int, str, Tensor]] = field(default_factory=list)
    places: Places | None = None
    tape: Tape | None = None

    @property
    def decodes(self) -> bool:
        """Whether every span is one token."""
        return len(self.spans) == self.token_ids.shape[0]

    def bring(self, x: Tensor, device: torch.device) -> Tensor:
        """x on the device where the step goes on."""
        return brought(x, device) if self.tape is None else self.tape.bring(x, device)

    @classmethod
    def of(
        cls,
        chunks: Sequence[tuple[SequenceState, Sequence[int]]],
        *,
        all_logits: bool = False,
        router_log: list[RouterRecord] | None = None,
    ) -> Step:
        """A step that appends each chunk of ids to its state. Logits for every row, or for each chunk's last only."""
        assert len({id(state) for state, _ in chunks}) == len(chunks), "a sequence takes one span of a step"
        spans: list[Span] = []
        ids: list[int] = []
        positions: list[int] = []
        at = 0
        for state, chunk in chunks:
            assert len(chunk) > 0, "a span of a step needs at least one token"
            spans.append(Span(state, at, at + len(chunk), state.length))
            ids.extend(chunk)
            positions.extend(range(state.length, state.length + len(chunk)))
            at += len(chunk)
        rows = range(at) if all_logits else (span.stop - 1 for span in spans)
        return cls(
            torch.tensor(ids, dtype=torch.long),
            torch.tensor(positions, dtype=torch.long),
            tuple(spans),
            torch.tensor(list(rows), dtype=torch.long),
            router_log=router_log,
        )

    def parts(self, size: int) -> Iterator[tuple[slice, tuple[tuple[int, Span], ...]]]:
        """The step's rows, at most `size` at a time, and the pieces of its spans in them, each with its span's index.

        A piece's rows are counted from the first of the part."""
        total = len(self.token_ids)
        for first in range(0, total, size):
            last = min(first + size, total)
            pieces = []
            for i, span in enumerate(self.spans):
                start, stop = max(span.start, first), min(span.stop, last)
                if start < stop:
                    piece = Span(span.state, start - first, stop - first, span.position + start - span.start)
                    pieces.append((i, piece))
            yield slice(first, last), tuple(pieces)

    def wanted(self, x: Tensor) -> Tensor:
        """The rows of x [T, ...] that logits are to be given for; they are in order."""
        if len(self.logit_rows) == len(x):
            return x
        return x[brought(self.logit_rows, x.device)]

    def commit(self) -> None:
        """Advance every state; called once, after the whole forward succeeded."""
        for device in {sums.device for _, _, sums in self.unsettled}:
            noted = [(layer, site, sums) for layer, site, sums in self.unsettled if sums.device == device]
            # One wait for each device.
            broken = ~torch.stack([sums for _, _, sums in noted]).cpu().isfinite()
            for (layer, site, _), rows in zip(noted, broken, strict=True):
                _note(self, layer, site, rows)
        for span in self.spans:
            span.state.advance(span.stop - span.start)


def brought(x: Tensor, device: torch.device) -> Tensor:
    """x on a device. From the CPU nobody waits: of memory that is not pinned, the driver takes a copy at once."""
    return x.to(device, non_blocking=x.device.type == "cpu")


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of parts of a step; in a decode step there is one part, which need not be copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def note_faults(step: Step, layer: int, site: str, values: Tensor) -> None:
    """Record `site` for every sequence that was sound so far and whose rows of values [T, ...] are not finite.

    Costs one pass over values; skipped while gradients are recorded. Devices are not waited for: see Step.commit."""
    if torch.is_grad_enabled():
        return
    if values.device.type != "cpu":
        step.unsettled.append((layer, site, values.flatten(1).sum(1, dtype=torch.float32)))
    elif not math.isfinite(values.sum(dtype=torch.float32)):
        _note(step, layer, site, ~values.flatten(1).sum(1, dtype=torch.float32).isfinite())


def _note(step: Step, layer: int, site: str, broken: Tensor) -> None:
    """broken: [T] bool."""
    if broken.any():
        for i, span in enumerate(step.spans):
            # What a device did before may be looked at later.
            first = i not in step.faults or layer < step.faults[i].layer
            if first and broken[span.rows].any():
                step.faults[i] = Fault(layer, site)
