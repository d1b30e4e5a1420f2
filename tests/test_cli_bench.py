"""`localmoe bench`: options, refusals, and what goes to stdout."""

from __future__ import annotations

import json
from typing import Any

import pytest

from localmoe.bench import synthetic
from localmoe.cli.bench_common import parse_names, parse_sizes
from localmoe.cli.main import main
from localmoe.errors import UsageError
from localmoe.kernels import native
from tests.tiny_bench import tiny

__all__ = ["tiny"]


def test_a_made_up_model_is_measured_end_to_end(tiny: str, capsys: Any) -> None:
    """Fails if anything but the rows would go to stdout, or a row lack what is needed to compare it later."""
    arguments = ["-p", "6", "-n", "2", "-d", "0,3", "-r", "2", "-o", "jsonl", "--kernels", "reference"]
    assert main(["bench", "--synthetic", tiny, "--layers", "3", "--experts", "2", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["test"] for row in rows] == ["pp6", "tg2", "pp6 @ d3", "tg2 @ d3"]
    for row in rows:
        assert row["model"] == "tiny synthetic, 3 layers, 2 experts"
        assert len(row["samples_tokens_per_s"]) == 2
        assert len(row["fingerprint"]) == 64
        for key in ("date", "localmoe", "torch", "isa", "threads", "cpu", "mode", "model_bytes"):
            assert row[key]


def test_the_embedded_model_is_measured_by_default(capsys: Any) -> None:
    """Fails if `localmoe bench` alone would need a command or a model."""
    assert main(["bench", "-p", "0", "-n", "1", "-r", "1", "--kernels", "reference"]) == 0
    header, _rule, row = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in header.split("|")][1:6] == ["model", "size", "kernels", "threads", "test"]
    assert "localmoe-mini" in row and "tg1" in row and "±" in row


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--layers", "2"], "--layers, --experts and --weights shape a made-up model; they need --synthetic"),
        (["--synthetic", "v4-flash", "--model", "x"], "--model and --synthetic name two models"),
        (["--synthetic", "v3", "--weights", "q2"], "--weights is q2, expected one of fp8_block, fp4, int8_g32"),
        (
            ["paging", "--synthetic", "v3", "--layers", "2"],
            "models of the shape of DeepSeek-V4 only, not of deepseek_v3",
        ),
        (["--synthetic", "v5"], "no shape is called 'v5', only v4-flash, v4-pro"),
        (["-p", "x"], "-p is 'x', expected whole numbers"),
        (["-n", "-1"], "-n is '-1', expected numbers from 0"),
        (["-p", "0", "-n", "0"], "there is nothing to measure"),
        (["-d", "4000"], "pp512 @ d4000 needs a context of 4512 tokens, the model has 4096"),
        (["--threads", "2", "--kernels", "reference"], "threads belong to the compiled kernels"),
        (["kernels", "--shapes", "v4-flash,v5"], "--shapes does not know 'v5', only v4-flash"),
        (["kernels", "--formats", "q2"], "--formats does not know 'q2', only fp4"),
        (["kernels", "--tokens", "0"], "--tokens is '0', expected numbers from 1"),
        (["kernel"], "No such command 'kernel'"),
        (["hardware", "--dir", "/nowhere"], "/nowhere is not a directory"),
        (["-r", "0"], "Invalid value for '--repetitions'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(arguments: list[str], problem: str, capsys: Any) -> None:
    """Fails if an option would be accepted without effect."""
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert problem in err and err.count("\n") == 1


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(synthetic, "available_memory", lambda: 1 << 30)
    assert main(["bench", "--synthetic", "v4-flash", "--layers", "43", "--experts", "256"]) == 5
    err = capsys.readouterr().err
    assert "43 layers of v4-flash with 256 experts each need 1" in err and "1.0 GiB are available" in err


def test_a_missing_model_is_refused(capsys: Any) -> None:
    assert main(["bench", "--model", "/nowhere"]) == 4
    assert "/nowhere is neither a directory" in capsys.readouterr().err


def test_kernels_without_a_library_say_why(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Fails if torch would be measured under the name of the kernels."""
    monkeypatch.setattr(native, "load", lambda: "there is no compiler")
    assert main(["bench", "kernels"]) == 1
    assert capsys.readouterr() == ("", "localmoe: error: no compiled kernels: there is no compiler\n")


def test_the_default_command_keeps_its_own_help(capsys: Any) -> None:
    assert main(["bench", "--help"]) == 0
    assert "--synthetic" in capsys.readouterr().out
    assert main(["bench", "hardware", "--help"]) == 0
    assert "--disk-gib" in capsys.readouterr().out


def test_lists_keep_their_order_and_lose_repeats() -> None:
    assert parse_sizes("-p", "512,16,512") == [512, 16]
    assert parse_names("--formats", None, ("a", "b")) == ["a", "b"]
    assert parse_names("--formats", "b,a,b", ("a", "b")) == ["b", "a"]
    with pytest.raises(UsageError):
        parse_names("--formats", "", ("a", "b"))
