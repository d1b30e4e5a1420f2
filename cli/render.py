"""What a person sees: replies, waiting lines, timings, notices and the one red error line. Owns all rich objects.

Knows streams and events; does not know commands. Everything from outside passes through sanitize on its way."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, Self

from rich.console import Console
from rich.text import Text

from localmoe.cli.sanitize import sanitize, sanitize_line
from localmoe.cli.terminal_state import columns

if TYPE_CHECKING:
    from localmoe.cli.markdown import Markdown
    from localmoe.events import Completion, Event, Progress, TextKind
    from localmoe.events import Text as TextEvent
    from localmoe.meter import Reading

# A wait shorter than this is not worth a line on the screen.
DELAY_SECONDS = 1.0


def open_console() -> Console:
    """The console of stderr. stdout is never a rich console: it carries the answer and nothing else."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(console: Console, message: str, *, kind: Literal["error", "warning", "notice"] = "notice") -> None:
    """One line on stderr: a red error, a yellow warning, or a dim notice."""
    line = sanitize_line(message)
    if kind == "notice":
        text = Text(line, style="dim")
    else:
        color = {"error": "bold red", "warning": "yellow"}[kind]
        text = Text.assemble((f"localmoe: {kind}:", color), f" {line}")
    # Between words in a terminal, which would cut them anywhere; not at all in a pipe.
    console.print(text, soft_wrap=not console.is_terminal)


class Waiting:
    """A line that says what is being waited for: shown after a second, on a terminal only, erased at the end."""

    def __init__(self, console: Console, text: str, *, quiet: bool = False) -> None:
        self._status = console.status(Text(sanitize_line(text)))
        self._lock = threading.Lock()
        self._over = quiet or not console.is_interactive
        self._timer = threading.Timer(DELAY_SECONDS, self._begin)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if not self._over:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _begin(self) -> None:
        with self._lock:
            if not self._over:
                self._status.start()

    def update(self, text: str) -> None:
        """Change the line; it need not be on the screen yet."""
        self._status.update(Text(sanitize_line(text)))

    def end(self) -> None:
        """Erase the line, or never show it. May be called twice."""
        self._timer.cancel()
        with self._lock:
            self._over = True
            self._status.stop()


class ReplyWriter:
    """Writes a reply piece by piece: the answer to stdout, the reasoning dimmed to stderr, each ended by a newline.

    markdown: whether the answer is shown as such where stdout is a terminal; anywhere else its bytes stay exact. fold:
    whether reasoning is only counted, and the count shown when it is over."""

    def __init__(self, console: Console, *, quiet: bool = False, markdown: bool = False, fold: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._layout = stdout_layout() if markdown else "exact"
        self._page: Markdown | None = None
        self._fold = fold
        self._folded: Folded | None = None
        self._kind: TextKind | None = None
        self._at_line_start = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_line()

    def show(self, event: TextEvent, waiting: Waiting) -> None:
        """Show one event of a reply; the line that says what is waited for goes when something else can be seen."""
        if event.kind == "reasoning" and self._fold and not self._quiet:
            self._folded = self._folded or Folded()
            waiting.update(self._folded.add(len(event.samples)))
            return
        waiting.end()
        self.write(event.kind, event.text)

    def write(self, kind: TextKind, text: str) -> None:
        """Show one piece; a change of kind starts a new line."""
        if not text or (kind == "reasoning" and self._quiet):
            return
        if kind != self._kind:
            self.end_line()
            self._kind = kind
        # Set first: Ctrl-C may come between the two.
        self._at_line_start = text.endswith("\n")
        self._put(sanitize(text))

    def end_line(self) -> None:
        """Finish the line that the last piece left open, and say what was folded."""
        page, self._page = self._page, None
        if page is not None:
            self._out(page.close())
        elif not self._at_line_start:
            self._put("\n")
        self._at_line_start = True
        folded, self._folded = self._folded, None
        if folded is not None:
            say(self._console, folded.line())

    def _put(self, shown: str) -> None:
        if self._kind == "reasoning":
            self._console.out(shown, style="dim", end="", highlight=False)
        elif self._kind == "answer" and self._layout != "exact":
            self._out(self._open_page().write(shown, columns(sys.stdout)))
        else:
            self._out(shown)

    def _open_page(self) -> Markdown:
        if self._page is None:
            from localmoe.cli.markdown import Markdown

            self._page = Markdown(colors=self._layout == "colors")
        return self._page

    def _out(self, shown: str) -> None:
        # Not rich: it wraps at 80 columns in a pipe. Flushed, so that text moves at the speed of the model.
        sys.stdout.write(shown)
        sys.stdout.flush()


def stdout_layout() -> Literal["exact", "no colors", "colors"]:
    """What stdout can show. Only a terminal that can move its cursor gets more than the exact bytes."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return "exact"
    return "no colors" if os.environ.get("NO_COLOR") else "colors"


class Folded:
    """Reasoning that is not shown: how long it took, and how many tokens it was."""

    def __init__(self) -> None:
        self._since, self._tokens = time.monotonic(), 0

    def add(self, tokens: int) -> str:
        """Count tokens; returns what is waited for."""
        self._tokens += tokens
        return f"thinking: {self._tokens:,} tokens"

    def line(self) -> str:
        return f"thought for {time.monotonic() - self._since:.1f} s, {self._tokens:,} tokens; /fold show shows it"


def follow(
    events: Iterator[Event],
    waiting: Waiting,
    writer: ReplyWriter | None,
    watch: Callable[[TextKind, str], None] | None = None,
) -> Completion:
    """Show a reply as it comes and return it whole; without a writer, show only that one waits.

    watch: told every piece."""
    from localmoe.events import Finished, Progress

    first: tuple[float, Progress] | None = None
    for event in events:
        if isinstance(event, Finished):
            return event.completion
        if isinstance(event, Progress):
            now = time.monotonic()
            first = first or (now, event)
            waiting.update(progress_text(event, event.done - first[1].done, now - first[0]))
        elif writer is not None:
            writer.show(event, waiting)
            if watch is not None:
                watch(event.kind, event.text)
    raise AssertionError("a stream of events ends with Finished")


def progress_text(progress: Progress, done: int, seconds: float) -> str:
    """For example `reading the prompt: 12,288 of 100,000 tokens, 1m20s left`: at the speed of `done` tokens in
    `seconds`, which says nothing before the second chunk."""
    text = f"reading the prompt: {progress.done:,} of {progress.total:,} tokens"
    left = progress.total - progress.done
    return f"{text}, {time_text(left * seconds / done)} left" if done and left else text


def time_text(seconds: float) -> str:
    """For example 7s, 1m20s or 2h05m."""
    minutes, rest = divmod(max(round(seconds), 1), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def timings(completion: Completion, reading: Reading | None = None) -> str:
    """Tokens and rates of one reply on a line, for example `prompt 12 tok 340 tok/s | gen 256 tok 4.31 tok/s | ...`.

    reading: the limit meter of a paged model."""
    stats = completion.stats
    reused = f" ({stats.reused_tokens:,} reused)" if stats.reused_tokens else ""
    parts = [
        f"prompt {stats.prompt_tokens:,} tok{reused}{rate_text(stats.prefill_tokens_per_s)}",
        f"gen {stats.generated_tokens:,} tok{rate_text(stats.decode_tokens_per_s)}",
        f"ttft {stats.first_token_seconds:.2f} s",
    ]
    if completion.finish_reason != "stop":
        parts.append({"length": "cut at the length limit"}.get(completion.finish_reason, completion.finish_reason))
    if reading is not None:
        from localmoe.meter import verdict

        parts.append(verdict(reading))
    return " | ".join(parts)


def rate_text(tokens_per_s: float) -> str:
    """Nothing where there was nothing to time, such as the decoding of a one-token reply."""
    if tokens_per_s == 0:
        return ""
    digits = 0 if tokens_per_s >= 100 else 1 if tokens_per_s >= 10 else 2
    return f" {tokens_per_s:,.{digits}f} tok/s"
