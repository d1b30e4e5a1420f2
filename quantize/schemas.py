"""How a config describes its packed matrices, in the words of those who read them: compressed-tensors for integers,
bitsandbytes for nf4, our own for the rest and for mixtures.

Knows names and formats; reads and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from localmoe.formats import FORMATS, Int

# Where the config of what was quantized keeps what it said of that before.
SOURCE = "localmoe_source_quantization"


def described(config: Mapping[str, Any], packed: Mapping[str, str], matrices: Iterable[str]) -> dict[str, Any]:
    """A model's config with its packed matrices described. packed: the format of each by published name.

    matrices: names of all that the model has."""
    formats: dict[str, list[str]] = {}
    for name, fmt in packed.items():
        formats.setdefault(fmt, []).append(name.removesuffix(".weight"))
    if not formats:
        return dict(config)
    everything = {name.removesuffix(".weight") for name in matrices}
    targets = {name: _targets(of, everything.difference(of)) for name, of in sorted(formats.items())}
    if all(isinstance(FORMATS[name], Int) for name in targets):
        quantization = _compressed_tensors(targets)
    elif set(targets) == {"nf4"}:
        quantization = _bitsandbytes(sorted(everything.difference(formats["nf4"])))
    else:
        # What no other program reads; each matrix says by its tensors what it is.
        quantization = {"quant_method": "localmoe", "formats": targets}
    kept = {SOURCE: config["quantization_config"]} if "quantization_config" in config else {}
    return {**config, "quantization_config": quantization, **kept}


def restored(config: Mapping[str, Any]) -> dict[str, Any]:
    """A described config as it was before."""
    before = {key: value for key, value in config.items() if key not in ("quantization_config", SOURCE)}
    return before | ({"quantization_config": config[SOURCE]} if SOURCE in config else {})


def _compressed_tensors(targets: Mapping[str, list[str]]) -> dict[str, Any]:
    """Source: compressed-tensors, format pack-quantized."""
    groups = {}
    for number, (name, found) in enumerate(targets.items()):
        packing = FORMATS[name]
        assert isinstance(packing, Int), "an integer format"
        groups[f"group_{number}"] = {
            "targets": found,
            "weights": {"num_bits": packing.bits, "type": "int", "symmetric": True, "strategy": "group",
                        "group_size": packing.group, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": []}  # fmt: skip


def _bitsandbytes(kept: list[str]) -> dict[str, Any]:
    """kept: modules that are not packed. Source: transformers, BitsAndBytesConfig."""
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": kept}  # fmt: skip


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
