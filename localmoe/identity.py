"""Which model a saved session belongs to, as facts that can be compared one by one to say what differs.

Reads config.json, tokenizer.json and the headers of the weights, not the weights: a few MB, whatever the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from localmoe.errors import CheckpointError, ModelError
from localmoe.files import MIB, open_regular, pread_into, read_bytes, shown
from localmoe.safetensors_io import MAX_HEADER
from localmoe.snapshot import VERSION
from localmoe.tokenizer import MAX_TOKENIZER_BYTES

_FILES = {"config": ("config.json", 16 * MIB), "tokenizer": ("tokenizer.json", MAX_TOKENIZER_BYTES)}
# What is said of a saved session when its fact differs from the model's; the first that differs is told.
_REASONS = {
    "format": "it was saved in format {0}, this localmoe has format {1}",
    "config": "it belongs to a model with another config.json",
    "tokenizer": "it belongs to a model with another tokenizer.json",
    "template": "it belongs to a model with another chat template",
    "weights": "it belongs to a model with other weights",
    "dtype": "it was computed in {0}, this model runs in {1}",
    "kv_format": "its KV cache is {0}, this model's is {1}",
}


def identity(path: Path, dtype: torch.dtype, *, quantize_kv: bool, template: str | None) -> dict[str, str]:
    """The facts of a model directory and how it is run. template: the model's own chat template, if it renders prompts.

    Raises ModelError if a file cannot be read."""
    facts = {"format": str(VERSION), "dtype": str(dtype).removeprefix("torch.")}
    facts["kv_format"] = "fp8" if quantize_kv else "full"
    for fact, (name, limit) in _FILES.items():
        facts[fact] = hashlib.sha256(read_bytes(path / name, limit, ModelError)).hexdigest()
    if template is not None:
        facts["template"] = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
    headers = hashlib.sha256()
    for shard in sorted(path.glob("*.safetensors")):
        headers.update(_header_digest(shard))
    return facts | {"weights": headers.hexdigest()}


def difference(saved: Mapping[str, Any], model: Mapping[str, str]) -> str | None:
    """Why a session saved with these facts cannot go on with this model, as half a sentence; None if it can."""
    for fact, reason in _REASONS.items():
        if saved.get(fact) != model.get(fact):
            return reason.format(shown(saved.get(fact)), shown(model.get(fact)))
    return None


def _header_digest(shard: Path) -> bytes:
    """Of a shard's name, size and header."""
    fd, size = open_regular(shard, CheckpointError)
    try:
        prefix = bytearray(8)
        pread_into(fd, memoryview(prefix), 0, shown(shard), CheckpointError)
        header = bytearray(min(int.from_bytes(prefix, "little"), MAX_HEADER, size - 8))
        pread_into(fd, memoryview(header), 8, shown(shard), CheckpointError)
    finally:
        os.close(fd)
    return hashlib.sha256(f"{shard.name}\0{size}\0".encode() + header).digest()
