"""Decode steps of a model on devices, recorded as graphs: telling a device a step anew takes the CPU longer than many a
step takes the device.

A step is recorded when the same sequences have been decoded a few times, and played until one of them has outgrown its
buffers, or others are decoded. Knows steps and positions; does not know layers. Memory: of one recording, the largest
so far."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localmoe.memory import give_back_device_memory
from localmoe.models.inputs import Inputs, Kept
from localmoe.models.model import Model
from localmoe.sequence import SequenceState
from localmoe.spread import CPU
from localmoe.step import Step
from localmoe.tape import Recorder, Tape

# Steps of the same sequences before they are recorded: kernels are compiled in the first, and where others join every
# few steps, recording would take longer than it saves.
WARM_STEPS = 3
# Tokens that there is room for before a step is recorded. A larger buffer is another one, to be recorded anew.
ROOM = 256
_FULL = "no memory left on the device"


@dataclass(frozen=True)
class _Held:
    """Where the sequences of a step lie, and between which positions a device is told the same of them. Does not keep
    them: whoever drops a sequence wants its memory back."""

    states: Sequence[weakref.ref[SequenceState]]
    buffers: Sequence[weakref.ref[Tensor]]
    positions: Sequence[range]

    @classmethod
    def of(cls, step: Step, changes: Sequence[int]) -> _Held:
        """changes: see Model.changes_at."""
        positions = []
        for span in step.spans:
            first = max((at for at in changes if at <= span.position), default=0)
            room = (len(buffer) * tokens for buffer, tokens in span.state.buffers())
            positions.append(range(first, min((*(at for at in changes if at > span.position), *room), default=1 << 60)))
        states = [weakref.ref(span.state) for span in step.spans]
        return cls(states, [weakref.ref(buffer) for buffer in _buffers(step)], positions)

    def fits(self, step: Step) -> bool:
        """Whether another step is to be told like this one."""
        if len(step.spans) != len(self.states):
            return False
        of_spans = zip(step.spans, self.states, self.positions, strict=True)
        if any(span.state is not state() or span.position not in within for span, state, within in of_spans):
            return False
        return all(now is then() for now, then in zip(_buffers(step), self.buffers, strict=True))


@dataclass(frozen=True)
class _Recording:
    """A step that was recorded: where its inputs lie, what is done, and what comes out."""

    inputs: Kept
    tape: Tape
    unsettled: list[tuple[int, str, Tensor]]
    logits: Tensor


class Decoder:
    """Plays decode steps, recording them when that is worth it."""

    def __init__(self, model: Model, recorder: Recorder) -> None:
        """model: one of which unrecordable() says nothing."""
        self._model, self._recorder, self._changes = model, recorder, model.changes_at()
        self._held: _Held | None = None
        self._warm = 0
        self._recording: _Recording | None = None
        # Why nothing is recorded any more: what the device's library said.
        self.failed: str | None = None
        self.played = 0

    def __call__(self, step: Step) -> Tensor | None:
        """Logits [R, vocab] float32 of a complete step, valid until the next one; None for one to be computed."""
        if self.failed is not None or not step.decodes or step.router_log is not None:
            return None
        if self._held is None or not self._held.fits(step):
            self._recording, self._warm = None, 0
            try:
                for span in step.spans:
                    span.state.reserve(ROOM)
            except torch.OutOfMemoryError:
                self.failed = _FULL
                return None
            self._held = _Held.of(step, self._changes)
        if self._recording is None:
            self._warm += 1
            if self._warm <= WARM_STEPS:
                return None
        inputs = self._model.begin(step)
        if self._recording is None:
            self._recording = self._record(step, inputs)
        return None if self._recording is None else self._play(self._recording, step, inputs)

    def forget(self) -> None:
        """Give back the memory of what was recorded."""
        self._held = self._recording = None
        self._recorder.forget()

    def _record(self, step: Step, inputs: Inputs) -> _Recording | None:
        """None if it cannot be: `failed` says why then."""
        for last in (False, True):
            try:
                return self._told(step, inputs)
            except RuntimeError as error:
                # Of CUDA, which has no class of its own for what cannot be recorded.
                full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
                failed = _FULL if full else str(error).partition("\n")[0]
            # Not while the error is handled, which holds on to what it was about.
            self._recorder.forget()
            if last or not full:
                break
            # What torch keeps for other needs it cannot give back while something is recorded.
            give_back_device_memory()
        self.failed = failed
        self.forget()
        return None

    def _told(self, step: Step, inputs: Inputs) -> _Recording:
        kept, unsettled = Kept(inputs, self._model.devices), list[tuple[int, str, Tensor]]()
        try:
            tape = Tape(self._recorder, self._model.devices[0])
            logits = self._model.compute(replace(step, tape=tape, unsettled=unsettled), kept)
            tape.end()
        finally:
            self._recorder.give_up()
        return _Recording(kept, tape, unsettled, logits)

    def _play(self, recording: _Recording, step: Step, inputs: Inputs) -> Tensor:
        recording.inputs.fill(inputs)
        recording.tape.play()
        self.played += 1
        step.unsettled.extend(recording.unsettled)
        # Waits for devices.
        step.commit()
        return recording.logits


def unrecordable(model: Model) -> str | None:
    """Why the decode steps of a model are not told to devices alone, the same at every position; None if they are."""
    here = sum(site.device == CPU for site in model.sites)
    if here:
        return f"{here} of {len(model.sites)} layers are on the CPU"
    if any(site.ops is None for site in model.sites):
        return "PyTorch computes instead of our kernels"
    return "the KV cache is rounded to FP8" if model.quantize_kv else None


def _buffers(step: Step) -> list[Tensor]:
    return [buffer for span in step.spans for buffer, _ in span.state.buffers()]
