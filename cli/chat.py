"""`localmoe chat`: a conversation that keeps going. Ctrl-C stops a reply, not the chat.

Owns the turns and the /commands; does not know how replies are made. Model text is shown by render only."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Self

from localmoe.cli import options, render
from localmoe.cli.meter import reading
from localmoe.cli.options import SamplingFlags
from localmoe.errors import GenerationError, ReadError, ResourceError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from localmoe.api import LLM
    from localmoe.events import Completion
    from localmoe.sampler import SamplingParams

PROMPT, CONTINUATION, FENCE = ">>> ", "... ", '"""'
# A second Ctrl-C within this time leaves the chat.
LEAVE_SECONDS = 1.0
HELP = '''/help or /?     this list
/clear          forget the conversation; the system text stays
/exit or /bye   leave (also Ctrl-D)
"""             begins and ends a message of several lines
//text          sends /text
Ctrl-C          stops a reply; twice within a second leaves'''
EMPTY_LINE_HINT = "Ctrl-C stops a reply; Ctrl-D or /exit leaves"


def chat(
    *,
    model: options.ModelOption = None,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = None,
    think: options.ThinkOption = "off",
    effort: options.EffortOption = None,
    seed: options.SeedOption = None,
    temp: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    stop: options.StopOption = None,
    quiet: options.QuietOption = False,
    dtype: options.DtypeOption = "auto",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    ctx: options.ContextOption = None,
    ram: options.RamOption = None,
    expert_slots: options.SlotsOption = None,
    policy: options.PolicyOption = "best",
    pack: options.PackOption = None,
    trace_routing: options.TraceOption = None,
    warm_start: options.WarmOption = None,
) -> None:
    """Load the model and talk until the user leaves."""
    flags = SamplingFlags(max_tokens=max_tokens, seed=seed, temperature=temp, top_p=top_p, top_k=top_k, min_p=min_p,
                          repetition_penalty=repetition_penalty, stop=stop)  # fmt: skip
    options.check_effort(think, effort)
    compute = options.ComputeFlags(dtype=dtype, kernels=kernels, threads=threads, context=ctx)
    paging = options.PagingFlags(
        ram=ram, slots=expert_slots, policy=policy, trace=trace_routing, warm=warm_start, pack=pack
    )
    llm, params = options.open_model(model, flags, compute, paging, quiet=quiet)
    try:
        Chat(llm, params, system=system, thinking=think, effort=effort, quiet=quiet).run()
    finally:
        llm.close()


class Interrupts:
    """What Ctrl-C means while a chat runs: it ends the reading of a line, or is remembered for whoever asks `stopped`.

    Installed for the whole chat, so that one that comes between two turns does not end it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = -math.inf
        self._reading = False
        self.stopped = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While this holds, Ctrl-C raises KeyboardInterrupt."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def _handle(self, _signum: int, _frame: FrameType | None) -> None:
        if self._reading:
            raise KeyboardInterrupt
        self.stopped = True
        self.note()

    def note(self) -> None:
        """Count one Ctrl-C. Raises KeyboardInterrupt if it is the second in quick succession."""
        previous, self._last = self._last, self._clock()
        if self._last - previous < LEAVE_SECONDS:
            raise KeyboardInterrupt


@dataclass
class Chat:
    """One conversation: messages so far, and the engine session that has already read them."""

    llm: LLM
    params: SamplingParams
    system: str | None = field(kw_only=True)
    thinking: options.Thinking = field(kw_only=True)
    effort: options.Effort | None = field(kw_only=True)
    quiet: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        self.console: Console = render.open_console()
        self.interrupts = Interrupts()
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system text."""
        self.messages: list[dict[str, Any]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.session = self.llm.session()

    def say(self, text: str) -> None:
        for line in text.split("\n"):
            render.say(self.console, line)

    def run(self) -> None:
        """Read and answer until the user leaves. Raises KeyboardInterrupt for Ctrl-C twice."""
        enable_line_editing()
        if not self.quiet:
            self.say(f"{self.llm.name}, context {self.llm.context:,} tokens; /help for help, Ctrl-D to leave")
        with self.interrupts:
            while (message := self.read()) is not None and self.obey(message) == "stay":
                pass

    def read(self) -> str | None:
        """The next message, empty if Ctrl-C dropped it; None at the end of input."""
        try:
            with self.interrupts.reading():
                message = read_message()
            message.encode()
            return message
        except EOFError:
            if sys.stdin.isatty():
                sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            self.interrupted_line()
        except UnicodeError:
            self.say("that was not UTF-8 text; it is dropped")
        return ""

    def interrupted_line(self) -> None:
        """Ctrl-C at the prompt drops what was typed; on an empty line it says how to leave, and twice leaves."""
        sys.stderr.write("\n")
        if not typed_so_far():
            self.interrupts.note()
            self.say(EMPTY_LINE_HINT)

    def obey(self, message: str) -> Literal["leave", "stay"]:
        """Carry out a /command or answer a message. Several lines are always a message, whatever they begin with."""
        text = message.strip()
        command = text if text.startswith("/") and "\n" not in text else ""
        if command in ("/exit", "/bye"):
            return "leave"
        if command in ("/help", "/?"):
            self.say(HELP)
        elif command == "/clear":
            self.clear()
            self.say("the conversation is forgotten")
        elif command.startswith("//"):
            self.turn(command[1:])
        elif command:
            self.say(f"{command.split()[0]} is not a command here; /help lists them, /{command} sends it as text")
        elif text:
            self.turn(message)
        return "stay"

    def turn(self, text: str) -> None:
        """Answer one message. One that cannot be answered is dropped, and the conversation goes on without it."""
        self.messages.append({"role": "user", "content": text})
        self.interrupts.stopped = False
        try:
            completion = self.reply()
        except (GenerationError, ReadError, ResourceError, UsageError) as error:
            self.messages.pop()
            self.say(f"not answered: {error}")
            return
        if completion.finish_reason == "error":
            self.messages.pop()
            self.say(f"not answered: {completion.error}")
        elif not completion.token_ids:
            self.messages.pop()
            self.say("nothing was said; the message is dropped")
        else:
            self.messages.append(completion.message)

    def reply(self) -> Completion:
        """Generate and show the reply to the messages so far."""
        before = self.llm.pager
        with (
            render.Waiting(self.console, "reading the prompt", quiet=self.quiet) as waiting,
            render.ReplyWriter(self.console, quiet=self.quiet) as writer,
        ):
            events = self.llm.stream_chat(
                self.messages, self.params, thinking=self.thinking, effort=self.effort,
                session=self.session, cancelled=lambda: self.interrupts.stopped,
            )  # fmt: skip
            completion = render.follow(events, waiting, writer)
        if not self.quiet:
            self.say(render.timings(completion, reading(self.llm, completion, before)))
        return completion


def enable_line_editing() -> None:
    """Where readline exists: history, editing keys, and a paste of several lines as one message."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind("tab: self-insert")


def typed_so_far() -> str:
    """What the interrupted line held; empty where readline is missing."""
    with contextlib.suppress(ImportError):
        import readline

        return readline.get_line_buffer()
    return ""


def read_message() -> str:
    """One message: a line, or several between two \"\"\". Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
    line = read_line(PROMPT)
    if not line.startswith(FENCE):
        return line
    lines = [line.removeprefix(FENCE)]
    while not lines[-1].endswith(FENCE):
        lines.append(read_line(CONTINUATION))
    return "\n".join([*lines[:-1], lines[-1].removesuffix(FENCE)]).strip("\n")


def read_line(prompt: str) -> str:
    """A line of standard input; the prompt is shown only to a person, and never goes into a redirected stdout."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    if sys.stdin.isatty():
        sys.stderr.write(prompt)
        sys.stderr.flush()
    return input()
