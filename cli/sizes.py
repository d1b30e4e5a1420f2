"""Sizes as people type them: 12GB, 12GiB, 800M, 0. Knows nothing of what they measure."""

from __future__ import annotations

import re

from localmoe.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:([KMGT])(I?)B?|B)?", re.ASCII | re.IGNORECASE)
_POWER = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Bytes of a size: K, M, G and T count in thousands, Ki, Mi, Gi and Ti in 1024s; a plain number is bytes.

    The B and the case of letters do not matter. Raises UsageError for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is not a size, expected one such as 32GB, 32GiB, 800M or 0")
    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    return round(float(number) * base ** _POWER[prefix.upper()]) if prefix else round(float(number))
