"""What the compiled kernels were built from. Used by setup.py too, so it imports nothing but the standard library."""

from __future__ import annotations

import hashlib
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"


def source_digest(folder: Path = SOURCES) -> str:
    """Identifies the C++ sources by their names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cpp", ".h", ".inc"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
