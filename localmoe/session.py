"""One mutable timeline of tokens: what an engine has read, where it can go back to, and how that is saved.

Knows tokens; does not know text or sampling. Memory: the decode state and a bounded number of marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, GenerationError
from localmoe.files import shown
from localmoe.marks import MAX_MARKS, least_useful, most_marks
from localmoe.sequence import Mark, SequenceState
from localmoe.snapshot import Head, Snapshot, prefix_digests, read_head, read_tensors

if TYPE_CHECKING:
    from localmoe.engine import Engine


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
