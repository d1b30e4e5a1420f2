"""Engine: loaded weights, and the sessions that run on them in shared steps.

A `Session` is one mutable timeline of tokens; `Engine.advance` runs one step for several of them. Knows tokens and
logits; does not know text or sampling. Memory: a session holds its decode state and a bounded number of marks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from localmoe.backend import torch_threads
from localmoe.cache import Mark, SequenceState
from localmoe.decoder import Decoder, unrecordable
from localmoe.errors import CheckpointError, GenerationError, ResourceError
from localmoe.files import shown
from localmoe.halves import Halves
from localmoe.marks import MAX_MARKS, least_useful, most_marks
from localmoe.memory import give_back_device_memory, give_back_large_blocks
from localmoe.models.model import Model
from localmoe.safetensors_io import byte_view
from localmoe.snapshot import Head, Snapshot, prefix_digests, read_head, read_tensors
from localmoe.step import Fault, Step
from localmoe.step_size import prefill_tokens
from localmoe.tape import Recorder
from localmoe.weights import stored

# Tokens of a step that is not worth halving: if a device has no room for it, experts that it caches give way.
_SMALL_STEP = 64


class Session:
    """One conversation's decode state and the tokens it stands for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.state = engine.model.new_state()
        self._most_marks = most_marks(self.state.fixed_nbytes)
        self.ids: list[int] = []
        self._marks: list[Mark] = []
        self._torn = False
        # Counts begin() calls: a reply that was overtaken by a later one must not go on writing here.
        self.turn = 0

    @property
    def length(self) -> int:
        """Tokens computed."""
        return len(self.ids)

    def begin(self, ids: Sequence[int]) -> int:
        """Make this session a prefix of `ids`, keeping as much as possible; returns how many tokens are kept.

        What is kept is marked: another continuation of it can begin here too."""
        self.turn += 1
        kept = self.kept(ids)
        if self._torn or kept != self.length:
            self._return_to(kept)
        self.mark()
        return kept

    def kept(self, ids: Sequence[int]) -> int:
        """How many tokens begin(ids) would keep: less than all, so that there is a token left to get logits from.

        All of the session if ids go on from it, else up to the last mark inside the common prefix, or none; all of the
        common prefix if nothing of the state is overwritten, as in latent attention."""
        shared = common_prefix(self.ids, ids)
        if (not self._torn and shared == self.length < len(ids)) or not self.state.fixed_nbytes:
            return min(shared, len(ids) - 1)
        return max((mark for mark in self.marks if mark <= min(shared, len(ids) - 1)), default=0)

    @property
    def marks(self) -> list[int]:
        """The lengths that this session can go back to without reading again, ascending, besides 0."""
        return [mark.length for mark in self._marks]

    def mark(self) -> None:
        """Remember this point as one that begin() and rewind() can return to; an older one may be given up for it."""
        if self.length and not (self._marks and self._marks[-1].length == self.length):
            self._marks.append(self.state.mark())
            if len(self._marks) > self._most_marks:
                del self._marks[least_useful(self.marks)]

    def rewind(self, length: int) -> None:
        """Go back to a marked length (or 0). Raises ValueError when there is no mark there."""
        if length not in (0, *self.marks):
            raise ValueError(f"no mark at {length} tokens; marks are at {self.marks}")
        self._return_to(length)

    def _return_to(self, limit: int) -> None:
        """Go back to the last mark at or before `limit` tokens, or to the start; where marks are empty, to `limit`."""
        self._torn = True
        self._marks = [mark for mark in self._marks if mark.length <= limit]
        if not self.state.fixed_nbytes:
            self.state.rewind(Mark(limit, ()))
        elif self._marks:
            self.state.rewind(self._marks[-1])
        else:
            self.state = self._engine.model.new_state()
        del self.ids[self.state.length :]
        self._torn = False

    def _marked(self, length: int) -> Mark | None:
        return next((mark for mark in self._marks if mark.length == length), None)

    def fork(self, length: int) -> Session:
        """Another session that has read the first `length` tokens: a copy. length: as kept() gives it."""
        other = Session(self._engine)
        marked = self._marked(length)
        if marked is None and length != self.length:
            assert not self.state.fixed_nbytes, "what is overwritten can be had again at marks only"
            marked = Mark(length, ())
        copies = {name: tensor.clone() for name, tensor in self.state.tensors(marked).items()}
        other.state.load_tensors(copies, length)
        other.ids = self.ids[:length]
        return other

    def torn(self) -> None:
        """Told by the engine before a step: until extended(), only marks can be trusted."""
        self._torn = True

    def extended(self, chunk: Sequence[int]) -> None:
        """Told by the engine after a step that took `chunk`."""
        self.ids.extend(chunk)
        self._torn = False

    def snapshot(self, at: int | None = None) -> Snapshot:
        """The session, for restore() on the same model: state, tokens and marks; what is on the CPU is not copied.

        at: one of its marks; then only what had been read there, without other marks.
        Its facts: "model", the engine's fingerprint; "ends": [length, digest of so many ids] of every point that it can
        go on from. Raises GenerationError after an interrupted step."""
        if at is not None:
            marked = self._marked(at)
            assert marked is not None, "a snapshot is of a mark"
            return self._snapshot_at(marked)
        if self._torn:
            raise GenerationError("the session's last step was interrupted; it cannot be saved before its next reply")
        # restore() marks the end itself.
        marks = [mark for mark in self._marks if mark.length < self.length]
        digests = prefix_digests(self.ids, [*(mark.length for mark in marks), self.length])
        tensors = {"ids": torch.tensor(self.ids, dtype=torch.int64)} | self.state.tensors()
        for number, mark in enumerate(marks):
            tensors |= {f"mark.{number}.{i}": tensor for i, tensor in enumerate(mark.fixed)}
        return self._snapshot(digests, tensors)

    def _snapshot_at(self, mark: Mark) -> Snapshot:
        ids = self.ids[: mark.length]
        tensors = {"ids": torch.tensor(ids, dtype=torch.int64)} | self.state.tensors(mark)
        return self._snapshot(prefix_digests(ids, [mark.length]), tensors)

    def _snapshot(self, digests: dict[int, str], tensors: dict[str, Tensor]) -> Snapshot:
        ends = [list(end) for end in digests.items()]
        here = {name: tensor.cpu() for name, tensor in tensors.items()}
        return Snapshot({"model": self._engine.fingerprint, "ends": ends}, here)

    def restore(self, file: BinaryIO) -> None:
        """Become a saved session. Raises CheckpointError if it is damaged or belongs to another model."""
        head = read_head(file)
        if head.facts.get("model") != self._engine.fingerprint:
            raise CheckpointError("the saved session belongs to another model, dtype or KV format; start a new one")
        state = self._engine.model.new_state()
        lengths = saved_ends(head)
        _compare(head, state, lengths)
        saved = read_tensors(file, head).tensors
        ids = saved.pop("ids").tolist()
        if any(not 0 <= token < self._engine.model.config.vocab_size for token in ids):
            raise _misfit("it holds tokens outside of the vocabulary")
        marks = []
        for number, length in enumerate(lengths[:-1]):
            names = [name for name in saved if name.startswith(f"mark.{number}.")]
            marks.append(Mark(length, tuple(saved.pop(f"mark.{number}.{i}") for i in range(len(names)))))
        state.load_tensors(saved, len(ids))
        self.state, self.ids, self._marks, self._torn = state, ids, marks, False
        self.mark()


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


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def saved_ends(head: Head) -> list[int]:
    """Lengths a saved session can go on from, ascending; the last is its own. Raises CheckpointError if malformed."""
    dtype, shape = head.tensors.get("ids", (None, ()))
    ends: Any = head.facts.get("ends")
    try:
        lengths = [length for length, _digest in ends]
        wrong = any(type(length) is not int for length in lengths) or lengths != sorted(set(lengths)) or lengths[0] < 0
    except (TypeError, ValueError, IndexError):
        wrong = True
    if wrong or dtype != torch.int64 or shape != (lengths[-1],) or len(lengths) > MAX_MARKS + 1:
        raise _misfit("its lengths are malformed")
    return lengths


def _compare(head: Head, state: SequenceState, lengths: list[int]) -> None:
    """Raises CheckpointError unless the head's tensors are those of this model after so many tokens."""
    expected = state.specs(lengths[-1])
    fixed = [spec for name, spec in expected.items() if name.startswith("fixed.")]
    expected |= {f"mark.{n}.{i}": spec for n in range(len(lengths) - 1) for i, spec in enumerate(fixed)}
    expected["ids"] = (torch.int64, (lengths[-1],))
    if head.tensors != expected:
        wrong = sorted(n for n in expected.keys() | head.tensors.keys() if expected.get(n) != head.tensors.get(n))
        raise _misfit(f"{len(wrong)} tensors differ, first {shown(wrong[0])}")


def _misfit(problem: str) -> CheckpointError:
    return CheckpointError(f"the saved session does not fit this model: {problem}; start a new one")


def fingerprint(model: Model) -> str:
    """Identifies config, dtype, KV format and the weights, by a few values of every layer and how they are packed."""
    digest = hashlib.sha256(f"{model.config} {model.dtype} {model.quantize_kv}".encode())
    for weight in (model.embed, model.norm, model.head, *(w for b in model.blocks for w in b.sample_weights())):
        kept = stored(weight)
        packed = kept if isinstance(kept, Tensor) else kept.data
        digest.update(f"{packed.dtype} {tuple(packed.shape)}".encode())
        digest.update(bytes(byte_view(packed.detach().flatten()[:1024].cpu().contiguous())))
    return digest.hexdigest()
