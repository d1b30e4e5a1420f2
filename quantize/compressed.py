"""How a packed matrix is stored and described so that others read it: the words of compressed-tensors.

Knows names, shapes and formats; reads and writes nothing. Source: compressed-tensors, format pack-quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from localmoe.formats import FORMATS, Int


def specs_of(name: str, shape: tuple[int, int], fmt: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a packed matrix is stored as. Source: compressed-tensors, format pack-quantized."""
    packing = FORMATS[fmt]
    assert isinstance(packing, Int), "an integer format"
    rows, cols = shape
    return {
        f"{name}_packed": ("I32", (rows, packing.data_shape(rows, cols)[1] // 4)),
        f"{name}_scale": ("BF16", packing.scale_shape(rows, cols)),
        f"{name}_shape": ("I64", (2,)),
    }


def described(config: Mapping[str, Any], packed: Mapping[str, str], matrices: Iterable[str]) -> dict[str, Any]:
    """A model's config with its packed matrices described. packed: the format of each by published name.

    matrices: names of all that the model has."""
    formats: dict[str, list[str]] = {}
    for name, fmt in packed.items():
        formats.setdefault(fmt, []).append(name.removesuffix(".weight"))
    if not formats:
        return dict(config)
    everything = {name.removesuffix(".weight") for name in matrices}
    groups = {}
    for number, (name, targets) in enumerate(sorted(formats.items())):
        packing = FORMATS[name]
        assert isinstance(packing, Int), "an integer format"
        groups[f"group_{number}"] = {
            "targets": _targets(targets, everything.difference(targets)),
            "weights": {"num_bits": packing.bits, "type": "int", "symmetric": True, "strategy": "group",
                        "group_size": packing.group, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }  # fmt: skip
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                    "quantization_status": "compressed", "config_groups": groups, "ignore": []}  # fmt: skip
    kept = {"localmoe_source_quantization": config["quantization_config"]} if "quantization_config" in config else {}
    return {**config, "quantization_config": quantization, **kept}


def _targets(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """What describes these modules and none of the others, in as few words as possible.

    Source: compressed-tensors, match_name: a module's exact name, or "re:" and what re.match() finds."""
    # An expression finds a module exactly if it is one of that module's: every name begins at the model's root.
    taken = {pattern for name in others for pattern in _patterns(name)}
    return sorted({next((word for word in _patterns(name) if word not in taken), name) for name in modules})


def _patterns(name: str) -> Iterator[str]:
    """Targets that find a module among others: over all layers and experts, then over all experts of its layer."""
    parts = [re.escape(part) for part in name.split(".")]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for first in range(len(numbers)):
        free = numbers[first:]
        yield "re:.*" + r"\.".join(r"\d+" if i in free else part for i, part in enumerate(parts)) + "$"
