"""Tab in a chat: names of /commands, what may stand after them, and files. Shows no name that could fool a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from localmoe.cli.chat_commands import BY_NAME
from localmoe.cli.sanitize import sanitize_line


class CommandCompleter(Completer):
    """Reads the table of commands; a message that is none gets nothing."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if not typed.startswith("/") or "\n" in document.text:
            return
        name, space, argument = typed.partition(" ")
        if not space:
            yield from _words(BY_NAME, name)
        elif name in BY_NAME:
            completes = BY_NAME[name].completes
            if completes == "files":
                found = self._files.get_completions(Document(argument.lstrip()), complete_event)
                yield from (each for each in found if sanitize_line(each.text) == each.text)
            else:
                yield from _words(completes, argument)


def _words(words: Iterable[str], begun: str) -> Iterable[Completion]:
    return (Completion(word, start_position=-len(begun)) for word in words if word.startswith(begun))
