"""What prompts of a batch begin with in common is read once: the next one goes on from a copy of what was read.

Knows the last few requests; does not know what their prompts say. Memory: their sessions, also of those that are done.
A copy costs the bytes of the common part, where reading it again would cost its computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from localmoe.engine import Engine
from localmoe.reply_request import WORTH_A_STEP, ReplyRequest
from localmoe.session import Session, common_prefix

# Prompts that take turns with so many beginnings still find theirs.
_RECENT = 4

# Makes a request that begins in this session and marks it at these lengths of its prompt; none: where it likes.
Make = Callable[[Session, Sequence[int]], ReplyRequest]


class SharedPrefixes:
    """Gives each request of one engine a session that has read as much of its prompt as a recent one's has."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._recent: deque[ReplyRequest] = deque(maxlen=_RECENT)

    def start(self, ids: Sequence[int], make: Make) -> ReplyRequest | None:
        """The request, or None: ask again after a step, a running request is about to read what they share."""
        request = self._begin(ids, make)
        if request is not None:
            self._recent.append(request)
        return request

    def _begin(self, ids: Sequence[int], make: Make) -> ReplyRequest | None:
        shared, donor = 0, None
        for recent in reversed(self._recent):
            common = min(common_prefix(recent.prompt, ids), len(ids) - 1)
            if common > shared:
                shared, donor = common, recent
        if donor is None or shared < WORTH_A_STEP:
            return make(self._engine.new_session(), ())
        kept = donor.session.kept(ids)
        if shared - kept >= WORTH_A_STEP and donor.mark_at(shared):
            return None
        session = donor.session.fork(kept) if kept >= WORTH_A_STEP else self._engine.new_session()
        # Where it could not be had from the other, the next one gets it from here.
        return make(session, (shared, len(ids)) if shared - kept >= WORTH_A_STEP else ())
