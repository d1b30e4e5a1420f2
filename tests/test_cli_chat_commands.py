"""The /commands of `localmoe chat`: what each does to the conversation, and what is refused with one line."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe.cli import chat_files, chat_set
from localmoe.cli.chat_commands import BY_NAME, COMMANDS, help_text
from localmoe.cli.chat_totals import Totals
from localmoe.cli.sanitize import sanitize
from localmoe.errors import UsageError
from localmoe.events import Completion
from localmoe.plan import Rates
from localmoe.sampler import Sample, SamplingParams
from tests.chat_talk import Talk, said
from tests.fake_llm import FakeLLM


def test_help_lists_every_command(talk: Talk, fake_model: type[FakeLLM], capsys: Any) -> None:
    """Fails if a command is added that nobody would find."""
    talk("/help")
    err = capsys.readouterr().err
    assert all(name in err for name in BY_NAME)
    assert all(each.help in err for each in COMMANDS)
    assert max(map(len, help_text().split("\n"))) <= 100


def test_retry_asks_again_in_the_same_session(talk: Talk, fake_model: type[FakeLLM]) -> None:
    """Fails if the old reply stays in the prompt, or if a new session would read everything again."""
    talk("a", "b", "/retry", "c")
    assert said(fake_model) == [["a"], ["a", "one", "b"], ["a", "one", "b"], ["a", "one", "b", "three", "c"]]
    assert {asked["session"] for asked in fake_model.made[0].asked} == {1}


def test_a_retry_that_fails_keeps_the_reply(talk: Talk, fake_model: type[FakeLLM]) -> None:
    fake_model.replies = [[("answer", "one")], [], [("answer", "three")]]
    talk("a", "/retry", "b")
    assert said(fake_model)[-1] == ["a", "one", "b"]


def test_undo_takes_back_a_turn_in_the_same_session(talk: Talk, fake_model: type[FakeLLM]) -> None:
    talk("a", "b", "/undo", "c", "/undo", "/undo", "/undo", "d", options=("-s", "sys"))
    assert said(fake_model)[2:] == [["sys", "a", "one", "c"], ["sys", "d"]]
    assert {asked["session"] for asked in fake_model.made[0].asked} == {1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/undo", "nothing was said yet"),
        ("/retry", "nothing to answer"),
        ("/edit", "nothing was said yet"),
        ("/rewind", "nothing was said yet"),
        ("/probs", "no probabilities are recorded of the last reply"),
        ("/probs some", "/probs some: expected on, off or a number"),
        ("/plan now", "/plan takes nothing after it"),
        ("/copy", "no reply to copy"),
        ("/clear all", "/clear takes nothing after it; //clear all sends it"),
        ("/read", "expected /read FILE"),
        ("/export", "expected /export FILE"),
        ("/think hard", "/think hard is not known, expected one of off, on, low, high, max"),
        ("/fold up", "/fold up is not known, expected one of on, off, show"),
        ("/fold show", "there is no thinking to show"),
        ("/set heat 1", "heat cannot be set, expected one of temperature"),
        ("/set top_p 2", "top_p is 2.0, expected a number above 0"),
        ("/set top_k many", "top_k is many, expected an integer"),
        ("/read /nowhere/x", "/nowhere/x cannot be read (No such file or directory)"),
        ("/read ~nobody-of-this-name/x", "no such home folder"),
        ("/export /nowhere/x", "/nowhere/x cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    talk: Talk,
    fake_model: type[FakeLLM],
    capsys: Any,
    line: str,
    reason: str,
) -> None:
    assert talk(line, "a") == 0
    assert said(fake_model) == [["a"]]
    assert [said_line for said_line in capsys.readouterr().err.split("\n") if reason in said_line]


def test_rewind_goes_back_before_a_numbered_message(talk: Talk, fake_model: type[FakeLLM], capsys: Any) -> None:
    """Fails if the numbers shown are not those that are taken."""
    talk("a", "b", "c", "/rewind", "/rewind 2", "d", "/rewind 3", "/rewind 0", "/rewind x", "/rewind 2", "e")
    assert said(fake_model)[3:] == [["a", "one", "d"], ["e"]]
    lines = capsys.readouterr().err.split("\n")
    assert [line for line in lines if line.startswith("   ")] == ["   3  a", "   2  b", "   1  c"]
    assert sum("expected a number from 1 to 2" in line for line in lines) == 3


def test_probabilities_are_recorded_when_asked_for(talk: Talk, fake_model: type[FakeLLM], capsys: Any) -> None:
    """Fails if every chat pays for them, if the parameters of the chat change, or a sure token is called unsure."""
    fake_model.logprobs = tuple(Sample(n, -n / 10, ((n, -n / 10), (99, -5.0), (98, -9.0))) for n in range(20))
    talk("a", "/probs on", "b", "/probs", "/probs 2", "/set", "/probs off", "c")
    assert [each["params"].logprobs for each in fake_model.made[0].asked] == [None, 5, None]
    lines = [line for line in capsys.readouterr().err.split("\n") if "instead of" in line]
    assert [int(line.split()[0]) for line in lines] == [*range(13, 21), 19, 20]
    assert lines[-1] == "   20   15.0 %  '<19>'   instead of '<99>' 0.7 %"


def test_the_plan_and_the_state_of_a_real_model(talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Fails if /plan measures the machine, which takes ten seconds, or /cache shows what is not there."""
    monkeypatch.setattr("localmoe.bench.rates.known_rates", lambda *_: None)
    talk("/cache", "/plan", "Tell me a story.", "/cache", options=("-n", "6"))
    unmeasured = capsys.readouterr().err
    assert "64 of 64 experts, all in memory" in unmeasured and "has not been measured" in unmeasured
    assert "for 0 tokens" in unmeasured and "marks: 0" in unmeasured
    assert "each token more: 208 bytes; the whole context: 0.8 MiB" in unmeasured
    assert "marks: 1, 0.1 MiB; what is read again begins at" in unmeasured and "experts: all 64" in unmeasured
    rates = Rates(dram=30e9, disk=2e9, flops=1e12, seconds_per_layer=1e-3)
    monkeypatch.setattr("localmoe.bench.rates.known_rates", lambda *_: rates)
    talk("/plan")
    assert "tok/s, bound by Python" in capsys.readouterr().err


def test_hits_are_shown_by_tier(talk: Talk, capsys: Any) -> None:
    talk("Tell me a story.", "/cache", options=("-n", "6", "--expert-slots", "20"))
    err = capsys.readouterr().err
    assert "experts: 20 held in RAM; found in RAM" in err and "VRAM" not in err and "MiB read" in err


def test_edit_without_a_terminal_changes_nothing(talk: Talk, fake_model: type[FakeLLM], capsys: Any) -> None:
    talk("a", "/edit", "b")
    assert said(fake_model)[-1] == ["a", "one", "b"]
    assert "/edit needs a terminal" in capsys.readouterr().err


def test_think_holds_for_the_turns_after_it(talk: Talk, fake_model: type[FakeLLM]) -> None:
    talk("a", "/think max", "b", "/think on", "c", "/think off", "d")
    asked = [(each["thinking"], each["effort"]) for each in fake_model.made[0].asked]
    assert asked == [("off", None), ("on", "max"), ("on", None), ("off", None)]


def test_folded_thinking_is_counted_and_can_be_shown_later(talk: Talk, fake_model: type[FakeLLM], capsys: Any) -> None:
    """Also: the option is what /fold on is, and /fold off takes both back."""
    fake_model.replies = [[("reasoning", "hidden\x1b"), ("answer", "one")]]
    assert talk("a", "/fold show", "/fold", "/fold off", "b", options=("--fold-thinking",)) == 0
    out, err = capsys.readouterr()
    assert out == "one\none\n"
    folded, later = err.split("thought for ")[1:][0].split("thinking is only counted")
    assert "hidden" not in folded.split("hidden␛\n")[0] and folded.count("hidden␛") == 1
    assert later.count("hidden␛") == 1
    assert talk("/fold on", "a") == 0
    assert "hidden" not in capsys.readouterr().err


def test_system_changes_the_text_and_keeps_the_conversation(
    talk: Talk,
    fake_model: type[FakeLLM],
    capsys: Any,
) -> None:
    talk("/system be brief", "a", "/system", '/system ""', "b", "/clear", "c")
    assert said(fake_model) == [["be brief", "a"], ["a", "one", "b"], ["c"]]
    assert "system text: be brief" in capsys.readouterr().err


def test_set_changes_what_is_sampled_with(talk: Talk, fake_model: type[FakeLLM], capsys: Any) -> None:
    talk("/set temp 0.25", "/set seed 7", "/set stop END", "a", "/set temp default", "/set seed none", "b", "/set")
    first, second = (each["params"] for each in fake_model.made[0].asked)
    assert first == SamplingParams(temperature=0.25, seed=7, stop=("END",))
    assert second == SamplingParams(temperature=0.6, stop=("END",))
    assert all(name in capsys.readouterr().err for name in ("max_tokens none",))


def test_every_parameter_that_can_be_set_is_one_of_samplings() -> None:
    assert all(hasattr(SamplingParams(), name) for name in chat_set.NAMES)


def test_read_puts_a_file_before_the_next_message(
    talk: Talk,
    fake_model: type[FakeLLM],
    capsys: Any,
    tmp_path: Path,
) -> None:
    """Also: a name with spaces, and its control characters never reach the terminal."""
    file = tmp_path / "my \x1b[31mnotes.txt"
    file.write_text("/exit\nß \x1b[2J")
    talk(f"/read {file}", "what is this?", "/undo", "/undo", "b")
    assert said(fake_model) == [["/exit\nß \x1b[2J", "what is this?"], ["b"]]
    err = capsys.readouterr().err
    assert "tokens, read before" in err and "\x1b" not in err


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe", "not UTF-8 text (byte 0)"), (b"  \n", "is empty"), (b"a\0b", "is not text"), (None, "regular file")],
)
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "x"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        chat_files.read_text(path)
    assert reason in str(refused.value) or "directory" in str(refused.value)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_files, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "x").write_bytes(b"a" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        chat_files.read_text(tmp_path / "x")


def test_a_file_beyond_the_context_is_not_taken(
    talk: Talk,
    fake_model: type[FakeLLM],
    capsys: Any,
    tmp_path: Path,
) -> None:
    """Fails if every later message would be refused because of it."""
    (tmp_path / "x").write_text("word " * 3000)
    talk(f"/read {tmp_path / 'x'}", "a")
    assert said(fake_model) == [["a"]]
    assert "the context holds 2,048" in capsys.readouterr().err


def test_export_writes_json_and_markdown(talk: Talk, fake_model: type[FakeLLM], tmp_path: Path) -> None:
    """Also: it writes over its own file and over no other."""
    other = tmp_path / "other.md"
    other.write_text("mine")
    talk("a", f"/export {tmp_path / 'c.json'}", f"/export {tmp_path / 'c.md'}", f"/export {other}", "b",
         f"/export {tmp_path / 'c.json'}")  # fmt: skip
    saved = json.loads((tmp_path / "c.json").read_text())
    assert [m["content"] for m in saved["messages"]] == ["a", "one", "b", "two"]
    assert (tmp_path / "c.md").read_text() == "# Conversation with fake\n\n## User\n\na\n\n## Assistant\n\none\n"
    assert other.read_text() == "mine"


def test_copy_to_a_file_has_the_last_reply(talk: Talk, fake_model: type[FakeLLM], tmp_path: Path) -> None:
    talk("a", "b", f"/copy {tmp_path / 'reply'}")
    assert (tmp_path / "reply").read_text() == "two"


def test_copy_without_a_terminal_says_so(talk: Talk, fake_model: type[FakeLLM], capsys: Any) -> None:
    talk("a", "/copy")
    out, err = capsys.readouterr()
    assert "no terminal whose clipboard" in err and "\x1b" not in out


def test_the_clipboard_gets_base64_only(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Fails if a reply could end the sequence and go on with its own."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    chat_files.to_clipboard("ä\x07\x1b]52;c;eA==\x07")
    sent = capsys.readouterr().out
    assert sent.startswith("\x1b]52;c;") and sent.endswith("\x07")
    assert base64.b64decode(sent[7:-1]).decode() == "ä\x07\x1b]52;c;eA==\x07"
    assert sanitize(sent[7:-1]) == sent[7:-1]
    with pytest.raises(UsageError, match="as long as this"):
        chat_files.to_clipboard("x" * 60_000)


def test_stats_and_tokens_count(talk: Talk, fake_model: type[FakeLLM], capsys: Any) -> None:
    """The fake reads 3 tokens, reuses 1 and generates 1 per reply."""
    talk("/stats", "a", "b", "/stats", "/tokens two words")
    err = capsys.readouterr().err
    assert "nothing was generated yet" in err
    assert "2 replies" in err and "read: 6 tok, 2 of them reused 4.00 tok/s" in err and "experts: all in memory" in err
    assert "2 tokens" in err and "of 2,048 tokens" in err


def test_stats_tell_of_graphs_that_could_not_be_made(talk: Talk, fake_model: Any, capsys: Any) -> None:
    fake_model.graphs_notice = "no CUDA graphs: not today"
    talk("a", "/stats")
    assert "no CUDA graphs: not today" in capsys.readouterr().err


def test_what_was_undone_is_not_read_again(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real engine. Fails if /retry or /undo would begin a new session: nothing would be reused."""
    replies: list[Completion] = []
    monkeypatch.setattr(Totals, "add", lambda _self, completion: replies.append(completion))
    talk("Tell me a story.", "And then?", "/retry", "/undo", "Why?", options=("-n", "6"))
    reused = [reply.stats.reused_tokens for reply in replies]
    assert reused[0] == 0
    # For the same prompt, all but its last token; for another question, all that was said before it.
    assert reused[2] == replies[2].prompt_tokens - 1
    assert reused[3] == reused[1] >= replies[0].prompt_tokens + len(replies[0].token_ids) - 1


def test_the_first_turn_is_not_read_again_either(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if /retry or another first question reads a long system text again."""
    replies: list[Completion] = []
    monkeypatch.setattr(Totals, "add", lambda _self, completion: replies.append(completion))
    system = "You tell stories of frogs. " * 20
    talk("Who are you?", "/retry", "/undo", "Why?", "/think low", "/retry", options=("-n", "6", "-s", system))
    first, again, other, thinking = (reply.stats.reused_tokens for reply in replies)
    assert (first, again) == (0, replies[0].prompt_tokens - 1)
    assert 100 < other < replies[0].prompt_tokens - 1
    # "low" adds no text to the prompt, whose last token says whether to think.
    assert thinking == replies[2].prompt_tokens - 1
