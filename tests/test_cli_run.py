"""`localmoe run`: what goes to stdout, what to stderr, what is refused, and with which exit code."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localmoe.cli.chat_files import MAX_FILE_BYTES
from localmoe.cli.main import INTERRUPTED, main
from localmoe.errors import CheckpointError
from localmoe.events import Event, Text
from localmoe.experts.paging import Paging
from localmoe.sampler import Sample
from tests.fake_llm import FakeLLM


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """A fake in place of the engine, and an empty standard input."""

    class Model(FakeLLM):
        pass

    monkeypatch.setattr("localmoe.api.LLM", Model)
    pipe_in(monkeypatch, b"")
    return Model


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def asked(model: type[FakeLLM]) -> dict[str, Any]:
    return model.made[-1].asked[-1]


def test_stdout_holds_the_answer_and_stderr_the_timings(model: type[FakeLLM], capsys: Any) -> None:
    """Fails if anything but the answer reaches a pipe."""
    assert main(["run", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Once upon a time.\n"
    assert err == "prompt 3 tok (1 reused) 4.00 tok/s | gen 2 tok 4.00 tok/s | ttft 0.50 s\n"


def test_generate_is_another_name_for_run(model: type[FakeLLM], capsys: Any) -> None:
    assert main(["generate", "hi"]) == 0
    assert capsys.readouterr().out == "Once upon a time.\n"


def test_quiet_says_only_the_answer(model: type[FakeLLM], capsys: Any) -> None:
    model.replies = [[("reasoning", "hm"), ("answer", "yes")]]
    assert main(["run", "hi", "-q", "--think", "on"]) == 0
    assert capsys.readouterr() == ("yes\n", "")


@pytest.mark.parametrize("how", [[], ["--no-stream"]])
def test_reasoning_goes_to_stderr(model: type[FakeLLM], capsys: Any, how: list[str]) -> None:
    """Fails if a pipe would receive the reasoning, or if streaming changes what is shown."""
    model.replies = [[("reasoning", "The user "), ("reasoning", "greets."), ("answer", "Hello!")]]
    assert main(["run", "hi", "--think", "on", "--effort", "low", *how]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello!\n"
    assert err.startswith("The user greets.\nprompt 3 tok")
    assert asked(model)["thinking"] == "on"
    assert asked(model)["effort"] == "low"


def test_an_answer_that_ends_its_own_line_gets_no_second_newline(model: type[FakeLLM], capsys: Any) -> None:
    model.replies = [[("answer", "end\n")]]
    main(["run", "hi"])
    assert capsys.readouterr().out == "end\n"


def test_escape_sequences_of_the_model_are_shown_not_sent(model: type[FakeLLM], capsys: Any) -> None:
    """The sequence is split over two pieces. Fails if either stream, or a pipe, gets it raw."""
    model.replies = [[("reasoning", "\x1b"), ("reasoning", "[2J"), ("answer", "\x1b"), ("answer", "]52;c;aGk=\x07")]]
    main(["run", "hi", "--think", "on"])
    out, err = capsys.readouterr()
    assert out == "␛]52;c;aGk=␇\n"
    assert err.startswith("␛[2J\n")


def test_piped_text_comes_before_the_prompt(model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, "notes: naïve\n\n".encode())
    assert main(["run", "Summarise."]) == 0
    assert asked(model)["messages"] == [{"role": "user", "content": "notes: naïve\nSummarise."}]


def test_piped_text_alone_is_the_prompt(model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, b"Tell me a story.\n")
    assert main(["run"]) == 0
    assert asked(model)["messages"] == [{"role": "user", "content": "Tell me a story."}]


@pytest.mark.parametrize(
    ("files", "prompt"),
    [
        (["-f", "a", "-f", "b"], "A\nB\npiped\nask"),
        (["-f", "a", "--file", "-", "-f", "b"], "A\npiped\nB\nask"),
    ],
)
def test_files_come_before_what_is_piped_in_and_the_prompt(
    model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], prompt: str
) -> None:
    """Fails if - is not standard input at its place, or a file's last newline makes an empty line."""
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes("\ufeffA\n".encode())
    Path("b").write_text("B\r\n")
    pipe_in(monkeypatch, b"piped\n")
    assert main(["run", "ask", *files]) == 0
    assert asked(model)["messages"] == [{"role": "user", "content": prompt}]


@pytest.mark.parametrize(
    ("file", "data", "reason"),
    [
        ("f", None, "cannot be read (No such file"),
        (".", None, "cannot be read"),
        ("f", b"a\xff", "f is not UTF-8 text (byte 1)"),
        ("f", b"a\0b", "f is not text"),
        ("f", b" \n", "f is empty"),
        ("f", b"a" * (MAX_FILE_BYTES + 1), "f is larger than 4 MiB"),
        ("-", b"", "standard input is empty"),
        ("-", b"a\0b", "standard input is not text"),
        ("-", b"a" * (MAX_FILE_BYTES + 1), "standard input is larger than 4 MiB"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    model: type[FakeLLM],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
    file: str,
    data: bytes | None,
    reason: str,
) -> None:
    """One line, exit 2, and no model loaded for it."""
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path("f").write_bytes(data)
        pipe_in(monkeypatch, data)
    assert main(["run", "-f", file, "ask"]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1 and not model.made


def test_standard_input_is_read_only_once(model: type[FakeLLM], capsys: Any) -> None:
    assert main(["run", "-f", "-", "-f", "-"]) == 2
    assert "only once" in capsys.readouterr().err


CODE = "Here:\n```py\na\x1b[2J\n\n  b\n```\nand\n```\nc\n```\n"


def test_extract_prints_exactly_the_first_code_block(model: type[FakeLLM], capsys: Any) -> None:
    """Fails if a script would get words around the code, or other code than the model wrote."""
    model.replies = [[("reasoning", "hm"), ("answer", CODE[:9]), ("answer", CODE[9:])]]
    assert main(["run", "hi", "-x", "--think", "on"]) == 0
    out, err = capsys.readouterr()
    assert out == "a\x1b[2J\n\n  b\n"
    assert err.startswith("hm\nprompt 3 tok")


def test_extracted_code_is_made_safe_for_a_terminal(
    model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model.replies = [[("answer", CODE)]]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["run", "hi", "-x"]) == 0
    assert capsys.readouterr().out == "a␛[2J\n\n  b\n"


@pytest.mark.parametrize(
    ("said", "finish", "code", "out", "err"),
    [
        ("no code", "stop", 1, "", "no fenced code block"),
        ("```\na", "length", 1, "", "cut inside its first code block"),
        ("```\na", "stop", 0, "a\n", ""),
        ("```\na\n```\nand", "length", 0, "a\n", ""),
        ("```\na\n```\nand", "cancelled", INTERRUPTED, "", ""),
    ],
)
def test_extract_does_not_take_half_a_block_for_a_whole_one(
    model: type[FakeLLM], capsys: Any, said: str, finish: str, code: int, out: str, err: str
) -> None:
    model.replies, model.finish_reason = [[("answer", said)]], finish
    assert main(["run", "hi", "-x", "-q"]) == code
    found = capsys.readouterr()
    assert found.out == out and err in found.err and found.err.count("\n") == bool(err)


def test_raw_passes_the_prompt_without_chat_format(model: type[FakeLLM]) -> None:
    assert main(["run", "--raw", "Once"]) == 0
    assert asked(model)["prompt"] == "Once"


def test_options_replace_the_models_defaults_one_by_one(model: type[FakeLLM], tmp_path: Path) -> None:
    """Each option must arrive; the temperature that is not given must stay the model's 0.6."""
    line = "run hi -n 9 --seed 4 --top-p 0.5 --top-k 3 --min-p 0.1 --repetition-penalty 1.2 --stop A --stop B"
    options = ["--system", "Be brief.", "--dtype", "float32", "--ctx", "64", "--json", "--logprobs", "2"]
    assert main([*line.split(), *options, "--model", str(tmp_path)]) == 0
    params = asked(model)["params"]
    assert (params.max_tokens, params.seed, params.temperature) == (9, 4, 0.6)
    assert (params.top_p, params.top_k, params.min_p) == (0.5, 3, 0.1)
    assert (params.repetition_penalty, params.stop, params.logprobs) == (1.2, ("A", "B"), 2)
    assert asked(model)["messages"][0] == {"role": "system", "content": "Be brief."}
    assert model.made[0].model == tmp_path
    assert (model.made[0].options["dtype"], model.made[0].options["context"]) == ("float32", 64)


def test_temperature_zero_is_not_taken_for_absent(model: type[FakeLLM]) -> None:
    main(["run", "hi", "--temp", "0"])
    assert asked(model)["params"].temperature == 0


def test_json_is_one_object_with_the_exact_text(model: type[FakeLLM], capsys: Any) -> None:
    """Fails if text is sanitised here, or if an escape character leaves JSON's own escaping."""
    model.replies = [[("reasoning", "hm"), ("answer", "\x1b[2J\u202e")]]
    model.logprobs = (Sample(7, -0.5, ((7, -0.5), (8, float("-inf")))),)
    assert main(["run", "hi", "--json", "--logprobs", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.isascii() and out.count("\n") == 1 and "\x1b" not in out
    said = json.loads(out)
    assert (said["text"], said["reasoning"], said["finish_reason"]) == ("\x1b[2J\u202e", "hm", "stop")
    assert said["tokens"] == {"prompt": 3, "reused": 1, "generated": 2, "ids": [7, 7]}
    assert said["timings"]["decode_tokens_per_s"] == 4.0
    assert said["logprobs"][0]["top"][1] == {"id": 8, "token": "<8>", "logprob": None}
    assert err.startswith("prompt 3 tok")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no prompt"),
        (["hi", "-n", "0"], "--max-tokens"),
        (["hi", "--max-tokens", "-5"], "--max-tokens"),
        (["hi", "--temp", "-1"], "temperature is -1"),
        (["hi", "--top-p", "nan"], "top_p"),
        (["hi", "--stop", ""], "stop"),
        (["hi", "--logprobs", "2"], "--json"),
        (["hi", "--json", "--extract"], "--extract"),
        (["hi", "--effort", "low"], "--think on"),
        (["hi", "--raw", "--system", "x"], "--raw"),
        (["hi", "--raw", "--think", "on"], "--raw"),
        (["hi", "--think", "maybe"], "--think"),
        (["hi", "there"], "there"),
        (["hi", "--frobnicate"], "--frobnicate"),
        (["\udc80"], "UTF-8"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    model: type[FakeLLM], capsys: Any, arguments: list[str], words: str
) -> None:
    """One line, exit 2, and no model loaded for it. Fails if an option is accepted and ignored."""
    assert main(["run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and not model.made
    assert err.startswith("localmoe: error: ") and err.count("\n") == 1
    assert words in err


def test_piped_bytes_that_are_not_text_are_refused(
    model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pipe_in(monkeypatch, b"ab\xff")
    assert main(["run"]) == 2
    assert "byte 2" in capsys.readouterr().err


def test_a_broken_reply_shows_what_was_said_then_fails(model: type[FakeLLM], capsys: Any) -> None:
    model.finish_reason, model.error = "error", "layer 3, expert 5: NaN"
    assert main(["run", "hi"]) == 1
    out, err = capsys.readouterr()
    assert out == "Once upon a time.\n"
    assert err.endswith("localmoe: error: layer 3, expert 5: NaN\n")


def test_an_error_of_the_model_directory_is_one_safe_line_and_exit_4(model: type[FakeLLM], capsys: Any) -> None:
    """The file name tries to start a second line and to move the cursor."""

    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("a\x1b[2J\nb.safetensors: truncated")

    model.__init__ = fail  # type: ignore[method-assign, assignment]
    assert main(["run", "hi"]) == 4
    assert capsys.readouterr().err == "localmoe: error: a␛[2J␊b.safetensors: truncated\n"


def test_a_reply_cut_by_the_limit_says_so(model: type[FakeLLM], capsys: Any) -> None:
    model.finish_reason = "length"
    assert main(["run", "hi", "-n", "2"]) == 0
    assert capsys.readouterr().err.endswith("| cut at the length limit\n")


@pytest.mark.parametrize("how", [[], ["--no-stream"], ["--json"], ["--raw"]])
def test_ctrl_c_keeps_what_was_said(
    model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: Any, how: list[str]
) -> None:
    """It comes after the first piece of three. Fails if that piece is lost, or the reply goes on."""
    model.replies = [[("answer", "one "), ("answer", "two "), ("answer", "three")]]
    whole = model._reply

    def interrupted(self: FakeLLM, cancelled: Any) -> Iterator[Event]:
        for event in whole(self, cancelled):
            yield event
            if isinstance(event, Text):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(model, "_reply", interrupted)
    assert main(["run", "hi", *how]) == INTERRUPTED
    out, err = capsys.readouterr()
    if how == ["--json"]:
        assert (json.loads(out)["text"], json.loads(out)["finish_reason"]) == ("one ", "cancelled")
    else:
        assert out == "one \n"
    assert err.endswith("| cancelled\n")


def test_a_second_ctrl_c_does_not_wait(model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As in a prefill that takes long. Fails if only the end of the step lets go."""

    def stuck(self: FakeLLM, cancelled: Any) -> Iterator[Event]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield Text("answer", "too late")

    monkeypatch.setattr(model, "_reply", stuck)
    assert main(["run", "hi"]) == INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_what_slows_it_down_is_said_unless_quiet(model: type[FakeLLM], capsys: Any) -> None:
    """Fails if a user without compiled kernels is left to wonder, or a script's stderr is not quiet."""
    model.kernels_notice = "no compiled kernels: none"
    assert main(["run", "hi"]) == 0
    assert capsys.readouterr().err.startswith("localmoe: warning: no compiled kernels: none\n")
    assert main(["run", "hi", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_graphs_without_effect_are_told_of_where_they_were_asked_for(model: type[FakeLLM], capsys: Any) -> None:
    """Fails if they are asked for without effect and without a word, or everybody with layers on the CPU is warned."""
    model.graphs_notice = "no CUDA graphs: not today"
    for arguments, said in (["--graphs"], True), (["--graphs", "-q"], False), ([], False), (["--no-graphs"], False):
        assert main(["run", "hi", "--device", "cuda", *arguments]) == 0
        assert ("localmoe: warning: no CUDA graphs: not today\n" in capsys.readouterr().err) == said


def test_kernels_and_threads_reach_the_model(model: type[FakeLLM]) -> None:
    """Fails if an option is accepted without effect."""
    assert main(["run", "hi", "--kernels", "strict", "--threads", "3", "--dtype", "bfloat16", "--ctx", "99"]) == 0
    options = {name: value for name, value in model.made[-1].options.items() if name != "progress"}
    assert options.pop("paging") == Paging()
    assert options == {
        "kernels": "strict", "threads": 3, "dtype": "bfloat16", "context": 99, "device": "cpu", "vram": None,
        "graphs": None,
    }  # fmt: skip


def test_devices_reach_the_model(model: type[FakeLLM], capsys: Any) -> None:
    """Fails if an option is accepted without effect, or a size is read wrongly."""
    assert main(["run", "hi", "--device", "cuda:0,cuda:1", "--vram", "20GB,10GB", "--no-graphs"]) == 0
    assert model.made[-1].options["graphs"] is False
    assert (model.made[-1].options["device"], model.made[-1].options["vram"]) == (
        "cuda:0,cuda:1",
        (20 * 10**9, 10**10),
    )
    assert main(["run", "hi", "--device", "cuda", "--vram", "much"]) == 2
    assert "'much' is not a size" in capsys.readouterr().err


def test_paging_options_reach_the_model(model: type[FakeLLM], tmp_path: Path) -> None:
    """Fails if an option is accepted without effect, or a size is read wrongly."""
    trace, pack = tmp_path / "trace", tmp_path / "pack"
    given = ["--ram", "2.5GB", "--policy", "lru", "--trace-routing", str(trace), "--pack", str(pack)]
    assert main(["run", "hi", *given]) == 0
    expected = Paging(ram=2_500_000_000, policy="lru", trace=trace, pack=pack)
    assert model.made[-1].options["paging"] == expected
    assert main(["run", "hi", "--expert-slots", "7"]) == 0
    assert model.made[-1].options["paging"] == Paging(slots=7)
    assert main(["run", "hi", "--ram", "much"]) == 2
