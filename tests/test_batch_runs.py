"""Runs of localmoe batch that are cut short, shared or refused, and what the next one makes of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localmoe import LLM, SamplingParams
from localmoe.batch.output import Output, pace_of
from localmoe.batch.run import Counts
from localmoe.cli import render
from localmoe.cli.batch_report import shower
from localmoe.cli.endings import HUNG_UP, TERMINATED
from localmoe.cli.main import main
from tests.batch_files import batch, rows, write
from tests.terminal import Start

ROOT = Path(__file__).parents[1]
LINES: list[dict[str, Any]] = [{"prompt": f"Tell me about {i}.", "max_tokens": 3 + i % 4} for i in range(10)]
pytestmark = pytest.mark.usefixtures("one_load")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """What LINES come to, without any trouble."""
    assert batch(write(tmp_path / "in", LINES), tmp_path / "whole") == 0
    return tmp_path / "whole"


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a finished reply is lost or made again, or if the command that is shown begins anew."""
    out = tmp_path / "the out"
    write(out, ["of an earlier day"])
    real = Output.add

    def interrupted(self: Output, row: dict[str, Any]) -> None:
        real(self, row)
        if len(self.rows) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    more = ("--batch-size", "2", "--report", str(tmp_path / "report"))
    with monkeypatch.context() as patch:
        patch.setattr(Output, "add", interrupted)
        assert batch(tmp_path / "in", out, "--restart", *more) == 130
    assert 4 <= len(rows(out)) < len(LINES) and json.loads((tmp_path / "report").read_text())["interrupted"]
    done = out.read_bytes()
    said = capsys.readouterr().err
    (line,) = (line for line in said.splitlines() if line.startswith("resume with: "))
    program, *again = shlex.split(line.removeprefix("resume with: "))
    assert program == "localmoe" and "--restart" not in again
    assert main(again) == 0
    report = json.loads((tmp_path / "report").read_text())
    assert report["skipped"] == len(done.splitlines()) and report["skipped"] + report["done"] == len(LINES)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGHUP, HUNG_UP)])
def test_a_second_run_is_refused_and_a_signal_ends_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    """One process beside another. Fails if both write, or if what is done does not outlive the first."""
    lines = [line | {"max_tokens": 30} for line in LINES * 10]
    source, out = write(tmp_path / "in", lines), tmp_path / "out"
    command = [sys.executable, "-m", "localmoe.cli.main", "batch", source, "-o", out, "--batch-size", "1", "--no-sort"]
    with subprocess.Popen([*command, "--deterministic"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as first:
        while not (out.exists() and out.read_bytes().count(b"\n")):
            assert first.poll() is None, first.stderr.read() if first.stderr else ""
            time.sleep(0.01)
        assert batch(source, out) == 2
        assert f"out: is being written by process {first.pid}" in capsys.readouterr().err
        first.send_signal(number)
        said = first.communicate()[1]
    assert first.returncode == code and "Traceback" not in said and "resume with: localmoe batch " in said
    assert (pace_of(out) is None) == (not rows(out))
    done = rows(out)
    assert 0 < len(done) < len(lines)
    assert batch(source, out, "--no-sort", "--limit", str(len(done) + 1)) == 0
    assert rows(out)[: len(done)] == done and len(rows(out)) == len(done) + 1


def test_a_closed_terminal_ends_it_in_order(terminals: Start, tmp_path: Path) -> None:
    """Fails if what it still wants to say there keeps it from its report."""
    source, out = write(tmp_path / "in", [line | {"max_tokens": 30} for line in LINES * 20]), tmp_path / "out"
    command = ("batch", str(source), "-o", str(out), "--report", str(tmp_path / "report"), "--batch-size", "1")
    batch_ = terminals(*command, fake=None)
    batch_.expect("3 of 200 done")
    assert batch_.hang_up() == HUNG_UP
    assert json.loads((tmp_path / "report").read_text())["interrupted"] and 3 <= len(rows(out)) < 200


def test_shards_are_disjoint_and_make_the_whole(tmp_path: Path, whole: Path) -> None:
    """Also one row at a time. Fails if a request is in two shards or none, or is answered otherwise there."""
    shares = []
    for index in (1, 2, 3):
        out = tmp_path / f"out{index}"
        assert batch(tmp_path / "in", out, "--shard", f"{index}/3") == 0
        shares.append(out.read_text().splitlines())
    assert [len(share) for share in shares] == [4, 3, 3]
    assert sorted(line for share in shares for line in share) == sorted(whole.read_text().splitlines())
    assert batch(tmp_path / "in", tmp_path / "few", "--shard", "2/3", "--limit", "2") == 0
    assert [row["custom_id"] for row in rows(tmp_path / "few")] == ["2", "5"]
    assert batch(tmp_path / "in", tmp_path / "few", "--limit", "3") == 0
    assert [row["custom_id"] for row in rows(tmp_path / "few")] == ["1", "2", "3", "5"]


@pytest.mark.parametrize("given", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_shard_that_there_is_not_is_refused(tmp_path: Path, given: str) -> None:
    source = write(tmp_path / "in", LINES)
    assert batch(source, tmp_path / "out", f"--shard={given}") == 2 and not (tmp_path / "out").exists()


def test_report(tmp_path: Path, whole: Path) -> None:
    """Fails if it is not what the rows say, or not strict JSON when nothing was left to do."""
    report, out = tmp_path / "report", tmp_path / "out"
    for done in (3, 7, 0):
        assert batch(tmp_path / "in", out, "--report", str(report), *(["--limit", "3"] if done == 3 else [])) == 0
        found = json.loads(report.read_text(), parse_constant=pytest.fail)
        assert (found["done"], found["skipped"], found["failed"]) == (done, found["requests"] - done, 0)
        assert (found["latency_p50"] is None) == (done == 0)
        assert done == 0 or 0 < found["latency_p50"] <= found["latency_p95"]
        # Every expert of the embedded model is in memory.
        assert found["disk_bytes"] is found["expert_hit_rate"] is None
        assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 1 << 27
        usage = [row["response"]["body"]["usage"] for row in rows(out)]
        if done == 3:
            assert found["generated_tokens"] == sum(one["completion_tokens"] for one in usage)
            assert found["prompt_tokens"] == sum(one["prompt_tokens"] for one in usage)


@pytest.mark.parametrize("given", [[], ["--deterministic"]])
def test_what_prompts_begin_with_in_common_is_read_once(tmp_path: Path, given: list[str]) -> None:
    """Fails if it is read for every request; or if a deterministic reply would depend on who has read before it."""
    text = "You are a careful teller of tales. " * 10
    source = write(tmp_path / "in", [{"messages": [{"role": "system", "content": text}, *asked(i)]} for i in range(4)])
    report = tmp_path / "report"
    arguments = ["-o", str(tmp_path / "out"), "--report", str(report), "-n", "3", "-q", *given]
    assert main(["batch", str(source), *arguments]) == 0
    found = json.loads(report.read_text())
    assert found["done"] == 4
    assert (found["reused_tokens"] > 3 / 5 * found["prompt_tokens"]) == (not given)
    assert (found["reused_tokens"] == 0) == bool(given)


def asked(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me about {i}."}]


def test_a_log_gets_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a run of days leaves nothing in a log, or a line for each request."""
    for quiet, lines in ((False, 2), (True, 0)):
        console = render.open_console()
        show = shower(console, render.Waiting(console, "", quiet=quiet), 9, quiet=quiet)
        for done, seconds in enumerate((1.0, 59.0, 61.0, 62.0, 120.0, 122.0), 1):
            show(Counts(done=done, generated_tokens=100, seconds=seconds))
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
        assert not lines or said[1].startswith("6 of 9 done, 0.8 tok/s, ")


def test_a_torn_tail_is_done_again(tmp_path: Path, whole: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    assert batch(source, out, "--limit", "4") == 0
    content = out.read_bytes()
    for torn in (content[:-20], content[:-1], content + b"\0" * 5000, content + b'{"custom_id": "9", "resp'):
        out.write_bytes(torn)
        assert batch(source, out, "--limit", "4") == 0
        assert out.read_bytes() == content


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full in the middle of a row, and while rows are sorted. Fails if the next run does not go on from there."""
    out, source = tmp_path / "out", tmp_path / "in"
    row = len(whole.read_bytes()) // len(LINES)
    with largest_file(5 * row + row // 2):
        assert batch(source, out) == 5
    assert "the disk is full" in capsys.readouterr().err
    assert len(out.read_bytes().splitlines()) == 6 and not out.read_bytes().endswith(b"\n")
    assert batch(source, out, "--no-sort", "--report", str(tmp_path / "report")) == 0
    assert json.loads((tmp_path / "report").read_text())["skipped"] == 5
    unsorted = out.read_bytes()
    with largest_file(8 * row):
        assert batch(source, out) == 5
    assert out.read_bytes() == unsorted
    assert batch(source, out) == 0 and out.read_bytes() == whole.read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_plain_text_from_stdin_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict_mini: LLM) -> None:
    """--text, --raw and -. Fails if a prompt is put into the chat format, or taken for JSON."""
    prompts = ["Once upon a time", '{"prompt": "a"}']
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(prompts).encode())))
    assert batch(Path("-"), tmp_path / "out", "--text", "--raw", "-n", "3", "--temp", "0") == 0
    found = [row["response"]["body"] for row in rows(tmp_path / "out")]
    expected = strict_mini.generate(prompts, SamplingParams(max_tokens=3, temperature=0))
    assert [body["choices"][0]["text"] for body in found] == [completion.text for completion in expected]
    assert [body["usage"]["prompt_tokens"] for body in found] == [completion.prompt_tokens for completion in expected]


@pytest.mark.parametrize("kind", ["folder", "link", "foreign", "no folder"])
def test_an_output_that_is_no_output_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    source, out = write(tmp_path / "in", LINES), tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "link":
        out.symlink_to(write(tmp_path / "dear", ["dear\n"]))
    elif kind == "foreign":
        write(out, ["dear\n"])
    else:
        out = tmp_path / "none" / "out"
    assert batch(source, out) == 2
    assert not out.is_file() or out.read_text() == "dear\n"
