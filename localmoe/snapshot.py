"""A session as bytes: a JSON head, raw tensors and a digest over both. Nothing in it can run.

Knows tensors and plain facts; does not know what they mean. Memory: one copy of the tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from localmoe.errors import CheckpointError
from localmoe.files import parse_json
from localmoe.safetensors_io import byte_view

MAGIC = b"localmoe session 1\n"
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
_DIGEST = 32


def pack(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """facts: JSON values; tensors: float32 or bf16, any layout."""
    index = [[name, str(t.dtype), list(t.shape)] for name, t in tensors.items()]
    head = json.dumps({"facts": dict(facts), "tensors": index}).encode()
    parts = [MAGIC, len(head).to_bytes(8, "little"), head]
    parts += [bytes(byte_view(t.contiguous())) for t in tensors.values()]
    body = b"".join(parts)
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What pack() was given. Raises CheckpointError unless every byte is as it was written."""
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
        raise CheckpointError("the saved session is damaged or not one of this version; start a new one")
    at = len(MAGIC) + 8
    end = at + int.from_bytes(body[len(MAGIC) : at], "little")
    head = parse_json(body[at:end], "saved session", CheckpointError)
    tensors = {}
    for name, dtype, shape in head["tensors"]:
        tensors[name] = torch.empty(shape, dtype=_DTYPES[dtype])
        view = byte_view(tensors[name])
        view[:] = body[end : end + len(view)]
        end += len(view)
    return head["facts"], tensors
