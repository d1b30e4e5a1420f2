"""What a chat has read once and other chats need not read again: long system texts and documents, kept as states.

Owns when it is worth looking for one and keeping one; does not know how states lie on the disk. Best effort: what goes
wrong is said once, and texts are read. Only what stands before a question is kept, never the question or a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli import render
from localmoe.errors import LocalMoeError
from localmoe.files import sized

if TYPE_CHECKING:
    from localmoe.cli.chat import Chat

KeepPrefixesOption = Annotated[
    bool | None,
    typer.Option(
        "--keep-prefixes/--no-keep-prefixes",
        help="Keep the model's state after long system texts and documents on disk, readable only by you, so that "
        "other chats need not read them. [default: as --history]",
        show_default=False,
    ),
]
# Tokens to be read: for fewer, looking through the saved states takes about as long as reading them.
WORTH_KEEPING = 256


class Prefixes:
    """on: whether anything is looked for and kept."""

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._ids: Sequence[int] = ()
        self._kept = 0

    def find(self, chat: Chat, ids: Sequence[int]) -> None:
        """Before a reply: give the chat a session that has read more of its prompt than its own, if one is saved.

        ids: of the prompt."""
        self._ids = ids if self._on else ()
        if len(self._ids) < WORTH_KEEPING:
            return
        self._kept = chat.session.kept(self._ids)
        if len(self._ids) - self._kept < WORTH_KEEPING:
            return
        try:
            found = chat.saved.store.find_prefix(self._ids, chat.llm, at_least=self._kept + WORTH_KEEPING)
        except LocalMoeError as problem:
            self._give_up(chat, problem)
            return
        if found is not None:
            chat.session, self._kept = found

    def keep(self, chat: Chat, messages: Sequence[dict[str, Any]]) -> None:
        """After a reply: keep what had to be read before the question, if it is long and not talk."""
        if not self._on or len(self._ids) < WORTH_KEEPING or len(messages) < 2 or messages[-2]["role"] == "assistant":
            return
        # The last mark before the prompt's own, which is a token before its end.
        at = max((mark for mark in chat.session.marks if mark < len(self._ids) - 1), default=0)
        if at - self._kept < WORTH_KEEPING:
            return
        try:
            with render.Waiting(chat.console, "keeping what was read", quiet=chat.quiet):
                chat.saved.store.save_prefix(chat.session, chat.llm, at=at)
        except LocalMoeError as problem:
            self._give_up(chat, problem)
            return
        if not chat.quiet:
            state = chat.session.state
            nbytes = sized(round(state.fixed_nbytes + at * state.nbytes_per_token))
            chat.say(f"what was read before the question, {at:,} tokens, is kept for other chats ({nbytes} on disk)")

    def _give_up(self, chat: Chat, problem: LocalMoeError) -> None:
        self._on = False
        chat.say(f"texts that were read are not kept for other chats: {problem}")
