"""The saved session of a chat: kept turn by turn, and gone on with in another chat without reading it again.

Owns which session a chat belongs to; does not know how sessions lie on the disk."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmoe.errors import LocalMoeError, UsageError
from localmoe.files import shown, sized

if TYPE_CHECKING:
    from localmoe.cli.chat import Chat
    from localmoe.conversation import Conversation
    from localmoe.sampler import SamplingParams
    from localmoe.sessions import SessionStore


class ChatSession:
    """name: of the session that every turn is saved to; None while the chat is nobody's but the screen's."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._conversation: Conversation | None = None
        self._store: SessionStore | None = None

    @property
    def store(self) -> SessionStore:
        """Of this user. Raises ResourceError if its folder cannot be made."""
        if self._store is None:
            from localmoe.sessions import SessionStore

            self._store = SessionStore(_folder())
        return self._store

    def save(self, chat: Chat, name: str) -> None:
        """Save the chat under a name, with its state; later turns follow. Raises UsageError if the name is taken."""
        conversation = self._taken_from(chat) if name == self.name else self._new(chat)
        self.store.save_state(name, conversation, chat.llm)
        self.name, self._conversation = name, conversation

    def open(self, chat: Chat, name: str) -> None:
        """Go on with a session, or begin one of that name. Raises CheckpointError for one that is damaged."""
        found = self.store.find(name, chat.llm)
        if found is not None:
            self._take_over(chat, name, found)
        else:
            self.name, self._conversation = name, self._new(chat)
            chat.say(f"a new session, saved as {shown(name)}")

    def load(self, chat: Chat, name: str) -> None:
        """Take over a saved session. Raises UsageError if there is none, CheckpointError for one that is damaged."""
        self._take_over(chat, name, self.store.load(name, chat.llm))

    def _take_over(self, chat: Chat, name: str, found: Conversation) -> None:
        params = found.sampling()
        given = chat.system, chat.thinking, chat.effort, chat.params
        if given != (found.system, found.thinking, found.effort, params):
            chat.say("system text, thinking and sampling are those of the session; /system, /think, /set change them")
        self.name, self._conversation = name, found
        chat.system, chat.thinking, chat.effort, chat.params = found.system, found.thinking, found.effort, params
        if found.session is not None:
            chat.session = found.session
        chat.change(list(found.messages))
        for notice in found.notices:
            chat.say(notice)
        kept = 0 if found.session is None else found.session.length
        chat.say(f"{shown(name)}: {len(found.messages)} messages, {kept:,} tokens need not be read again")

    def after_turn(self, chat: Chat) -> None:
        """Append what is new to the transcript. What goes wrong is said, and the chat goes on."""
        self._quietly(chat, whole=False)

    def leave(self, chat: Chat) -> None:
        """Save what is new, and the state."""
        self._quietly(chat, whole=True)

    def forget(self) -> None:
        """What follows is another conversation, which no session has."""
        self.name = self._conversation = None

    def lines(self) -> list[str]:
        """Every saved session on a line."""
        found = []
        for saved in self.store.list():
            what = saved.problem or f"{saved.title!r}, {saved.messages} messages"
            state = f", state {sized(saved.state_nbytes)}" if saved.state_nbytes else ""
            found.append(f"{'*' if saved.name == self.name else ' '} {shown(saved.name)}: {what}{state}")
        return found or ["there are no saved sessions; /save NAME makes one"]

    def _quietly(self, chat: Chat, *, whole: bool) -> None:
        if self.name is None:
            return
        try:
            conversation = self._taken_from(chat)
            if not conversation.messages:
                return
            if whole:
                self.store.save_state(self.name, conversation, chat.llm)
            else:
                self.store.save(self.name, conversation)
        except LocalMoeError as problem:
            chat.say(f"not saved: {problem}")

    def _taken_from(self, chat: Chat) -> Conversation:
        """The session's conversation as the chat has it now."""
        if self._conversation is None:
            return self._new(chat)
        self._conversation.messages = list(chat.messages)
        self._conversation.thinking, self._conversation.effort = chat.thinking, chat.effort
        self._conversation.params, self._conversation.session = _facts(chat.params), chat.session
        return self._conversation

    @staticmethod
    def _new(chat: Chat) -> Conversation:
        from localmoe.conversation import Conversation

        return Conversation(list(chat.messages), chat.thinking, chat.effort, _facts(chat.params), session=chat.session)


def _facts(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not what they are by default."""
    usual = type(params)()
    return {
        f.name: getattr(params, f.name) for f in fields(params) if getattr(params, f.name) != getattr(usual, f.name)
    }


def _folder() -> Path:
    from platformdirs import user_state_path

    return user_state_path("localmoe", appauthor=False) / "sessions"


def named(chat: Chat, argument: str) -> str:
    """The name that a command was given, or the session's own. Raises UsageError if there is neither."""
    name = argument or chat.saved.name
    if name is None:
        raise UsageError("expected /save NAME: this chat has no session yet")
    return name
