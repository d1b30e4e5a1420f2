"""What is written beside the shards: copies, digests, the report, the index and, last, config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from localmoe.checkpoint import INDEX
from localmoe.config import load_config
from localmoe.errors import CheckpointError, ResourceError
from localmoe.files import MIB, read_bytes, shown, write_atomically
from localmoe.quantize import report
from localmoe.quantize.compressed import described
from localmoe.quantize.job import VERSION, Job
from localmoe.quantize.report import Measured

SIDECAR, REPORT = "localmoe-quantize.json", "localmoe-report"
MOST_JSON, _MOST_COPIED = 256 * MIB, 64 * MIB
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "LICENSE",
           "chat_template.jinja")  # fmt: skip


def finish(job: Job, done: dict[str, Any]) -> dict[str, Any]:
    """Everything beside the shards, config.json last. In the order of the source, whatever was done when."""
    done = {name: done[name] for name in job.shards}
    measured = [Measured(**one) for facts in done.values() for one in facts["measured"]]
    found = report.summary(measured, job.bytes_in, job.bytes_out)
    for name in _COPIED:
        if (job.source / name).is_file():
            write(job.out / name, read_bytes(job.source / name, _MOST_COPIED, CheckpointError))
    digests = {name: facts["tensors"] for name, facts in done.items()}
    sidecar = {
        "localmoe_quantize": VERSION,
        "source": job.source.name,
        "recipe": job.recipe.text,
        "fingerprint": job.fingerprint,
        "tensors": digests,
        "report": found,
    }
    write_json(job.out / SIDECAR, sidecar)
    write_json(job.out / f"{REPORT}.json", found)
    text = f"# {job.source.name}, quantized by localmoe\n\n{report.markdown(found)}\n```toml\n"
    write(job.out / f"{REPORT}.md", f"{text}{job.recipe.text}```\n".encode())
    if set(job.shards) != {"model.safetensors"}:
        weight_map = {name: shard for shard, tensors in digests.items() for name in tensors}
        write_json(job.out / INDEX, {"metadata": {"total_size": job.bytes_out}, "weight_map": weight_map})
    packed = {name: fmt for shard in job.shards.values() for name, (_source, fmt) in shard.packed.items()}
    write_json(job.out / "config.json", described(load_config(job.source), packed))
    return found


def write_json(path: Path, value: Any) -> None:
    """As write(), of what will be read back."""
    write(path, json.dumps(value, indent=1, allow_nan=False).encode())


def write(path: Path, data: bytes | bytearray) -> None:
    """Under its name only when it is on the disk. What a killed process has left is written over. Raises ResourceError.

    Whatever is written before config.json is therefore on the disk, names included, before that has its name."""
    try:
        write_atomically(path, data, temporary=path.with_name(f".{path.name}.partial"))
    except OSError as cause:
        raise ResourceError(
            f"{shown(path)}: cannot be written ({cause.strerror}); make room or check the disk, and start again"
        ) from None
