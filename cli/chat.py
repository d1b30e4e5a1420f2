"""`localmoe chat`: a conversation that keeps going. Ctrl-C stops a reply, not the chat.

Owns the turns and the /commands; does not know how replies are made. Model text is shown by render only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from localmoe.cli import chat_commands, chat_inspect, options, render
from localmoe.cli.chat_files import OwnFiles
from localmoe.cli.chat_input import open_input
from localmoe.cli.chat_interrupts import Interrupts
from localmoe.cli.chat_loops import LoopGuard
from localmoe.cli.chat_prefixes import KeepPrefixesOption, Prefixes
from localmoe.cli.chat_sessions import ChatSession
from localmoe.cli.chat_totals import Totals
from localmoe.cli.endings import finishing
from localmoe.cli.meter import reading
from localmoe.cli.options import SamplingFlags
from localmoe.errors import GenerationError, ReadError, ResourceError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from localmoe.api import LLM
    from localmoe.events import Completion
    from localmoe.prepared import Prepared
    from localmoe.sampler import SamplingParams

LoopGuardOption = Annotated[
    bool, typer.Option("--loop-guard/--no-loop-guard", help="Stop a reply that repeats itself over and over.")
]
HistoryOption = Annotated[
    bool, typer.Option("--history/--no-history", help="Keep what is typed for later chats, readable only by you.")
]
SessionOption = Annotated[
    str | None, typer.Option("--session", metavar="NAME", help="Go on with a saved session, or begin one.")
]
PlainOption = Annotated[
    bool, typer.Option("--plain", help="Show answers as they are written, not as the markdown that they mean.")
]
FoldOption = Annotated[
    bool, typer.Option("--fold-thinking", help="Count the reasoning instead of showing it; /fold in the chat.")
]
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
    plain: PlainOption = False,
    fold_thinking: FoldOption = False,
    loop_guard: LoopGuardOption = True,
    history: HistoryOption = True,
    keep_prefixes: KeepPrefixesOption = None,
    session: SessionOption = None,
    dtype: options.DtypeOption = "auto",
    kernels: options.KernelsOption = "auto",
    threads: options.ThreadsOption = None,
    ctx: options.ContextOption = None,
    device: options.DeviceOption = "cpu",
    vram: options.VramOption = None,
    graphs: options.GraphsOption = None,
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
    compute = options.ComputeFlags(dtype=dtype, kernels=kernels, threads=threads, context=ctx, device=device,
                                   vram=options.parse_vram(vram), graphs=graphs)  # fmt: skip
    paging = options.PagingFlags(
        ram=ram, slots=expert_slots, policy=policy, trace=trace_routing, warm=warm_start, pack=pack
    )
    llm, params = options.open_model(model, flags, compute, paging, quiet=quiet)
    try:
        Chat(llm, params, system=system, thinking=think, effort=effort, quiet=quiet, plain=plain, fold=fold_thinking,
             loop_guard=loop_guard, history=history, session_name=session,
             keep_prefixes=history if keep_prefixes is None else keep_prefixes).run()  # fmt: skip
    finally:
        llm.close()


@dataclass
class Chat:
    """One conversation: messages so far, and the engine session that has already read them."""

    llm: LLM
    params: SamplingParams
    system: str | None = field(kw_only=True)
    thinking: options.Thinking = field(kw_only=True)
    effort: options.Effort | None = field(kw_only=True)
    quiet: bool = field(kw_only=True)
    plain: bool = field(kw_only=True)
    fold: bool = field(kw_only=True)
    loop_guard: bool = field(kw_only=True)
    history: bool = field(kw_only=True)
    keep_prefixes: bool = field(kw_only=True)
    session_name: str | None = field(kw_only=True)

    def __post_init__(self) -> None:
        self.console: Console = render.open_console()
        self.interrupts = Interrupts()
        self.files = OwnFiles()
        self.saved = ChatSession()
        self.prefixes = Prefixes(on=self.keep_prefixes)
        self.record_probs = False
        self.totals = Totals(self.llm)
        status = None if self.quiet else lambda columns: self.totals.toolbar(self.used, columns)
        self.input = open_input(status, history=self.history)
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system text."""
        self.messages: list[dict[str, Any]] = []
        # Tokens of the messages, as far as the last reply or count knew.
        self.used = 0
        self._drop_draft()
        self.set_system(self.system)
        self.session = self.llm.session()
        self.saved.forget()

    def set_system(self, text: str | None) -> None:
        """Change the text that stands before the conversation; the conversation stays."""
        self.system = text
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def say(self, text: str) -> None:
        for line in text.split("\n"):
            render.say(self.console, line)

    def run(self) -> None:
        """Read and answer until the user leaves. Raises KeyboardInterrupt for Ctrl-C twice."""
        if not self.quiet:
            self.say(f"{self.llm.name}, context {self.llm.context:,} tokens; /help for help, Ctrl-D to leave")
        if self.session_name is not None:
            self.saved.open(self, self.session_name)
        try:
            with self.interrupts:
                while (message := self.read()) is not None and self.obey(message) == "stay":
                    pass
        finally:
            with finishing():
                self.saved.leave(self)

    def read(self) -> str | None:
        """The next message, empty if Ctrl-C dropped it; None at the end of input."""
        try:
            with self.interrupts.reading():
                message = self.input.read(self.draft)
            message.encode()
            return message
        except EOFError:
            return None
        except KeyboardInterrupt:
            self.interrupted_line()
        except UnicodeError:
            self.say("that was not UTF-8 text; it is dropped")
        return ""

    def interrupted_line(self) -> None:
        """Ctrl-C at the prompt drops what was typed; on an empty line it says how to leave, and twice leaves."""
        if not self.input.typed_so_far():
            self.interrupts.note()
            self.say(EMPTY_LINE_HINT)

    def obey(self, message: str) -> Literal["leave", "stay"]:
        """Carry out a /command or answer a message. Several lines are always a message, whatever they begin with."""
        before = self.messages if self.before_draft is None else self.before_draft
        self._drop_draft()
        text = message.strip()
        command = text if text.startswith("/") and "\n" not in text else ""
        if command and not command.startswith("//"):
            return chat_commands.obey(self, command) or "stay"
        if text:
            self.answer([*before, {"role": "user", "content": command[1:] or message}])
        return "stay"

    def _drop_draft(self) -> None:
        """What /edit put into the input, and the conversation that it goes on from."""
        self.draft = ""
        self.before_draft: list[dict[str, Any]] | None = None

    def questions(self) -> list[int]:
        """Where the messages of the user are, the last one first. Raises UsageError if there are none."""
        found = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not found:
            raise UsageError("nothing was said yet")
        return found[::-1]

    def before_last_message(self) -> tuple[list[dict[str, Any]], str]:
        """The conversation without the last message of the user and its reply, and the message.

        Raises UsageError if there is none."""
        at = self.questions()[0]
        return self.messages[:at], self.messages[at]["content"]

    def change(self, messages: list[dict[str, Any]]) -> None:
        """Go on from other messages. The session stays: the next reply keeps what it has in common with them."""
        self.messages = messages
        self.used = self.count(messages)

    def count(self, messages: Sequence[dict[str, Any]]) -> int:
        """Tokens of the prompt that these messages make."""
        return len(self.prompt_ids(messages)) if messages else 0

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The prompt that these messages make. Raises UsageError if they make none."""
        return self.llm.chat_ids(messages, thinking=self.thinking, effort=self.effort)

    def answer(self, messages: list[dict[str, Any]]) -> None:
        """Reply to these messages and go on from them. Without a reply the conversation stays what it was.

        What ends the chat from outside ends the reply first, and what there is of it is kept."""
        with finishing():
            self._answer(messages)

    def _answer(self, messages: list[dict[str, Any]]) -> None:
        self.interrupts.stopped = False
        try:
            prepared = self.llm.prepare_chat(messages, thinking=self.thinking, effort=self.effort)
            self.prefixes.find(self, prepared.ids)
            completion = self.reply(prepared)
        except (GenerationError, ReadError, ResourceError, UsageError) as error:
            self.say(f"not answered: {error}")
            return
        self.totals.add(completion)
        self.prefixes.keep(self, messages)
        if completion.finish_reason == "error":
            self.say(f"not answered: {completion.error}")
        elif not completion.token_ids:
            self.say("nothing was said; the message is dropped")
        else:
            self.messages = [*messages, completion.message]
            self.used = completion.prompt_tokens + len(completion.token_ids)
            self.saved.after_turn(self)

    def reply(self, prepared: Prepared) -> Completion:
        """Generate and show the reply to a prompt."""
        before, guard = self.llm.pager, LoopGuard()
        with (
            render.Waiting(self.console, "reading the prompt", quiet=self.quiet) as waiting,
            render.ReplyWriter(self.console, quiet=self.quiet, markdown=not self.plain, fold=self.fold) as writer,
        ):
            events = self.llm.stream_prepared(
                prepared, chat_inspect.recording(self), session=self.session,
                cancelled=lambda: self.interrupts.must_stop or guard.found is not None,
            )  # fmt: skip
            completion = render.follow(events, waiting, writer, guard.push if self.loop_guard else None)
        if not self.quiet:
            self.say(render.timings(completion, reading(self.llm, completion, before)))
        if guard.found is not None:
            self.say(f"stopped, it repeats itself: {guard.found[:60]}")
            self.say("/retry samples again, /set repetition_penalty 1.1 before it helps; --no-loop-guard lets it go on")
        return completion

    def show_thinking(self) -> None:
        """The reasoning of the last reply. Raises UsageError if there was none."""
        last = self.totals.last
        if last is None or not last.reasoning:
            raise UsageError("there is no thinking to show; /think on asks for it")
        with render.ReplyWriter(self.console) as writer:
            writer.write("reasoning", last.reasoning)
