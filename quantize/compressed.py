"""How a packed matrix is stored and described so that others read it: the words of compressed-tensors.

Knows names, shapes and formats; reads and writes nothing. Source: compressed-tensors, format pack-quantized."""

from __future__ import annotations

from collections.abc import Mapping
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


def described(config: Mapping[str, Any], packed: Mapping[str, str]) -> dict[str, Any]:
    """A model's config with its packed matrices described. packed: the format of each by published name."""
    formats: dict[str, list[str]] = {}
    for name, fmt in packed.items():
        formats.setdefault(fmt, []).append(name.removesuffix(".weight"))
    if not formats:
        return dict(config)
    groups = {}
    for number, (name, targets) in enumerate(sorted(formats.items())):
        packing = FORMATS[name]
        assert isinstance(packing, Int), "an integer format"
        groups[f"group_{number}"] = {
            "targets": sorted({_pattern(target) for target in targets}),
            "weights": {"num_bits": packing.bits, "type": "int", "symmetric": True, "strategy": "group",
                        "group_size": packing.group, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }  # fmt: skip
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                    "quantization_status": "compressed", "config_groups": groups, "ignore": []}  # fmt: skip
    kept = {"localmoe_source_quantization": config["quantization_config"]} if "quantization_config" in config else {}
    return {**config, "quantization_config": quantization, **kept}


def _pattern(name: str) -> str:
    """A module's name as a regular expression over layers and experts."""
    parts = [r"\d+" if part.isdigit() else part for part in name.split(".")]
    return "re:.*" + r"\.".join(parts) + "$"
