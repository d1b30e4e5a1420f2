"""`localmoe list`, `show` and `rm`: the models of the library.

Owns what they print; does not know what is in a model. Reads headers, never weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli.places import library, model_folder
from localmoe.cli.tables import print_table
from localmoe.errors import LocalMoeError, UsageError
from localmoe.files import shown, sized

if TYPE_CHECKING:
    from localmoe.facts import Facts
    from localmoe.library import Entry

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")]


def list_models(*, as_json: JsonOption = False) -> None:
    """Print a line for each model: format of the experts, parameters, size, and whether it fits in RAM now."""
    from localmoe.library import EMBEDDED, EMBEDDED_NAME, Entry

    found = [_row(entry) for entry in (Entry(EMBEDDED_NAME, EMBEDDED), *library().entries())]
    if as_json:
        _print_json(found)
        return
    head = ("NAME", "EXPERTS", "PARAMETERS", "SIZE", "FITS")
    print_table([head, *(_cells(row) for row in found)])


def _row(entry: Entry) -> dict[str, Any]:
    """What --json says about a model; where it cannot be opened, why."""
    from localmoe.device import available_memory
    from localmoe.facts import facts_of
    from localmoe.library import disk_bytes

    row: dict[str, Any] = {"name": entry.name, "path": str(entry.path), "unfinished": entry.unfinished}
    if entry.unfinished:
        return row | {"disk_bytes": disk_bytes(entry.path), "problem": "an unfinished download"}
    try:
        facts = facts_of(entry.path)
    except LocalMoeError as problem:
        return row | {"disk_bytes": disk_bytes(entry.path), "problem": str(problem)}
    return row | {
        "experts": facts.experts_format,
        "parameters": facts.parameters,
        "disk_bytes": facts.disk_bytes,
        "fits": facts.fits(available_memory()),
        "problem": None,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["problem"]:
        # The reason follows, where a line can be as long as it must be.
        reason = row["problem"] if row["unfinished"] else f"cannot be opened: {row['problem']}"
        return shown(row["name"]), "-", "-", sized(row["disk_bytes"]), reason
    return shown(row["name"]), row["experts"], _count(row["parameters"]), sized(row["disk_bytes"]), row["fits"]


def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name of localmoe list, or a model directory.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Print what config.json and the headers say. Raises ModelError for no model and for a broken one."""
    folder = model_folder(Path(model))
    # After what a mistyped name needs: these import torch.
    from localmoe.device import available_memory
    from localmoe.facts import facts_of

    facts, room = facts_of(folder), available_memory()
    if as_json:
        _print_json(_record(folder, facts, room))
        return
    for name, value in _lines(folder, facts, room):
        sys.stdout.write(f"{name:<11} {value}\n")
    rows = [
        (part.name, part.format, f"{part.tensors:,}", _count(part.parameters), sized(part.nbytes))
        for part in facts.parts
    ]
    sys.stdout.write("\n")
    print_table([("PART", "FORMAT", "TENSORS", "PARAMETERS", "SIZE"), *rows])


def _record(folder: Path, facts: Facts, room: int | None) -> dict[str, Any]:
    ours = facts.made_by_us
    return {
        "path": str(folder),
        "config": {"model_type": facts.config.model_type} | asdict(facts.config),
        "chat_format": facts.chat_format,
        "parameters": facts.parameters,
        "active_parameters": facts.active_parameters,
        "parts": [asdict(part) for part in facts.parts],
        "unused_bytes": facts.unused_bytes,
        "disk_bytes": facts.disk_bytes,
        "fits": facts.fits(room),
        "quantized_by": facts.quantized_by,
        "made_by_us": None if ours is None else {"source": ours.get("source"), "recipe": ours.get("recipe")},
        "origin": facts.origin,
        "licence": None if facts.licence is None else facts.licence[0],
    }


def _lines(folder: Path, facts: Facts, room: int | None) -> Iterable[tuple[str, str]]:
    """The facts as a person reads them. Whatever a file says passes through shown()."""
    c = facts.config
    kinds = ", ".join(f"{count} {kind}" for kind, count in c.layer_kinds.items())
    yield "folder", shown(folder, 4096)
    yield "model", f"{c.model_type}, {c.num_layers} layers ({kinds}), {c.hidden_size:,} wide, {c.vocab_size:,} tokens"
    yield "attention", c.attention
    experts = f"{c.num_experts} a layer, {c.experts_per_token} of them and {c.num_shared_experts} shared for each token"
    yield "experts", experts + (f"; layers that choose by token: {c.num_hash_layers}" if c.num_hash_layers else "")
    yield "chat format", facts.chat_format
    yield "context", f"{c.max_position_embeddings:,} tokens"
    yield "parameters", f"{_count(facts.parameters)}, {_count(facts.active_parameters)} multiplied for each token"
    unused = f", {sized(facts.unused_bytes)} of it not used here (MTP)" if facts.unused_bytes else ""
    yield "disk", f"{sized(facts.disk_bytes)}{unused}"
    yield "memory", _fit_in_words(facts, room)
    yield from _origin(facts)
    if facts.licence is None:
        yield "licence", "no licence file"
    else:
        yield "licence", f"{shown(facts.licence[0])}: {shown(facts.licence[1])}"


def _fit_in_words(facts: Facts, room: int | None) -> str:
    have = "unknown" if room is None else sized(room)
    dense = sized(facts.nbytes - facts.experts_bytes)
    return {
        "in RAM": f"fits: {sized(facts.nbytes)} of weights, {have} available",
        "paged": f"{sized(facts.nbytes)} of weights, {have} available: experts are read from disk, {dense} stay",
        "too large": f"does not fit: {dense} must stay in RAM, {have} available",
    }[facts.fits(room)]


def _origin(facts: Facts) -> Iterable[tuple[str, str]]:
    """Where the model is from, and who packed it how."""
    if facts.origin is not None:
        yield "from", f"{shown(facts.origin.get('repo'))}, commit {shown(facts.origin.get('commit'))}"
    if facts.made_by_us is not None:
        yield "quantized", f"by localmoe, from {shown(facts.made_by_us.get('source'))}, with this recipe:"
        for line in str(facts.made_by_us.get("recipe", "")).strip().splitlines():
            yield "", shown(line)
    elif facts.quantized_by is not None:
        yield "quantized", f"{shown(facts.quantized_by)}, as config.json says; not by localmoe quantize"


def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of localmoe list.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model, or what an unfinished download of that name has left; asks first.

    Raises UsageError for a name that the library does not have, and where nobody can be asked without --yes."""
    from localmoe.library import EMBEDDED_NAME, disk_bytes

    if name == EMBEDDED_NAME:
        raise UsageError(f"{name} is part of localmoe and cannot be removed")
    models = library()
    entry = next((entry for entry in models.entries() if entry.name == name), None)
    if entry is None:
        near = [shown(known) for known in models.nearest(name) if known != EMBEDDED_NAME]
        hint = f"did you mean {' or '.join(near)}?" if near else "localmoe list shows what there is"
        raise UsageError(f"{shown(name)} is not a model in {shown(models.folder)}; {hint}")
    link = entry.path.is_symlink()
    what = f"the link {shown(entry.path)}" if link else f"{shown(entry.path)}, {sized(disk_bytes(entry.path))}"
    if not yes:
        if not can_ask():
            raise UsageError(f"nobody can be asked whether to remove {what}; add --yes")
        if not typer.confirm(f"Remove {what}?", err=True):
            return
    models.remove(entry)
    sys.stdout.write(f"removed {what}\n")


def can_ask() -> bool:
    """Somebody sees the question and can answer it."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def _count(number: int) -> str:
    """Of parameters: 284.1 B, 9.8 M."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)
