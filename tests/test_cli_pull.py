"""`localmoe pull`: what is said before anything comes, and that nothing comes when it must not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localmoe import pull as pull_module
from localmoe.cli.main import INTERRUPTED, main
from localmoe.errors import LocalMoeError, ResourceError, UsageError
from localmoe.hub import HuggingFace
from tests.fake_hub import COMMIT, FakeHub
from tests.tiny_v4 import random_state, tiny_config, write_published


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    config = tiny_config()
    hub = FakeHub(write_published(tmp_path / "source", config, random_state(config), quantized=False))
    monkeypatch.setattr("localmoe.cli.pull.open_hub", lambda: hub)
    return hub


def test_pull_then_list_and_show(hub: FakeHub, capsys: Any) -> None:
    assert main(["pull", "owner/tiny", "--as", "mine"]) == 0
    out, err = capsys.readouterr()
    assert out == "mine is complete: localmoe chat --model mine\n"
    assert err.startswith("owner/tiny at 0123456789ab: 4 files, 2.6 MiB\n")
    assert "file 4 of 4, model-00002-of-00002.safetensors" in err
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["mine", "f32"]
    assert main(["show", "mine"]) == 0
    assert f"from        owner/tiny, commit {COMMIT}" in capsys.readouterr().out


def test_dry_run_brings_nothing(hub: FakeHub, library_folder: Path) -> None:
    assert main(["pull", "owner/tiny", "--dry-run"]) == 0
    assert os.listdir(library_folder) == []


def test_a_full_disk_is_exit_code_5_after_the_sizes(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, library_folder: Path, capsys: Any
) -> None:
    monkeypatch.setattr(pull_module, "free_disk", lambda _: 0)
    assert main(["pull", "owner/tiny"]) == ResourceError.exit_code
    assert "4 files" in capsys.readouterr().err and os.listdir(library_folder) == []


def test_ctrl_c_says_that_it_goes_on(hub: FakeHub, capsys: Any) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    hub.before = stop
    assert main(["pull", "owner/tiny"]) == INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err


def test_hf_hub_offline_is_respected() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "localmoe.cli.main", "pull", "owner/tiny"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == UsageError.exit_code and done.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_without_huggingface_hub_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LocalMoeError, match="pip install huggingface_hub"):
        HuggingFace()


def test_an_error_of_the_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import huggingface_hub

    class Api:
        def model_info(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no \x1b[2J network\nand more")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["pull", "owner/tiny"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the same command goes on" in err and "\x1b" not in err
