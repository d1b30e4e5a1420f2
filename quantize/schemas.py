"""How a config describes its packed matrices, in the words of those who read them: compressed-tensors for integers and
for FP8 beside them, bitsandbytes for nf4, our own for the rest and for mixtures.

Knows names and formats; reads and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from localmoe.formats import FORMATS, Fp8Block, Int
from localmoe.kernels.codecs import BLOCK
from localmoe.models.tensors import is_routed

# Where the config of what was quantized keeps what it said of that before.
SOURCE = "localmoe_source_quantization"


def described(config: Mapping[str, Any], packed: Mapping[str, str], matrices: Iterable[str]) -> dict[str, Any]:
    """A model's config with its packed matrices described. packed: the format of each by published name, FP8 that stays
    beside integers among them.

    matrices: names of all that the model has."""
    if not packed:
        return dict(config)
    modules = {name.removesuffix(".weight"): fmt for name, fmt in packed.items()}
    formats, everything = sorted(set(packed.values())), {name.removesuffix(".weight") for name in matrices}
    if all(isinstance(FORMATS[name], (Int, Fp8Block)) for name in formats):
        source = config.get("quantization_config", {})
        # As DeepSeek means its FP8: multiplied by inputs that are rounded to it too.
        rounded = isinstance(source, Mapping) and source.get("activation_scheme") == "dynamic"
        quantization = _compressed_tensors(modules, everything, rounded=rounded)
    elif formats == ["nf4"]:
        quantization = _bitsandbytes(sorted(everything.difference(modules)))
    else:
        # What no other program reads; each matrix says by its tensors what it is.
        targets = {fmt: _targets([name for name in modules if modules[name] == fmt], everything) for fmt in formats}
        quantization = {"quant_method": "localmoe", "formats": targets}
    kept = {SOURCE: config["quantization_config"]} if "quantization_config" in config else {}
    return {**config, "quantization_config": quantization, **kept}


def restored(config: Mapping[str, Any]) -> dict[str, Any]:
    """A described config as it was before."""
    before = {key: value for key, value in config.items() if key not in ("quantization_config", SOURCE)}
    return before | ({"quantization_config": config[SOURCE]} if SOURCE in config else {})


def _compressed_tensors(modules: Mapping[str, str], everything: Collection[str], *, rounded: bool) -> dict[str, Any]:
    """A group for the routed experts of a format and one for the rest of it. rounded: whether FP8 meets rounded inputs.

    Source: compressed-tensors, formats pack-quantized and float-quantized, preset FP8_BLOCK."""
    found: dict[tuple[bool, bool, str], list[str]] = {}
    for name, fmt in modules.items():
        found.setdefault((isinstance(FORMATS[fmt], Fp8Block), not is_routed(name), fmt), []).append(name)
    groups, named = {}, False
    # transformers decodes all routed experts by the first group with an expression in which it reads "experts"; and,
    # asked to decode everything at once, the rest by the first group without one. FP8 may be that of unused layers.
    for number, ((_, others, fmt), names) in enumerate(sorted(found.items())):
        targets = _targets(names, everything)
        if others or named:
            targets = [word.replace("experts", "expert[s]") if word.startswith("re:") else word for word in targets]
        named |= not others
        groups[f"group_{number}"] = {"targets": targets, **_scheme(fmt, rounded=rounded)}
    formats = {scheme["format"] for scheme in groups.values()}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision" if len(formats) > 1 else formats.pop(),
            "quantization_status": "compressed", "config_groups": groups, "ignore": []}  # fmt: skip


def _scheme(name: str, *, rounded: bool) -> dict[str, Any]:
    packing = FORMATS[name]
    if isinstance(packing, Int):
        weights = {"num_bits": packing.bits, "type": "int", "symmetric": True, "strategy": "group",
                   "group_size": packing.group, "dynamic": False}  # fmt: skip
        return {"weights": weights, "input_activations": None, "output_activations": None, "format": "pack-quantized"}
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block",
               "block_structure": [BLOCK, BLOCK], "dynamic": False}  # fmt: skip
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": BLOCK,
              "dynamic": True}  # fmt: skip
    return {"weights": weights, "input_activations": inputs if rounded else None, "output_activations": None,
            "format": "float-quantized"}  # fmt: skip


def _bitsandbytes(kept: list[str]) -> dict[str, Any]:
    """kept: modules that are not packed. Source: transformers, BitsAndBytesConfig."""
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": kept}  # fmt: skip


def _targets(modules: Collection[str], everything: Iterable[str]) -> list[str]:
    """What describes these modules and none of the others, in as few words as possible.

    Source: compressed-tensors, match_name: a module's exact name, or "re:" and what re.match() finds."""
    # An expression finds a module exactly if it is one of that module's: every name begins at the model's root.
    taken = {pattern for name in set(everything).difference(modules) for pattern in _patterns(name)}
    return sorted({next((word for word in _patterns(name) if word not in taken), name) for name in modules})


def _patterns(name: str) -> Iterator[str]:
    """Targets that find a module among others: over all layers and experts, then over all experts of its layer."""
    parts = [re.escape(part) for part in name.split(".")]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for first in range(len(numbers)):
        free = numbers[first:]
        yield "re:.*" + r"\.".join(r"\d+" if i in free else part for i, part in enumerate(parts)) + "$"
