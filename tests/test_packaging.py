"""What a wheel holds, and that the command it installs starts quickly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from localmoe.kernels import native
from localmoe.kernels.digest import source_digest
from tests.test_floors import MODULES

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "localmoe" / "mini" / "weights"
# numpy and tokenizers are what torch's absence alone would not show.
HEAVY = {"torch", "numpy", "tokenizers", "deepseek_recipe", "transformers"}
MAX_EMBEDDED_BYTES = 25_000_000


def build(folder: Path, *, compiler: str = "") -> zipfile.ZipFile:
    """A wheel built in `folder` from a copy, so that nothing is left in the checkout, and without the network."""
    for name in ("localmoe", "kernels", "quantize", "cli"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    code = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    chosen = {"CC": compiler, "CXX": compiler} if compiler else {}
    done = subprocess.run(
        [sys.executable, "-c", code, "out"],
        cwd=folder,
        env=os.environ | chosen,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next((folder / "out").glob("*.whl")))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build(tmp_path_factory.mktemp("wheel"))


def kernel_libraries(wheel: zipfile.ZipFile) -> list[str]:
    return [name for name in wheel.namelist() if name.startswith("localmoe/kernels/_cpu") and name.endswith(".so")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_wheel_carries_kernels_built_from_these_sources(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Fails if a source or flag is missing from the build: without kernels, everything is many times slower."""
    (name,) = kernel_libraries(wheel)
    library = native.Library(Path(wheel.extract(name, tmp_path)))
    assert library.source_digest == source_digest()
    assert "portable" in library.isas


def test_without_a_compiler_the_wheel_is_built_all_the_same(tmp_path: Path) -> None:
    """Fails if a missing compiler would keep a user from installing."""
    assert not kernel_libraries(build(tmp_path, compiler="/nowhere/c++"))


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    """Fails if a new folder is missing from `packages` in pyproject.toml."""
    names = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in wheel.namelist()}
    assert set(MODULES) <= names


def test_the_wheel_adds_one_name_to_the_top_level(wheel: zipfile.ZipFile) -> None:
    """Fails if kernels/ or cli/ would be installed beside localmoe, where they would shadow other packages."""
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"localmoe"}


def test_the_wheel_carries_licence_types_and_the_embedded_model(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "localmoe/py.typed" in names
    for path in EMBEDDED.iterdir():
        assert f"localmoe/mini/weights/{path.name}" in names


def test_the_embedded_model_stays_small() -> None:
    """It is part of every install."""
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= MAX_EMBEDDED_BYTES


def test_the_console_script_names_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["localmoe"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["chat", "-n", "0"]])
def test_what_needs_no_model_does_not_load_torch(arguments: list[str]) -> None:
    """Seconds on a slow machine. Judged by what is imported, because time depends on who else is busy."""
    code = f"import sys; from localmoe.cli.main import main; main({arguments!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "localmoe" in loaded
    assert not HEAVY & loaded


def test_help_imports_no_command() -> None:
    code = "import sys; from localmoe.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"localmoe.cli.run", "localmoe.cli.chat", "rich"} & set(done.stderr.split())
