"""The library as a whole: threads, forks, callers at the same time, and which file is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

from localmoe.kernels import digest, native
from tests.loops import noise
from tests.native_kernels import ISAS, bound, library, needs_native, using

WEIGHT, X = noise(700, 512), noise(3, 512, seed=1)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_any_number_of_threads_gives_the_same_product(threads: int) -> None:
    """Fails if a piece is left out or done twice, or more threads than cores wait for each other."""
    expected = library().linear(X, bound(WEIGHT))
    with using(threads=threads) as lib:
        assert lib.threads == threads
        for _ in range(50):
            assert torch.equal(lib.linear(X, bound(WEIGHT)), expected)


@needs_native
@pytest.mark.parametrize("count", [0, -1, 257])
def test_a_number_of_threads_out_of_range_is_refused(count: int) -> None:
    before = library().threads
    with pytest.raises(ValueError, match="threads"):
        library().set_threads(count)
    assert library().threads == before


@needs_native
def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="portable"):
        library().use_isa("avx9")
    assert library().isa in ISAS


@needs_native
def test_callers_at_the_same_time_do_not_meet() -> None:
    """Fails if two calls share the pool's job or its memory."""
    weights = [noise(300 + i, 256, seed=i) for i in range(4)]
    x = noise(2, 256)
    expected = [library().linear(x, bound(w)) for w in weights]
    wrong = []

    def call(i: int) -> None:
        for _ in range(100):
            if not torch.equal(library().linear(x, bound(weights[i])), expected[i]):
                wrong.append(i)

    with using(threads=2):
        callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not wrong


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    """Fails by hanging: threads do not survive a fork. In a process of its own, because forking pytest is unwise."""
    code = (
        "import os, torch\n"
        "from localmoe.kernels import native\n"
        "lib = native.load()\n"
        "lib.set_threads(2)\n"
        "w = native.plain_matrix(torch.ones(2000, 512))\n"
        "x = torch.ones(1, 512)\n"
        "lib.linear(x, w)\n"
        "child = os.fork()\n"
        "ok = bool((lib.linear(x, w) == 512).all()) and lib.threads == 2\n"
        "if child == 0: os._exit(0 if ok else 1)\n"
        "assert ok and os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[1])


@needs_native
def test_reading_sums_every_byte_once() -> None:
    """Fails if the measure of memory speed skips or repeats memory."""
    data = torch.randint(0, 255, (3 * (1 << 20) + 77,), dtype=torch.uint8)
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    with using("portable", 3) as lib:
        total = lib.read(data)
    # Whole groups are added as 64-bit words, the last bytes of each piece as bytes.
    assert total != 0
    with using("portable", 1) as lib:
        assert lib.read(data) == total
    changed = data.clone()
    changed[2 * (1 << 20) + 5] ^= 1
    with using("portable", 2) as lib:
        assert lib.read(changed) != total
    assert words.numel()


@needs_native
def test_a_library_older_than_its_sources_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a checkout would test what was compiled from other code."""
    monkeypatch.setattr(native, "source_digest", lambda: "another")
    assert "older than its sources" in str(native.load.__wrapped__())


def test_a_file_that_is_no_library_of_ours_is_not_loaded(tmp_path: Path) -> None:
    """Fails if any shared object of that name is called."""
    path = tmp_path / "_cpu.so"
    path.write_bytes(b"not a library")
    with pytest.raises(OSError):
        native.Library(path)
    other = next(Path(sysconfig.get_path("platstdlib")).glob("lib-dynload/_json*.so"), None)
    if other is not None:
        shutil.copy(other, path)
        with pytest.raises(OSError, match="not localmoe's kernel library"):
            native.Library(path)


def test_without_a_library_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_HERE", tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "not built" in str(native.load.__wrapped__())


def test_the_digest_sees_names_and_contents(tmp_path: Path) -> None:
    """Fails if an edited or renamed source would pass for the one that was compiled."""
    (tmp_path / "a.cpp").write_text("x")
    first = digest.source_digest(tmp_path)
    (tmp_path / "a.cpp").write_text("y")
    second = digest.source_digest(tmp_path)
    (tmp_path / "a.cpp").rename(tmp_path / "b.cpp")
    third = digest.source_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("no source")
    assert len({first, second, third}) == 3
    assert digest.source_digest(tmp_path) == third


@needs_native
def test_torchs_default_dtype_changes_nothing() -> None:
    """Fails if an output is allocated in it: the library would write beyond half-sized memory."""
    expected = library().linear(X, bound(WEIGHT))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = library().linear(X, bound(WEIGHT))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


@needs_native
def test_tensors_that_do_not_fit_are_refused() -> None:
    """Fails if the library is given a pointer to less than it will read or write."""
    lib, site_free = library(), torch.zeros(2, 3, 8)
    cos, codes = torch.ones(2, 4), torch.zeros(1, 32, dtype=torch.uint8)
    calls = [
        lambda: lib.linear(X.double(), bound(WEIGHT)),
        lambda: lib.linear(X[:, :-1], bound(WEIGHT)),
        lambda: lib.norm_rope(site_free, cos[:1], cos[:1]),
        lambda: lib.norm_rope(site_free, cos, cos, weight=torch.ones(7), eps=0.1),
        lambda: lib.attend(X, X[:, :-1], X, None, torch.ones(3)),
        lambda: lib.attend(X, X, X, torch.ones(2), torch.ones(3)),
        lambda: lib.attend(X, X, X, None, torch.ones(2)),
        lambda: lib.rms_norm(X, torch.ones(7), 0.1),
        lambda: lib.latent_attend(X, X[:, :-1], width=4, scale=1.0),
        lambda: lib.hyper_leave(site_free, torch.zeros(2, 8), torch.zeros(2, 3), torch.zeros(2, 3, 2)),
        lambda: native.matrix("fp4", (4, 64), torch.zeros(4, 31, dtype=torch.uint8), torch.zeros(4, 2), group=32),
        lambda: native.matrix("int8", (4, 64), torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 1), group=32),
        lambda: native.plain_matrix(torch.zeros(8, 8)[:, ::2]),
        lambda: native.matrix("fp4", (1, 64), codes, torch.zeros(1, 2, dtype=torch.uint8), zero=codes, group=32),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected"):
            call()


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space")
def test_threads_the_system_refuses_are_an_error_and_not_an_abort() -> None:
    """Fails with a signal if the threads that were made are left behind."""
    code = (
        "import resource, os\n"
        "from localmoe.kernels import native\n"
        "lib = native.load()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)\n"
        "try: lib.set_threads(200)\n"
        "except ValueError: print('refused', lib.threads)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("refused"), done.stderr[-500:]
