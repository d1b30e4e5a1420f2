"""The batch command: what it refuses before it loads a model; neither company nor a kill changes its output."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe import LLM
from localmoe.cli.main import main
from localmoe.prompt import render_chat
from tests import tiny_mla
from tests.batch_files import batch, rows, write
from tests.hostile import CORPUS, NUL, obeyed
from tests.tiny_tokenizer import tiny_description, tiny_tokenizer
from tests.tiny_v4 import write_model

ROOT = Path(__file__).parents[1]
REQUESTS: list[dict[str, Any]] = [
    {"prompt": f"Tell me a story about {what}.", "max_tokens": 4 + 3 * i}
    for i, what in enumerate(("a frog", "a very old and brave cat", "rain", "me", "a boat", "two dogs", "snow", "tea"))
]
REQUESTS[2] |= {"custom_id": "two", "temperature": 0, "stop": ["e"]}
REQUESTS[4] = {"custom_id": "raw", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 9, "seed": 1}}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": "a", "logit_bias": {}}, "'?logit_bias'? is not a field"),
        ({"prompt": "a", "n": 0}, "n is 0"),
        ({"prompt": "a", "functions": []}, "'?functions'? is not a field"),
        ({"prompt": "a", "stream": True}, "stream is not supported"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": "a", "messages": []}, "either messages or prompt"),
        ({"prompt": "a", "custom_id": "1"}, "is there already"),
        ({"prompt": "a", "url": "/v1/embeddings"}, "method and url"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "messages"),
        ('{"prompt": NaN}\n', "NaN is not a number"),
        ('{"prompt": "\\ud83d"}\n', "surrogate"),
        ('{"prompt"\n', "not valid JSON"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(
    tmp_path: Path, fake_model: Any, capsys: pytest.CaptureFixture[str], line: Any, problem: str
) -> None:
    """Fails if a model is loaded for it, or a field is ignored."""
    source = write(tmp_path / "in", [{"prompt": "ok"}, line])
    assert batch(source, tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert re.search(f"line 2: .*{problem}", shown.replace("\n", " ")), shown
    assert not fake_model.made and not (tmp_path / "out").exists()


def test_hostile_texts_stay_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As prompts, system texts and ids. Fails if one would reach the terminal as control, be lost from the file, or
    become a control token: every prompt has as many of those as a harmless one."""
    texts = [*CORPUS.values(), NUL]
    lines = [
        {"custom_id": f"{i} {text}"[:60], "max_tokens": 1, "temperature": 0,
         "messages": [{"role": "system", "content": text}, {"role": "user", "content": text}]}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    source, out = write(tmp_path / "in", lines), tmp_path / "out"
    assert main(["batch", str(source), "-o", str(out), "--deterministic", "--report", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr()
    assert not obeyed(shown.out + shown.err)
    assert not obeyed(out.read_text())
    assert [row["custom_id"] for row in rows(out)] == [line["custom_id"] for line in lines]
    llm = LLM()
    control = llm.tokenizer.control_ids
    for line in lines:
        ids = render_chat(line["messages"]).ids(llm.tokenizer)
        harmless = [message | {"content": "a"} for message in line["messages"]]
        expected = render_chat(harmless).ids(llm.tokenizer)
        assert [token for token in ids if token in control] == [token for token in expected if token in control]
    llm.close()


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a", "custom_id": "b", "\x1b]52;c;b3duZWQ=\x07": 1},
        {"prompt": "a", "url": "\x1b[2J\u202eowned"},
        {"messages": [{"role": "\x1b[31m", "content": "a"}]},
        "\x1b]0;owned\x07{\n",
    ],
)
def test_what_is_said_of_hostile_lines_is_safe(
    tmp_path: Path, fake_model: Any, capsys: pytest.CaptureFixture[str], line: Any
) -> None:
    source = write(tmp_path / "\x1b[2Jin", [line])
    assert batch(source, tmp_path / "out") == 2
    shown = capsys.readouterr()
    assert "line 1" in shown.err.replace("\n", " ")
    assert not obeyed(shown.out + shown.err)


def test_company_and_order_change_no_byte(tmp_path: Path) -> None:
    """Batch sizes 1, 3 and 8, and a packed input in reverse. Fails if a reply depends on what runs beside it."""
    source = write(tmp_path / "in", REQUESTS)
    for size in ("1", "3", "8"):
        assert batch(source, tmp_path / size, "--batch-size", size) == 0
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes() == (tmp_path / "8").read_bytes()
    assert [row["custom_id"] for row in rows(tmp_path / "1")] == ["1", "2", "two", "4", "raw", "6", "7", "8"]
    named = [{"custom_id": str(i)} | request for i, request in enumerate(REQUESTS, 1)]
    (tmp_path / "back.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, named[::-1])).encode()))
    assert batch(tmp_path / "back.gz", tmp_path / "back", "--batch-size", "3") == 0
    assert rows(tmp_path / "back")[::-1] == rows(tmp_path / "1")


def test_one_that_fails_is_a_row_and_is_run_again_only_if_asked(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": "a", "max_tokens": 9999}, {"prompt": "b", "max_tokens": 3}])
    out = tmp_path / "out"
    assert batch(source, out) == batch(source, out) == batch(source, out, "--retry-errors") == 3
    assert [row["response"]["status_code"] for row in rows(out)] == [400, 200]
    assert "the context holds" in rows(out)[0]["error"]["message"]


def template_model(folder: Path, template: str | None) -> Path:
    """A tiny model that is no DeepSeek-V4."""
    config = tiny_mla.tiny_config("v3", vocab_size=tiny_tokenizer().vocab_size)
    write_model(folder, config, tiny_mla.random_state(config))
    (folder / "tokenizer.json").write_text(json.dumps(tiny_description()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_a_model_without_chat_format_continues_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = template_model(tmp_path / "tiny", None)
    source = write(tmp_path / "in", [{"prompt": "a", "max_tokens": 2}])
    assert batch(source, tmp_path / "out", "-m", str(model)) == 4
    assert "has no chat template" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert batch(source, tmp_path / "out", "-m", str(model), "--raw") == 0
    assert rows(tmp_path / "out")[0]["response"]["body"]["usage"]["completion_tokens"] == 2


def test_messages_are_checked_by_the_template_that_will_write_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that DeepSeek-V4's encoder would take. Fails if the batch begins, and only the row says it."""
    model = template_model(tmp_path / "tiny", "{% if messages|length > 1 %}{{ 1 / 0 }}{% endif %}hello")
    lines = [{"messages": [{"role": "user", "content": "a"}] * size, "max_tokens": 2} for size in (1, 2)]
    source = write(tmp_path / "in", lines)
    assert batch(source, tmp_path / "out", "-m", str(model)) == 2
    assert (
        "line 2: " in (said := capsys.readouterr().err) and "its chat template fails" in said and "line 1" not in said
    )


def test_a_model_that_lines_name_chooses_nothing_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", [{"prompt": "a", "max_tokens": 2, "model": name} for name in ("gpt-4o", "b")])
    assert main(["batch", str(source), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("localmoe-mini answers all lines") == 1
    write(source, [{"prompt": "a", "max_tokens": 2, "model": "localmoe-mini"}])
    assert main(["batch", str(source), "-o", str(tmp_path / "other")]) == 0
    assert "answers all lines" not in capsys.readouterr().err


def test_an_output_of_other_input_is_refused(tmp_path: Path) -> None:
    """Fails if replies to other questions are kept as answers, or thrown away."""
    source, out = write(tmp_path / "in", [{"prompt": "a", "max_tokens": 3}]), tmp_path / "out"
    assert batch(source, out) == 0
    before = out.read_bytes()
    write(source, [{"prompt": "b", "max_tokens": 3}])
    assert batch(source, out) == 2
    assert batch(source, out, "--restart") == 0
    assert (tmp_path / "out.old").read_bytes() == before != out.read_bytes()


# One process after another, forked from one that has imported all: each dies at its n-th step or write, which may be
# torn. Says how many were killed.
KILLED = """
import os, signal, sys
from localmoe import LLM
from localmoe.cli import batch
from localmoe.cli.main import main
from localmoe.batch import input, output, run
from localmoe.engine import Engine
left = [0]
def dying(real, torn=False):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            if torn:
                real(args[0], args[1][:40], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
Engine.advance = dying(Engine.advance)
os.pwrite, os.fsync, os.replace = dying(os.pwrite, True), dying(os.fsync), dying(os.replace)
killed = 0
for point in sys.argv[1].split(","):
    left[0] = int(point)
    if (child := os.fork()) == 0:
        os._exit(main(sys.argv[2:]))
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print(killed)
"""


def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    """One output, 20 processes. Fails if an id is lost or there twice, or a reply is another."""
    source = write(tmp_path / "in", REQUESTS)
    assert batch(source, tmp_path / "whole") == 0
    out = tmp_path / "out"
    draw = random.Random(0)
    points = ",".join(str(draw.randint(2, 16)) for _ in range(20))
    command = [sys.executable, "-c", KILLED, points, "batch", str(source), "-o", str(out), "--deterministic"]
    killed = subprocess.run([*command, "--batch-size", "3", "-q"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(killed.stdout) >= 10, killed.stderr
    assert batch(source, out, "--batch-size", "2") == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
