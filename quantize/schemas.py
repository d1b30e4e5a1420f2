"""How a config describes its packed matrices, in the words of those who read them: compressed-tensors for integers and
for FP8 beside them, bitsandbytes for nf4, our own for the rest and for mixtures.

Knows names and formats; reads and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from localmoe.formats import FORMATS, Fp8Block, Int
from localmoe.kernels.codecs import BLOCK

# Where the config of what was quantized keeps what it said of that before.
SOURCE = "localmoe_source_quantization"
# In an expression that finds routed experts.
_ROUTED = r"\.experts\."


def described(config: Mapping[str, Any], packed: Mapping[str, str], matrices: Iterable[str]) -> dict[str, Any]:
    """A model's config with its packed matrices described. packed: the format of each by published name, FP8 that stays
    beside integers among them.

    matrices: names of all that the model has."""
    formats: dict[str, list[str]] = {}
    for name, fmt in packed.items():
        formats.setdefault(fmt, []).append(name.removesuffix(".weight"))
    if not formats:
        return dict(config)
    everything = {name.removesuffix(".weight") for name in matrices}
    targets = {name: _targets(of, everything.difference(of)) for name, of in sorted(formats.items())}
    if all(isinstance(FORMATS[name], (Int, Fp8Block)) for name in targets):
        source = config.get("quantization_config", {})
        # As DeepSeek means its FP8: multiplied by inputs that are rounded to it too.
        rounded = isinstance(source, Mapping) and source.get("activation_scheme") == "dynamic"
        quantization = _compressed_tensors(targets, rounded=rounded)
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


def _compressed_tensors(targets: Mapping[str, list[str]], *, rounded: bool) -> dict[str, Any]:
    """rounded: whether FP8 matrices meet rounded inputs.

    Source: compressed-tensors, formats pack-quantized and float-quantized, preset FP8_BLOCK."""
    schemes = {name: _scheme(name, rounded=rounded) for name in targets}
    # transformers decodes all routed experts by the first group with an expression in which it reads "experts", and
    # what it decodes at once by the first group without one.
    by_bits = sorted(targets, key=lambda name: (isinstance(FORMATS[name], Fp8Block), name))
    routed = next((name for name in by_bits if any(_ROUTED in word for word in targets[name])), None)
    groups = {}
    for number, name in enumerate(sorted(targets, key=lambda name: (name != routed, name))):
        words = targets[name] if name == routed else map(_without_experts, targets[name])
        groups[f"group_{number}"] = {"targets": list(words), **schemes[name]}
    formats = {scheme["format"] for scheme in schemes.values()}
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


def _without_experts(word: str) -> str:
    """The same target, spelled otherwise."""
    return word.replace("experts", "expert[s]") if word.startswith("re:") else word


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
