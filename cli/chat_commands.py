"""The /commands of a chat: one table for help, completion and dispatch.

A command gets the chat and the rest of its line; what it raises as UsageError is said and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from localmoe.cli import chat_files, chat_inspect, chat_set
from localmoe.cli.chat_sessions import named
from localmoe.errors import CheckpointError, GenerationError, ResourceError, UsageError
from localmoe.files import shown

if TYPE_CHECKING:
    from localmoe.cli.chat import Chat

Next = Literal["leave"] | None
FOLD = ("on", "off", "show")
# In the order of their amount; "on" lets the model's encoder choose.
THINKING = ("off", "on", "low", "high", "max")


@dataclass(frozen=True)
class Command:
    """names: the first is the usual one. arguments: as /help shows them, empty if there are none.

    completes: what may stand after it, or that files may."""

    names: tuple[str, ...]
    arguments: str
    help: str
    run: Callable[[Chat, str], Next]
    completes: tuple[str, ...] | Literal["files"] = ()


def retry(chat: Chat, _: str) -> Next:
    if not any(message["role"] == "user" for message in chat.messages):
        raise UsageError("there is nothing to answer yet")
    kept = list(chat.messages)
    while kept[-1]["role"] != "user":
        kept.pop()
    if len(kept) < len(chat.messages) and (chat.params.seed is not None or chat.params.temperature == 0):
        chat.say("a seed or temperature 0 gives the same reply; /set seed none or /set temp 1 changes that")
    chat.answer(kept)
    return None


def undo(chat: Chat, _: str) -> Next:
    kept, text = chat.before_last_message()
    chat.change(kept)
    chat.say(f"taken back: {shown(text, 60)}")
    return None


def edit(chat: Chat, _: str) -> Next:
    kept, text = chat.before_last_message()
    if not chat.input.can_edit:
        raise UsageError("/edit needs a terminal; /undo takes the last turn back")
    chat.draft, chat.before_draft = text, kept
    return None


def rewind(chat: Chat, turns: str) -> Next:
    questions = chat.questions()
    if not turns:
        for back, at in reversed([*enumerate(questions, 1)]):
            chat.say(f"{back:>4}  {shown(chat.messages[at]['content'], 60)}")
        chat.say("/rewind N goes back to before message N")
        return None
    if not turns.isdecimal() or not 0 < int(turns) <= len(questions):
        raise UsageError(f"/rewind {shown(turns)}: expected a number from 1 to {len(questions)}; /rewind lists them")
    at = questions[int(turns) - 1]
    text = chat.messages[at]["content"]
    chat.change(chat.messages[:at])
    chat.say(f"taken back, {turns} message{'s' * (turns != '1')} and the replies: {shown(text, 60)}")
    return None


def think(chat: Chat, level: str) -> Next:
    if level:
        if level not in THINKING:
            raise UsageError(f"/think {shown(level)} is not known, expected one of {', '.join(THINKING)}")
        chat.thinking = "off" if level == "off" else "on"
        chat.effort = level if level in ("low", "high", "max") else None  # type: ignore[assignment]
    chat.say(f"thinking is {chat.thinking}{f', effort {chat.effort}' if chat.effort else ''}")
    return None


def fold(chat: Chat, how: str) -> Next:
    if how == "show":
        chat.show_thinking()
        return None
    if how:
        if how not in FOLD:
            raise UsageError(f"/fold {shown(how)} is not known, expected one of {', '.join(FOLD)}")
        chat.fold = how == "on"
    chat.say(f"thinking is {'only counted; /fold show shows it' if chat.fold else 'shown as it comes'}")
    return None


def system(chat: Chat, text: str) -> Next:
    if text:
        chat.set_system(None if text == '""' else text)
    chat.say("there is no system text" if chat.system is None else f"system text: {chat.system}")
    return None


def set_parameter(chat: Chat, line: str) -> Next:
    name, _, value = line.partition(" ")
    if value:
        chat.params = chat_set.changed(chat.params, chat.llm.default_params(), name, value.strip())
    for shown_line in chat_set.lines(chat.params, name):
        chat.say(shown_line)
    return None


def read(chat: Chat, file: str) -> Next:
    path = _path(file)
    text = chat_files.read_text(path)
    kept = [*chat.messages, {"role": "user", "content": text}]
    used = chat.count(kept)
    if used >= chat.llm.context:
        raise UsageError(
            f"with {shown(path)} the conversation would have {used:,} tokens, the context holds {chat.llm.context:,}"
        )
    length = len(chat.llm.tokenizer.encode(text))
    chat.say(f"{shown(path)}: {length:,} tokens, read before what you say next; /retry has it answered alone")
    chat.change(kept)
    return None


def copy(chat: Chat, file: str) -> Next:
    replies = [message for message in chat.messages if message["role"] == "assistant"]
    if not replies:
        raise UsageError("there is no reply to copy yet")
    text = str(replies[-1].get("content") or "")
    if file:
        chat.files.write(_path(file), text)
        chat.say(f"written: {shown(file)}")
    else:
        chat_files.to_clipboard(text)
        chat.say(f"{len(text):,} characters sent to the terminal's clipboard; if it took none, /copy FILE")
    return None


def save(chat: Chat, name: str) -> Next:
    name = named(chat, name)
    chat.saved.save(chat, name)
    chat.say(f"saved as {shown(name)}; later turns are saved too")
    return None


def load(chat: Chat, name: str) -> Next:
    chat.saved.load(chat, name)
    return None


def sessions(chat: Chat, _: str) -> Next:
    for line in chat.saved.lines():
        chat.say(line)
    return None


def stats(chat: Chat, _: str) -> Next:
    for line in chat.totals.lines():
        chat.say(line)
    return None


def tokens(chat: Chat, text: str) -> Next:
    if text:
        chat.say(f"{len(chat.llm.tokenizer.encode(text)):,} tokens")
    used = chat.count(chat.messages)
    chat.say(f"context: {used:,} of {chat.llm.context:,} tokens")
    return None


def export(chat: Chat, file: str) -> Next:
    path = _path(file)
    render = chat_files.as_json if path.suffix == ".json" else chat_files.as_markdown
    chat.files.write(path, render(chat.llm.name, chat.messages))
    chat.say(f"{len(chat.messages)} messages written: {shown(path)}")
    return None


def clear(chat: Chat, _: str) -> Next:
    chat.clear()
    chat.say("the conversation is forgotten")
    return None


def show_help(chat: Chat, _: str) -> Next:
    chat.say(help_text())
    return None


def leave(_chat: Chat, _: str) -> Next:
    return "leave"


COMMANDS = (
    Command(("/help", "/?"), "", "this list", show_help),
    Command(("/retry",), "", "sample the last reply again", retry),
    Command(("/undo",), "", "take back the last message and its reply", undo),
    Command(("/rewind",), "[N]", "list your messages, or go back to before the last N", rewind),
    Command(("/edit",), "", "change the last message and send it again", edit),
    Command(("/think",), "[off|on|low|high|max]", "how much to reason before the answer", think, THINKING),
    Command(("/fold",), "[on|off|show]", "only count the reasoning, or show that of the last reply", fold, FOLD),
    Command(("/system",), "[TEXT]", 'show or change the system text; "" removes it', system),
    Command(("/set",), "[NAME VALUE]", "show or change sampling; VALUE may be default", set_parameter, chat_set.NAMES),
    Command(("/read",), "FILE", "put a file's text before your next message", read, "files"),
    Command(("/copy",), "[FILE]", "the last reply to the clipboard, or to a file", copy, "files"),
    Command(("/export",), "FILE", "the conversation as markdown, or as JSON to a .json", export, "files"),
    Command(("/save",), "[NAME]", "keep this chat and its state, turn by turn", save),
    Command(("/load",), "NAME", "go on with a saved session", load),
    Command(("/sessions",), "", "what is saved", sessions),
    Command(("/stats",), "", "tokens, speeds and memory of this chat", stats),
    Command(("/plan",), "", "where the model's bytes are and how fast it can be here", chat_inspect.plan),
    Command(("/cache",), "", "what the conversation holds in memory, and expert hits", chat_inspect.cache),
    Command(
        ("/probs",),
        "[on|off|N]",
        "what else the last reply's least certain tokens could be",
        chat_inspect.probs,
        ("on", "off"),
    ),
    Command(("/tokens",), "[TEXT]", "how long the conversation is, or a text", tokens),
    Command(("/clear",), "", "forget the conversation; the system text stays", clear),
    Command(("/exit", "/bye"), "", "leave (also Ctrl-D)", leave),
)
BY_NAME = {name: command for command in COMMANDS for name in command.names}
KEYS = (
    ('"""', "begins and ends a message of several lines"),
    ("//text", "sends /text"),
    ("Ctrl-C", "stops a reply; twice within a second leaves"),
)


def help_text() -> str:
    """The table, and what else can be typed."""
    rows = [(f"{' or '.join(each.names)} {each.arguments}".rstrip(), each.help) for each in COMMANDS]
    rows += KEYS
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"{left:{width}}  {right}" for left, right in rows)


def obey(chat: Chat, line: str) -> Next:
    """Carry out a line that begins with one slash."""
    name, *rest = line.split(maxsplit=1)
    argument = "".join(rest)
    command = BY_NAME.get(name)
    try:
        if command is None:
            raise UsageError(f"{name} is not a command here; /help lists them, /{line} sends it as text")
        if argument and not command.arguments:
            raise UsageError(f"{name} takes nothing after it; /{line} sends it as text")
        if not argument and command.arguments and not command.arguments.startswith("["):
            raise UsageError(f"expected {name} {command.arguments}")
        return command.run(chat, argument)
    except (UsageError, CheckpointError, ResourceError, GenerationError) as problem:
        chat.say(str(problem))
        return None


def _path(file: str) -> Path:
    """A path as typed, ~ included. Raises UsageError for a home that is unknown."""
    try:
        return Path(file).expanduser()
    except RuntimeError:
        raise UsageError(f"{shown(file)}: there is no such home folder") from None
