"""`localmoe generate`: what goes to stdout, what to stderr, what is refused, and with which exit code."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe.cli.main import main
from localmoe.errors import CheckpointError
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
    assert main(["generate", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Once upon a time.\n"
    assert err == "prompt 3 tok (1 reused) 4.00 tok/s | gen 2 tok 4.00 tok/s | ttft 0.50 s\n"


def test_run_is_another_name_for_generate(model: type[FakeLLM], capsys: Any) -> None:
    assert main(["run", "hi"]) == 0
    assert capsys.readouterr().out == "Once upon a time.\n"


def test_quiet_says_only_the_answer(model: type[FakeLLM], capsys: Any) -> None:
    model.replies = [[("reasoning", "hm"), ("answer", "yes")]]
    assert main(["generate", "hi", "-q", "--think", "on"]) == 0
    assert capsys.readouterr() == ("yes\n", "")


@pytest.mark.parametrize("how", [[], ["--no-stream"]])
def test_reasoning_goes_to_stderr(model: type[FakeLLM], capsys: Any, how: list[str]) -> None:
    """Fails if a pipe would receive the reasoning, or if streaming changes what is shown."""
    model.replies = [[("reasoning", "The user "), ("reasoning", "greets."), ("answer", "Hello!")]]
    assert main(["generate", "hi", "--think", "on", "--effort", "low", *how]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello!\n"
    assert err.startswith("The user greets.\nprompt 3 tok")
    assert asked(model)["thinking"] == "on"
    assert asked(model)["effort"] == "low"


def test_an_answer_that_ends_its_own_line_gets_no_second_newline(model: type[FakeLLM], capsys: Any) -> None:
    model.replies = [[("answer", "end\n")]]
    main(["generate", "hi"])
    assert capsys.readouterr().out == "end\n"


def test_escape_sequences_of_the_model_are_shown_not_sent(model: type[FakeLLM], capsys: Any) -> None:
    """The sequence is split over two pieces. Fails if either stream, or a pipe, gets it raw."""
    model.replies = [[("reasoning", "\x1b"), ("reasoning", "[2J"), ("answer", "\x1b"), ("answer", "]52;c;aGk=\x07")]]
    main(["generate", "hi", "--think", "on"])
    out, err = capsys.readouterr()
    assert out == "␛]52;c;aGk=␇\n"
    assert err.startswith("␛[2J\n")


def test_piped_text_comes_before_the_prompt(model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, "notes: naïve\n\n".encode())
    assert main(["generate", "Summarise."]) == 0
    assert asked(model)["messages"] == [{"role": "user", "content": "notes: naïve\nSummarise."}]


def test_piped_text_alone_is_the_prompt(model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, b"Tell me a story.\n")
    assert main(["generate"]) == 0
    assert asked(model)["messages"] == [{"role": "user", "content": "Tell me a story."}]


def test_raw_passes_the_prompt_without_chat_format(model: type[FakeLLM]) -> None:
    assert main(["generate", "--raw", "Once"]) == 0
    assert asked(model)["prompt"] == "Once"


def test_options_replace_the_models_defaults_one_by_one(model: type[FakeLLM], tmp_path: Path) -> None:
    """Each option must arrive; the temperature that is not given must stay the model's 0.6."""
    line = "generate hi -n 9 --seed 4 --top-p 0.5 --top-k 3 --min-p 0.1 --repetition-penalty 1.2 --stop A --stop B"
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
    main(["generate", "hi", "--temp", "0"])
    assert asked(model)["params"].temperature == 0


def test_json_is_one_object_with_the_exact_text(model: type[FakeLLM], capsys: Any) -> None:
    """Fails if text is sanitised here, or if an escape character leaves JSON's own escaping."""
    model.replies = [[("reasoning", "hm"), ("answer", "\x1b[2J\u202e")]]
    model.logprobs = (Sample(7, -0.5, ((7, -0.5), (8, float("-inf")))),)
    assert main(["generate", "hi", "--json", "--logprobs", "2"]) == 0
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
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and not model.made
    assert err.startswith("localmoe: error: ") and err.count("\n") == 1
    assert words in err


def test_piped_bytes_that_are_not_text_are_refused(
    model: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pipe_in(monkeypatch, b"ab\xff")
    assert main(["generate"]) == 2
    assert "byte 2" in capsys.readouterr().err


def test_a_broken_reply_shows_what_was_said_then_fails(model: type[FakeLLM], capsys: Any) -> None:
    model.finish_reason, model.error = "error", "layer 3, expert 5: NaN"
    assert main(["generate", "hi"]) == 1
    out, err = capsys.readouterr()
    assert out == "Once upon a time.\n"
    assert err.endswith("localmoe: error: layer 3, expert 5: NaN\n")


def test_an_error_of_the_model_directory_is_one_safe_line_and_exit_4(model: type[FakeLLM], capsys: Any) -> None:
    """The file name tries to start a second line and to move the cursor."""

    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("a\x1b[2J\nb.safetensors: truncated")

    model.__init__ = fail  # type: ignore[method-assign, assignment]
    assert main(["generate", "hi"]) == 4
    assert capsys.readouterr().err == "localmoe: error: a␛[2J␊b.safetensors: truncated\n"


def test_a_reply_cut_by_the_limit_says_so(model: type[FakeLLM], capsys: Any) -> None:
    model.finish_reason = "length"
    assert main(["generate", "hi", "-n", "2"]) == 0
    assert capsys.readouterr().err.endswith("| cut at the length limit\n")


def test_what_slows_it_down_is_said_unless_quiet(model: type[FakeLLM], capsys: Any) -> None:
    """Fails if a user without compiled kernels is left to wonder, or a script's stderr is not quiet."""
    model.kernels_notice = "no compiled kernels: none"
    assert main(["generate", "hi"]) == 0
    assert capsys.readouterr().err.startswith("localmoe: warning: no compiled kernels: none\n")
    assert main(["generate", "hi", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_kernels_and_threads_reach_the_model(model: type[FakeLLM]) -> None:
    """Fails if an option is accepted without effect."""
    assert main(["generate", "hi", "--kernels", "strict", "--threads", "3", "--dtype", "bfloat16", "--ctx", "99"]) == 0
    options = {name: value for name, value in model.made[-1].options.items() if name != "progress"}
    assert options.pop("paging") == Paging()
    assert options == {"kernels": "strict", "threads": 3, "dtype": "bfloat16", "context": 99}


def test_paging_options_reach_the_model(model: type[FakeLLM], tmp_path: Path) -> None:
    """Fails if an option is accepted without effect, or a size is read wrongly."""
    trace, pack = tmp_path / "trace", tmp_path / "pack"
    given = ["--ram", "2.5GB", "--policy", "lru", "--trace-routing", str(trace), "--pack", str(pack)]
    assert main(["generate", "hi", *given]) == 0
    expected = Paging(ram=2_500_000_000, policy="lru", trace=trace, pack=pack)
    assert model.made[-1].options["paging"] == expected
    assert main(["generate", "hi", "--expert-slots", "7"]) == 0
    assert model.made[-1].options["paging"] == Paging(slots=7)
    assert main(["generate", "hi", "--ram", "much"]) == 2
