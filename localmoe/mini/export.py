"""Write a trained localmoe-mini as a model directory in the published V4 layout: FP4 experts, FP8 dense, bf16, float32.

Run: python -m localmoe.mini.export RUN_DIR DATA_DIR OUT_DIR"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.checkpoint import Checkpoint
from localmoe.formats import FORMATS
from localmoe.kernels.codecs import encode_e8m0
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.family import tensor_inventory
from localmoe.safetensors_io import write_safetensors

# What a small story model is best read with; official models say 1.0 and 1.0.
GENERATION = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "bos_token_id": 0, "eos_token_id": 1}


def published_tensors(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 weights by published name -> the tensors of a published checkpoint, quantized ones with their .scale."""
    tensors: dict[str, Tensor] = {}
    for name, spec in tensor_inventory(DeepseekV4Config.from_dict(dict(config))).items():
        value = state[name]
        if spec.published in ("f32", "i64"):
            tensors[name] = value
        elif spec.published == "bf16":
            tensors[name] = value.bfloat16()
        else:
            packed = FORMATS[spec.published].quantize(value)
            tensors[name] = packed.data.view(torch.int8) if spec.published == "fp4" else packed.data
            scale = encode_e8m0(packed.scale) if packed.scale.dtype == torch.float32 else packed.scale
            tensors[f"{name.removesuffix('.weight')}.scale"] = scale.view(torch.float8_e8m0fnu)
    return tensors


def export(run: Path, data: Path, out: Path) -> None:
    """run: a training directory; data: the corpus directory, for its tokenizer."""
    config = json.loads((run / "config.json").read_text())
    with Checkpoint.open(run / "state") as saved:
        prefix = "parameter."
        state = {n.removeprefix(prefix): saved.read(ref) for n, ref in saved.refs.items() if n.startswith(prefix)}
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, out / name)
    shutil.copyfile(run / "config.json", out / "config.json")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    write_safetensors(out / "model.safetensors", published_tensors(config, state), {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("run", "data", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    export(args.run, args.data, args.out)


if __name__ == "__main__":
    main()
