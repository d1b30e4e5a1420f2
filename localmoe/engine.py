"""Engine: loaded weights, and steps of the sessions that run on them, several in one.

Knows tokens and logits; does not know text or sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.backend import torch_threads
from localmoe.decoder import Decoder, unrecordable
from localmoe.errors import ResourceError
from localmoe.halves import Halves
from localmoe.memory import give_back_device_memory, give_back_large_blocks
from localmoe.models.model import Model
from localmoe.safetensors_io import byte_view
from localmoe.sequence import Mark
from localmoe.session import Session
from localmoe.step import Fault, Step
from localmoe.step_size import prefill_tokens
from localmoe.tape import Recorder
from localmoe.weights import stored

# Tokens of a step that is not worth halving: if a device has no room for it, experts that it caches give way.
_SMALL_STEP = 64


@dataclass(frozen=True)
class Advanced:
    """Logits [R, vocab] float32 of a step, and where sequences (by index in the step) stopped being finite."""

    logits: Tensor
    faults: dict[int, Fault]


class Engine:
    """A model ready to run. Sessions of one engine may share steps; engines are not thread-safe."""

    def __init__(self, model: Model, recorder: Recorder | None = None) -> None:
        """recorder: makes graphs of decode steps, where all layers are on devices; None for none."""
        give_back_large_blocks()
        self.model = model
        self._unrecordable = None if recorder is None else unrecordable(model)
        self.decoder = None if recorder is None or self._unrecordable else Decoder(model, recorder)
        # Of prompts, in one step.
        self.prefill_tokens = model.experts.prompt_tokens or prefill_tokens(model.config.expert_weights)
        self.fingerprint = fingerprint(model)
        self._on_devices = any(site.device.type != "cpu" for site in model.sites)
        # Tokens of a step that devices have room for, as far as is known.
        self._fits = 1 << 60

    @property
    def graphs_notice(self) -> str | None:
        """What a user should know when decode steps on GPUs do not become graphs, unless none were wanted; one
        sentence, else None."""
        why = self._unrecordable if self.decoder is None else self.decoder.failed
        return None if why is None else f"no CUDA graphs: {why}; every step is told to the GPU anew, which takes longer"

    def new_session(self) -> Session:
        return Session(self)

    @torch.inference_mode()
    def advance(self, work: Sequence[tuple[Session, Sequence[int]]], *, all_logits: bool = False) -> Advanced:
        """Append each chunk to its session in one step. Logits of every row, or of each chunk's last.

        In two, if a device is out of memory for one."""
        self._reserve(work)
        total = sum(len(chunk) for _, chunk in work)
        divisible = self._on_devices and any(len(chunk) > 1 for _, chunk in work)
        while total <= self._fits or not divisible:
            done = self._try(work, all_logits, divisible)
            if done is not None:
                return done
            if total > _SMALL_STEP or not self.model.experts.give_back():
                self._fits = total // 2
        halves = Halves.of(work)
        first, second = (self.advance(half, all_logits=all_logits) for half in (halves.first, halves.second))
        logits = halves.logits(first.logits, second.logits) if all_logits else second.logits
        return Advanced(logits, halves.faults(first.faults, second.faults))

    def _try(self, work: Sequence[tuple[Session, Sequence[int]]], all_logits: bool, divisible: bool) -> Advanced | None:
        """None, with the sessions as they were, if a device has no room for it but may have for less."""
        marks: list[Mark] = []
        try:
            if divisible:
                marks = [session.state.mark() for session, _ in work]
            return self._advance(work, all_logits)
        except torch.OutOfMemoryError:
            if not divisible:
                self._give_back()
                raise _out_of_memory() from None
        # Not while the error is handled, which holds on to what it was about.
        for (session, _), mark in zip(work, marks, strict=False):
            session.state.rewind(mark)
        self._give_back()
        return None

    def _reserve(self, work: Sequence[tuple[Session, Sequence[int]]]) -> None:
        """On devices, what grows does so before anything is written; experts that they cache give way to it."""
        while self._on_devices:
            try:
                for session, chunk in work:
                    session.state.reserve(len(chunk))
                return
            except torch.OutOfMemoryError:
                pass
            more = self.model.experts.give_back()
            self._give_back()
            if not more:
                raise _out_of_memory()

    def _give_back(self) -> None:
        """Give devices what is held for later."""
        if self.decoder is not None:
            self.decoder.forget()
        give_back_device_memory()

    def _advance(self, work: Sequence[tuple[Session, Sequence[int]]], all_logits: bool) -> Advanced:
        step = Step.of([(session.state, chunk) for session, chunk in work], all_logits=all_logits)
        # Torn until the step is complete, so that an interruption at any point leaves no half-written state in use.
        for session, _chunk in work:
            session.torn()
        logits = self._forward(step)
        for session, chunk in work:
            session.extended(chunk)
        return Advanced(logits, step.faults)

    def _forward(self, step: Step) -> Tensor:
        try:
            with torch_threads(self.model.backend, step.token_ids.shape[0]):
                # An error of a device may come with the numbers only, before which the step is not complete.
                logits = None if self.decoder is None else self.decoder(step)
                return (self.model.forward(step) if logits is None else logits).cpu()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Of Triton and cuBLAS; neither has a class of its own for this, nor has torch on the CPU.
            if self._on_devices and any(sign in str(error) for sign in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")):
                raise torch.OutOfMemoryError(str(error)) from None
            if "can't allocate memory" not in str(error):
                raise
            raise ResourceError("out of memory while computing; shorten the prompt, lower --ctx or free RAM") from None


def _out_of_memory() -> ResourceError:
    return ResourceError("a device is out of memory; lower --vram, --ctx or the number of replies")


def fingerprint(model: Model) -> str:
    """Identifies config, dtype, KV format and the weights, by a few values of every layer and how they are packed."""
    digest = hashlib.sha256(f"{model.config} {model.dtype} {model.quantize_kv}".encode())
    for weight in (model.embed, model.norm, model.head, *(w for b in model.blocks for w in b.sample_weights())):
        kept = stored(weight)
        packed = kept if isinstance(kept, Tensor) else kept.data
        digest.update(f"{packed.dtype} {tuple(packed.shape)}".encode())
        digest.update(bytes(byte_view(packed.detach().flatten()[:1024].cpu().contiguous())))
    return digest.hexdigest()
