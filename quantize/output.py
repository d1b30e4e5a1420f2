"""What is written beside the shards: copies, digests, the report, the index and, last, config.json."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from localmoe.checkpoint import INDEX
from localmoe.config import load_config
from localmoe.errors import ResourceError
from localmoe.files import MIB, shown
from localmoe.quantize import report
from localmoe.quantize.compressed import described
from localmoe.quantize.job import VERSION, Job
from localmoe.quantize.report import Measured

SIDECAR, REPORT = "localmoe-quantize.json", "localmoe-report"
MOST_JSON = 256 * MIB
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "LICENSE",
           "chat_template.jinja")  # fmt: skip


def finish(job: Job, done: dict[str, Any]) -> dict[str, Any]:
    """Everything beside the shards, config.json last. In the order of the source, whatever was done when."""
    done = {name: done[name] for name in job.shards}
    measured = [Measured(**one) for facts in done.values() for one in facts["measured"]]
    found = report.summary(measured, job.bytes_in, job.bytes_out)
    for name in _COPIED:
        if (job.source / name).is_file():
            shutil.copyfile(job.source / name, job.out / name)
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
    (job.out / f"{REPORT}.md").write_text(f"{text}{job.recipe.text}```\n", encoding="utf-8")
    if set(job.shards) != {"model.safetensors"}:
        weight_map = {name: shard for shard, tensors in digests.items() for name in tensors}
        write_json(job.out / INDEX, {"metadata": {"total_size": job.bytes_out}, "weight_map": weight_map})
    packed = {name: fmt for shard in job.shards.values() for name, (_source, fmt) in shard.packed.items()}
    write_json(job.out / "config.json", described(load_config(job.source), packed))
    return found


def write_json(path: Path, value: Any) -> None:
    """Under its name only when it is on the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as cause:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{shown(path)}: cannot be written ({cause.strerror}); free some disk space") from None
