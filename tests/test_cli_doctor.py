"""`localmoe doctor`: what is found, what is broken, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe import library as models
from localmoe.cli.main import main
from localmoe.kernels import native
from tests.native_kernels import ISAS, library, needs_native, using


@needs_native
def test_a_sound_installation(capsys: Any) -> None:
    """Fails if a user could not see that the fast path is used."""
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = {line[:12].strip(): line[13:] for line in out.splitlines() if line[:12].strip()}
    assert list(lines) == ["localmoe", "kernels", "processor", "RAM", "GPU", "disk", "state"]
    assert lines["kernels"].startswith(f"native, {library().isa}, ") and lines["state"] == "sound"
    assert str(library().path) in out


@needs_native
def test_json_holds_every_finding(capsys: Any) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert found["kernels"]["isas"] == ISAS
    assert found["kernels"]["threads"] >= 1
    assert found["ram_available"] > 0 and found["hub_cache_free"] > 0 and found["cores"] >= 1
    assert found["problems"] == []


def test_without_a_library_the_reason_is_said_and_nothing_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Fails if a machine without a compiler would look broken, or fast."""
    monkeypatch.setattr(native, "load", lambda: "there is no compiler")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "reference (torch)" in out and "no compiled kernels: there is no compiler" in out


@needs_native
def test_kernels_that_multiply_wrongly_are_found(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Fails if a miscompiled library would be called sound; every instruction set is tried, the first stays chosen."""
    linear = native.Library.linear
    with using() as lib:
        used = lib.isa
        monkeypatch.setattr(
            native.Library, "linear", lambda self, *a, **k: linear(self, *a, **k) * (2 if self.isa == ISAS[-1] else 1)
        )
        assert main(["doctor"]) == 1
        assert lib.isa == used
    out, err = capsys.readouterr()
    assert "broken" in out
    assert err == f"localmoe: error: the {ISAS[-1]} kernels multiply wrongly; reinstall localmoe\n"


def test_a_lost_embedded_model_is_found(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    assert main(["doctor"]) == 1
    assert "lacks the embedded model" in capsys.readouterr().err
