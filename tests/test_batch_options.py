"""The options of localmoe batch: which lines are answered, which rows are kept, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.batch_files import batch, rows, write

GOOD = {"prompt": "a", "max_tokens": 2, "temperature": 0}
pytestmark = pytest.mark.usefixtures("one_load")


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report").read_text())  # type: ignore[no-any-return]


BAD = [
    '{"prompt": "a"\n',
    {"custom_id": "mine", "prompt": "a", "logit_bias": {}},
    {"custom_id": "1", "prompt": "a"},
    {"custom_id": "line 5", "prompt": "a"},
    {"custom_id": "mine", "prompt": "a", "max_tokens": -1},
    {"custom_id": "\ud83d", "prompt": "a"},
    {"custom_id": 7, "prompt": "a"},
    {"custom_id": "nobody", "messages": [{"role": "nobody", "content": "a"}]},
]


def test_bad_lines_become_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a line has no row or two, if a good one is not answered, or if going on makes other rows."""
    source, out = write(tmp_path / "in", [GOOD, *BAD, GOOD]), tmp_path / "out"
    assert batch(source, out) == 2 and not out.exists()
    assert "7 bad lines" in capsys.readouterr().err
    assert batch(source, out, "--skip-invalid", "--report", str(tmp_path / "report")) == 3
    first = rows(out)
    assert [row["response"]["status_code"] for row in first] == [200, 400, 400, 400, 200, 400, 400, 400, 400, 200]
    assert [row["custom_id"] for row in first] == [
        "1",
        "2",
        "mine",
        "line 4",
        "line 5",
        "line 6",
        "7",
        "8",
        "nobody",
        "10",
    ]
    assert "is there already" in first[3]["error"]["message"]
    assert {name: report(tmp_path)[name] for name in ("done", "failed", "skipped")} == {
        "done": 10, "failed": 7, "skipped": 0
    }  # fmt: skip
    before = out.read_bytes()
    assert batch(source, out, "--skip-invalid", "--report", str(tmp_path / "report")) == 3
    assert report(tmp_path)["skipped"] == 10 and out.read_bytes() == before
    assert batch(source, out, "--skip-invalid", "--retry-errors") == 3
    assert out.read_bytes() == before


def test_unknown_fields_are_passed_over_if_asked(tmp_path: Path) -> None:
    """Fails if one that is known is passed over too."""
    body = {"body": GOOD | {"user": "me"}, "metadata": {}}
    source, out = write(tmp_path / "in", [body, GOOD | {"best_of": 3}]), tmp_path / "out"
    assert batch(source, out) == 2
    assert batch(source, out, "--ignore-unknown") == 0
    write(source, [GOOD | {"stream": True}])
    assert batch(source, out, "--restart", "--ignore-unknown") == 2


def test_changed_input_keeps_what_is_asked_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a reply is kept for another question, or an equal one is asked again."""
    source, out = write(tmp_path / "in", [GOOD, GOOD, GOOD]), tmp_path / "out"
    assert batch(source, out) == 0
    before = out.read_text().splitlines()
    write(source, [GOOD | {"prompt": "b"}, GOOD, GOOD | {"custom_id": "new"}])
    assert batch(source, out) == 2 and "--allow-changed-input" in capsys.readouterr().err
    assert batch(source, out, "--allow-changed-input", "--seed", "5") == 2
    assert "another seed" in capsys.readouterr().err
    assert batch(source, out, "--allow-changed-input", "--report", str(tmp_path / "report")) == 0
    assert (report(tmp_path)["done"], report(tmp_path)["skipped"]) == (2, 1)
    after = out.read_text().splitlines()
    assert [row["custom_id"] for row in rows(out)] == ["1", "2", "new", "3"]
    assert after[0] != before[0] and [after[1], after[3]] == before[1:]
    assert batch(source, out) == 0


def test_failures_are_kept_apart(tmp_path: Path) -> None:
    """Fails if a row is in both files or in none, or if what failed is tried again unasked."""
    source, out, errors = tmp_path / "in", tmp_path / "out", tmp_path / "errors"
    write(source, [GOOD, GOOD | {"max_tokens": 9999}, GOOD])
    assert batch(source, out) == 3
    assert batch(source, out, "--errors", str(errors)) == 3
    assert [row["custom_id"] for row in rows(out)] == ["1", "3"]
    assert [row["custom_id"] for row in rows(errors)] == ["2"]
    more = ("--errors", str(errors), "--report", str(tmp_path / "report"))
    assert batch(source, out, *more) == 3 and report(tmp_path)["skipped"] == 3
    assert batch(source, out, *more, "--retry-errors") == 3
    assert report(tmp_path)["skipped"] == 2 and len(rows(errors)) == 1
    write(source, [GOOD, GOOD, GOOD])
    assert batch(source, out, *more, "--allow-changed-input", "--no-sort") == 0
    assert [row["custom_id"] for row in rows(out)] == ["1", "3", "2"] and len(rows(errors)) == 1
    assert batch(source, out, *more) == 0 and report(tmp_path)["done"] == 0
    assert [row["custom_id"] for row in rows(out)] == ["1", "2", "3"] and not errors.read_bytes()
    assert batch(source, out, *more, "--restart") == 0
    assert (tmp_path / "errors.old").exists()


def test_a_file_of_errors_that_is_anothers_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", [GOOD])
    errors = write(tmp_path / "errors", ["something dear\n"])
    assert batch(source, tmp_path / "out", "--errors", str(errors)) == 2
    assert "was not made by this batch" in capsys.readouterr().err
    assert errors.read_text() == "something dear\n" and not (tmp_path / "out").exists()


def test_one_file_has_one_purpose(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", [GOOD]), tmp_path / "out"
    before = source.read_bytes()
    assert batch(source, source) == batch(source, out, "--errors", str(out)) == 2
    assert batch(source, out, "--errors", str(source)) == 2
    assert source.read_bytes() == before and not out.exists()


def test_order_of_completion_is_kept_if_asked(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", [GOOD | {"max_tokens": 9}, GOOD]), tmp_path / "out"
    assert batch(source, out, "--no-sort") == 0
    assert [row["custom_id"] for row in rows(out)] == ["2", "1"]
    assert batch(source, out) == 0
    assert [row["custom_id"] for row in rows(out)] == ["1", "2"]


def test_a_dry_run_counts_the_tokens_that_a_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if prompts are counted otherwise than they are read: with their format, BOS, and once for all replies."""
    lines = [
        {"prompt": "Tell me about owls.", "max_tokens": 3, "n": 2},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And foxes?"}]},
        {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 2}},
        {"custom_id": "d", "url": "/v1/completions", "body": {"prompt": [5, 6, 7], "max_tokens": 2}},
    ]
    source, out = write(tmp_path / "in", lines), tmp_path / "out"
    assert batch(source, out, "--dry-run") == 0
    counted = capsys.readouterr().out.splitlines()[1]
    assert batch(source, out, "-n", "4") == 0
    used = sum(row["response"]["body"]["usage"]["prompt_tokens"] for row in rows(out))
    assert counted == (
        f"{used} tokens of prompts, at most 10 of replies, 1 replies without max_tokens, which only the context ends"
    )


def test_a_dry_run_loads_and_writes_nothing(
    tmp_path: Path, fake_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if lines that are bad, or are not chosen, are counted among those that would be answered."""
    source, out = write(tmp_path / "in", [GOOD, *BAD, GOOD]), tmp_path / "out"
    assert batch(source, out, "--dry-run") == 2
    assert batch(source, out, "--dry-run", "--skip-invalid", "--limit", "5") == 0
    assert capsys.readouterr().out.splitlines()[0] == "3 requests are well-formed, 2 of them chosen"
    assert not fake_model.made and not out.exists()


def test_no_device_with_deterministic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the promise of the same bytes is given where it does not hold."""
    source, out = write(tmp_path / "in", [GOOD]), tmp_path / "out"
    assert batch(source, out, "--deterministic", "--device", "cuda") == 2 and not out.exists()
    assert "--deterministic holds on the CPU only" in capsys.readouterr().err
