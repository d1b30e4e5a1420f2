"""What is written beside the shards: copies, digests, the report, the index and, last, config.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localmoe.checkpoint import INDEX, SINGLE
from localmoe.errors import ResourceError
from localmoe.files import MIB, partial_of, shown, sized, write_atomically
from localmoe.quantize import report
from localmoe.quantize.job import VERSION, Job
from localmoe.quantize.report import Measured

SIDECAR, REPORT, CARD = "localmoe-quantize.json", "localmoe-report", "README.md"
MOST_JSON = 256 * MIB


def finish(job: Job, done: Mapping[str, Any]) -> dict[str, Any]:
    """Write everything beside the shards; returns the report. In the order of the source, whatever was done when."""
    done = {name: done[name] for name in job.shards}
    measured = [Measured(**one) for facts in done.values() for one in facts["measured"]]
    found = report.summary(measured, job.bytes_in, job.bytes_out)
    digests = {name: facts["tensors"] for name, facts in done.items()}
    signs = {name: noted for facts in done.values() for name, noted in facts["files"].items()}
    for name, data in beside(job, found, digests, signs).items():
        write(job.out / name, data)
    return found


def beside(
    job: Job, found: dict[str, Any], digests: dict[str, dict[str, str]], signs: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files beside the shards in the order in which they are to be written, config.json last.

    found: the report; digests: of each tensor, by shard; signs: what is noted of the files with signs of zeros."""
    model = dict(job.copies)
    if set(job.shards) != {SINGLE}:
        weight_map = {name: shard for shard, tensors in digests.items() for name in tensors}
        model[INDEX] = _json({"metadata": {"total_size": job.bytes_out}, "weight_map": weight_map})
    sidecar = {
        "localmoe_quantize": VERSION,
        "source": job.name,
        "recipe": job.recipe.text,
        "fingerprint": job.fingerprint,
        "files": {name: noted(data) for name, data in (model | {"config.json": job.config}).items()} | dict(signs),
        "tensors": digests,
        "specs": {name: spec_text(*spec) for shard in job.shards.values() for name, spec in shard.specs.items()},
        "report": found,
    }
    title = f"# {shown(job.name)}, quantized by localmoe"
    limit = "" if job.limit is None else f"{job.limit}\n\n"
    text = f"{title}\n\n{limit}{report.markdown(found)}\n```toml\n{job.recipe.text}```\n".encode(
        "utf-8", "backslashreplace"
    )
    about = {SIDECAR: _json(sidecar), f"{REPORT}.json": _json(found), f"{REPORT}.md": text, CARD: _card(job, found)}
    return {**model, **about, "config.json": job.config}


def _card(job: Job, found: dict[str, Any]) -> bytes:
    """What whoever finds the folder is told. The head is what model hubs read."""
    formats = sorted({row["format"] for row in found["classes"]})
    calibrated = "" if job.importance is None else " What matters was told by an importance matrix (localmoe imatrix)."
    lines = [
        "---",
        f"base_model: {json.dumps(shown(job.name))}",
        "base_model_relation: quantized",
        "library_name: localmoe",
        "tags: [mixture-of-experts, quantized]",
        "---",
        f"# {shown(job.name)}, quantized by localmoe",
        "",
        f"{sized(found['bytes_in'])} became {sized(found['bytes_out'])}: "
        f"{', '.join(formats) or 'nothing was changed'}.{calibrated}",
        f"Errors of every kind of tensor are in [{REPORT}.md]({REPORT}.md), digests in {SIDECAR}.",
        *([] if job.limit is None else ["", job.limit]),
        "",
        "```",
        "localmoe verify DIR                            # whether it is still what was written",
        "localmoe eval DIR --against SRC -f TEXT        # perplexity and divergence from what it was made of",
        "localmoe chat --model DIR",
        "```",
        "",
        "The licence is that of the source.",
        "",
        "Made with this recipe:",
        "",
        "```toml",
        job.recipe.text.rstrip("\n"),
        "```",
    ]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def noted(data: bytes | bytearray) -> dict[str, Any]:
    """What the sidecar holds of a file."""
    return {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def spec_text(dtype: str, shape: tuple[int, ...]) -> str:
    """What the sidecar holds of a tensor beside its digest; one value, so that the largest model's can be read back."""
    return f"{dtype} {'x'.join(map(str, shape))}"


def write_json(path: Path, value: Any) -> None:
    """As write(), of what will be read back."""
    write(path, _json(value))


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def write(path: Path, data: bytes | bytearray) -> None:
    """Under its name only when it is on the disk. What a killed process has left is written over. Raises ResourceError.

    Whatever is written before config.json is therefore on the disk, names included, before that has its name."""
    try:
        write_atomically(path, data, temporary=partial_of(path))
    except OSError as cause:
        raise ResourceError(
            f"{shown(path)}: cannot be written ({cause.strerror}); make room or check the disk, and start again"
        ) from None
