"""Whether a saved state may go on with a conversation: the same model, and tokens that its text gives.

Knows one state file and one conversation; does not know folders. What is refused is refused with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localmoe.conversation import Conversation, Point
from localmoe.errors import CheckpointError, LocalMoeError
from localmoe.identity import difference
from localmoe.session import Session, common_prefix
from localmoe.snapshot import open_file, prefix_digests, read_head

if TYPE_CHECKING:
    from localmoe.api import LLM


def restored(path: Path, conversation: Conversation, points: Sequence[Point], llm: LLM) -> Session:
    """The session of a state file. Raises CheckpointError if it is not one that has read this conversation."""
    session = llm.session()
    with open_file(path) as file:
        reason = difference(read_head(file).facts, llm.identity())
        if reason is not None:
            raise CheckpointError(reason)
        session.restore(file)
    digest = prefix_digests(session.ids, [session.length])[session.length]
    point = next((p for p in reversed(points) if (p.tokens, p.digest) == (session.length, digest)), None)
    if point is None or not _has_read(session, conversation, point, llm):
        raise CheckpointError("its tokens are not those of this conversation")
    return session


def _has_read(session: Session, conversation: Conversation, point: Point, llm: LLM) -> bool:
    """Whether the session's tokens go as far along the last prompt, or the one before it, as they can."""
    messages = conversation.messages[: point.messages]
    # The last question may have been added without being read: the session is then at the end of the reply before.
    ends = [at for at, message in enumerate(messages, 1) if message["role"] in ("user", "tool")][-2:]
    try:
        for end in ends:
            prompt = llm.chat_ids(messages[:end], thinking=point.thinking, effort=point.effort)
            # The prompt's last token says whether to think, which may have been changed since.
            if common_prefix(session.ids, prompt) >= min(session.length, len(prompt) - 1):
                return True
    except LocalMoeError:
        return False
    return not ends
