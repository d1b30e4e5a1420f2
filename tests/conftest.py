"""What tests of several files need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data(relative: str) -> Path:
    """A file or folder of the shared test data; the test, or the whole module, is skipped where it is absent.

    The data lies beside the checkout in shared/data, or where LOCALMOE_TEST_DATA says."""
    beside = Path(__file__).parents[1] / ".." / "shared" / "data"
    path = Path(os.environ.get("LOCALMOE_TEST_DATA", beside)) / relative
    if not path.exists():
        pytest.skip(f"needs {relative} of the shared test data (LOCALMOE_TEST_DATA)", allow_module_level=True)
    return path


@pytest.fixture(autouse=True)
def library_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty model library and no settings, in every process of a test: never those of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("library")
    monkeypatch.setenv("LOCALMOE_MODELS", str(folder))
    monkeypatch.setenv("LOCALMOE_CONFIG", str(tmp_path_factory.mktemp("config") / "config.toml"))
    return folder
