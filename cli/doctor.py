"""`localmoe doctor`: what localmoe finds on this machine, which kernels compute, and whether they compute rightly.

Measures nothing and changes nothing; takes as long as importing torch. Exit code 1 if something is broken."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.errors import LocalMoeError

if TYPE_CHECKING:
    from localmoe.kernels.native import Library

_GIB = 1 << 30


def doctor(*, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print every finding. Raises LocalMoeError, after that, naming what is broken."""
    found = findings()
    if as_json:
        sys.stdout.write(json.dumps(found, allow_nan=False) + "\n")
    else:
        for name, value in lines(found):
            sys.stdout.write(f"{name:<12} {value}\n")
    sys.stdout.flush()
    if found["problems"]:
        raise LocalMoeError("; ".join(found["problems"]))


def findings() -> dict[str, Any]:
    """Everything there is to say, in numbers and names; sizes in bytes. Imports torch."""
    import torch

    from localmoe import __version__, backend, device
    from localmoe.device import available_memory
    from localmoe.kernels import native

    library = native.load()
    # Starts the threads that a model would.
    backend.choose("auto")
    cache = device.hub_cache()
    return {
        "localmoe": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "kernels": kernels(library),
        "cpu": device.cpu_model(),
        "cores": device.processors(),
        "ram_available": available_memory(),
        "huge_pages": device.huge_pages(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "hub_cache": str(cache),
        "hub_cache_free": device.free_disk(cache),
        "problems": [*disagreements(library), *missing_weights()],
    }


def kernels(library: Library | str) -> dict[str, Any]:
    """Which kernels compute: compiled ones with an instruction set, or torch and the reason for it."""
    if isinstance(library, str):
        return {"path": "reference", "reason": library}
    return {
        "path": "native",
        "isa": library.isa,
        "isas": library.isas,
        "threads": library.threads,
        "library": str(library.path),
    }


def disagreements(library: Library | str) -> list[str]:
    """Instruction sets that multiply a small FP4 matrix otherwise than torch does."""
    if isinstance(library, str):
        return []
    import torch

    from localmoe.kernels import codecs, native

    generator = torch.Generator().manual_seed(0)
    codes, scale = codecs.quantize_fp4(torch.randn(48, 96, generator=generator))
    x = torch.randn(3, 96, generator=generator)
    expected = x @ codecs.dequantize_fp4(codes, scale).T
    w = native.matrix("fp4", (48, 96), codes, scale, group=codecs.GROUP)
    used, wrong = library.isa, []
    for isa in library.isas:
        library.use_isa(isa)
        strict, fast = library.linear(x, w, mode="strict"), library.linear(x, w, mode="fast")
        # Fast kernels may round activations to bf16 or int8.
        near = (fast - expected).norm() < 0.02 * expected.norm()
        if not near or not torch.allclose(strict, expected, rtol=1e-4, atol=1e-4):
            wrong.append(f"the {isa} kernels multiply wrongly; reinstall localmoe")
    library.use_isa(used)
    return wrong


def missing_weights() -> list[str]:
    """The embedded model, if the installation lost it."""
    from localmoe.library import EMBEDDED

    return [] if (EMBEDDED / "config.json").is_file() else [f"{EMBEDDED} lacks the embedded model; reinstall localmoe"]


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The findings as a person reads them."""
    using = found["kernels"]
    if using["path"] == "native":
        shown = f"native, {using['isa']}, {using['threads']} thread{'s' * (using['threads'] != 1)}"
        more = [("", f"usable here: {', '.join(using['isas'])}"), ("", using["library"])]
    else:
        shown, more = "reference (torch)", [("", f"no compiled kernels: {using['reason']}")]
    return [
        ("localmoe", f"{found['localmoe']}, Python {found['python']}, torch {found['torch']}"),
        ("kernels", shown),
        *more,
        ("processor", f"{found['cpu']}, {found['cores']} cores"),
        ("RAM", f"{_size(found['ram_available'])} available, huge pages: {found['huge_pages'] or 'none'}"),
        ("GPU", ", ".join(found["gpus"]) or "none"),
        ("disk", f"{_size(found['hub_cache_free'])} free for {found['hub_cache']}"),
        ("state", "broken" if found["problems"] else "sound"),
    ]


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / _GIB:.1f} GiB"
