"""A pack holds the same experts as the shards, survives being killed, and is refused when it is not whole."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from localmoe.cli.main import main
from localmoe.engine import Engine
from localmoe.errors import CheckpointError, UsageError
from localmoe.experts.pack import open_pack, verify
from localmoe.experts.paging import Paging
from localmoe.pager import open_model
from tests.test_paged_experts import CHOICES, CONFIG, STATE, logits, opened, paged
from tests.tiny_v4 import random_state, write_published


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("model"), CONFIG, STATE, shards=3)


def packed(model: Path, *folders: Path) -> int:
    return main(["pack", str(model), *(part for folder in folders for part in ("-o", str(folder)))])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.lmpack"))}


@pytest.mark.parametrize("stripes", [1, 2])
def test_a_pack_gives_the_bits_of_the_shards(model: Path, tmp_path: Path, stripes: int) -> None:
    """Fails if a record is laid out otherwise than it is read, or lies in another stripe."""
    folders = [tmp_path / f"disk{i}" for i in range(stripes)]
    assert packed(model, *folders) == 0
    for kernels in CHOICES:
        engine = opened(model, Paging(slots=5, pack=folders[0]), kernels)
        assert torch.equal(logits(engine), logits(opened(model, Paging(), kernels))), kernels
        paged(engine).close()
    verify(open_pack(folders[0]))


def test_packing_goes_on_after_kill(model: Path, tmp_path: Path) -> None:
    """Fails if a kill leaves a pack that is taken for whole, or the next run gives other bytes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert packed(model, whole) == 0
    script = (
        "import os, signal, sys\n"
        "real, left = os.pwrite, [int(sys.argv[3])]\n"
        "def write_at(fd, data, offset):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(fd, data, offset)\n"
        "os.pwrite = write_at\n"
        "from localmoe.cli.main import main\n"
        "sys.exit(main(['pack', sys.argv[1], '-o', sys.argv[2]]))\n"
    )
    for writes in (0, 7, 50):
        command = [sys.executable, "-c", script, str(model), str(broken), str(writes)]
        run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, check=False)
        assert run.returncode == -signal.SIGKILL, run.stderr
        with pytest.raises(CheckpointError):
            open_pack(broken)
    assert packed(model, broken) == 0
    assert contents(broken) == contents(whole)
    verify(open_pack(broken))


def test_a_pack_that_is_cut_short_is_refused(model: Path, tmp_path: Path) -> None:
    """Fails if what is missing is read as zeros."""
    assert packed(model, tmp_path) == 0
    (file,) = tmp_path.glob("*.lmpack")
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match=r"\.lmpack: is \d+ bytes"):
        open_pack(tmp_path)


def test_one_flipped_bit_is_found(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if --verify reads something else than the file."""
    assert packed(model, tmp_path) == 0
    (file,) = tmp_path.glob("*.lmpack")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layer 3"):
        verify(open_pack(tmp_path))
    assert main(["pack", str(model), "-o", str(tmp_path), "--verify"]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_a_pack_of_other_weights_is_refused(model: Path, tmp_path: Path) -> None:
    """Fails if a fine-tune of the same shape is computed with another's experts."""
    other = write_published(tmp_path / "other", CONFIG, random_state(CONFIG, seed=1), shards=3)
    assert packed(model, tmp_path / "pack") == 0
    with pytest.raises((CheckpointError, UsageError), match=r"other weights|another model"):
        Engine(open_model(other, "tiny", Paging(slots=5, pack=tmp_path / "pack"), dtype=torch.float32))
    assert packed(other, tmp_path / "pack") == 2


def test_a_second_writer_is_turned_away_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if two processes write one file, or the second waits."""
    with pytest.MonkeyPatch.context() as patch:
        real = fcntl.flock

        def taken(fd: int, operation: int) -> None:
            raise BlockingIOError(11, "held")

        patch.setattr(fcntl, "flock", taken)
        started = time.monotonic()
        assert packed(model, tmp_path) != 0
        assert time.monotonic() - started < 5
        assert real is not fcntl.flock
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.glob("*.lmpack"))
    assert packed(model, tmp_path) == 0


def test_a_full_disk_leaves_nothing_with_a_final_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if half a pack looks whole, or the next run cannot go on."""
    from localmoe.experts import pack_writer

    real, calls = pack_writer.os.pwrite, [0]

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls[0] += 1
        if calls[0] == 9:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(pack_writer.os, "pwrite", pwrite)
    assert packed(model, tmp_path) == 5
    assert not list(tmp_path.glob("*.lmpack"))
    assert not (tmp_path / "pack.json").exists()
    assert packed(model, tmp_path) == 0
    verify(open_pack(tmp_path))
