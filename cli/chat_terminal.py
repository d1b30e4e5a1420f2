"""The line editor of a chat in a terminal, by prompt_toolkit: history, several lines, pastes, completion, a status.

Imported only when it is used. What is typed, pasted or recalled is shown with its control characters made visible, and
is handed on as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import Processor, TabsProcessor, Transformation, TransformationInput
from prompt_toolkit.shortcuts import CompleteStyle

from localmoe.cli.chat_completion import CommandCompleter
from localmoe.cli.chat_history import open_history
from localmoe.cli.chat_input import CONTINUATION, FENCE, PROMPT, unfenced
from localmoe.cli.sanitize import REPLACEMENT, VISIBLE, sanitize_line

# One character each, so that the cursor stays where it is.
_SHOWN = {code: symbol if len(symbol) == 1 else REPLACEMENT for code, symbol in VISIBLE.items()}


class TerminalInput:
    """Enter sends, except inside a fence; Alt-Enter begins a line; Ctrl-X Ctrl-E opens $EDITOR."""

    can_edit = True

    def __init__(self, status: Callable[[int], str] | None, history: Path | None) -> None:
        """status: what stands under the input in so many columns, asked whenever it is drawn."""
        self._typed = ""
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUATION,
            history=open_history(history),
            completer=CommandCompleter(),
            complete_while_typing=False,
            # A menu would keep eight lines free below every prompt.
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
            input_processors=[_Visible(), TabsProcessor(char1=" ", char2=" ")],
            bottom_toolbar=None if status is None else lambda: sanitize_line(status(columns())),
            key_bindings=self._keys(),
        )

    def read(self, draft: str) -> str:
        return unfenced(self._session.prompt(default=draft))

    def typed_so_far(self) -> str:
        return self._typed

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if in_fence(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        @keys.add("<sigint>")
        def _(event: KeyPressEvent) -> None:
            self._typed = self._session.default_buffer.text
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

        return keys


def columns() -> int:
    """Of the terminal that the editor draws in."""
    return get_app().output.get_size().columns


def in_fence(text: str) -> bool:
    """Whether a fence was begun and not ended."""
    return text.startswith(FENCE) and not text.removeprefix(FENCE).rstrip(" \t").endswith(FENCE)


class _Visible(Processor):
    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        return Transformation(
            [(part[0], part[1].translate(_SHOWN)) for part in transformation_input.fragments],
        )
