"""Where a checkpoint has the routed experts, for those that are read from it when they are needed.

Knows names and formats; reads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from localmoe.errors import CheckpointError
from localmoe.experts.layout import Layout, Matrix, check_aligned
from localmoe.files import shown
from localmoe.models.family import expert_names
from localmoe.models.model import ModelConfig
from localmoe.models.tensors import TensorSpec
from localmoe.safetensors_io import DTYPES, TensorRef
from localmoe.spelling import Source


def layout_of(
    path: Path,
    config: ModelConfig,
    inventory: Mapping[str, TensorSpec],
    sources: Mapping[str, Source],
    *,
    compact: bool,
) -> Layout:
    """Where the routed experts lie. Raises CheckpointError if they cannot be used from the files as they are."""
    kinds = []
    for layer in range(config.num_moe_layers):
        first, *others = (
            tuple(_matrix(inventory[name], sources[name]) for name in expert_names(config, layer, expert))
            for expert in range(config.num_experts)
        )
        if any(other != first for other in others):
            raise CheckpointError(
                f"{shown(path)}: experts of MoE layer {layer} are stored in different formats, so they cannot be read "
                "on demand; convert them to one format, or use a machine on which the model fits in RAM"
            )
        w1, w2, w3 = first
        plain = [matrix.dtype for matrix in first if matrix.format is None]
        if compact and any(dtype not in (torch.bfloat16, torch.float32) for dtype in plain):
            raise CheckpointError(
                f"{shown(path)}: experts of MoE layer {layer} are stored in {str(plain[0]).removeprefix('torch.')}, "
                "which the compiled kernels do not read; use --kernels reference, or convert them to bf16"
            )
        kinds.append((w1, w2, w3))

    def locate(layer: int, expert: int) -> list[TensorRef]:
        refs: list[TensorRef] = []
        for name in expert_names(config, layer, expert):
            source = sources[name]
            refs += [source.ref] if source.scale is None else [source.ref, source.scale]
        for ref in refs:
            check_aligned(ref)
        return refs

    return Layout(kinds, config.num_experts, locate)


def _matrix(spec: TensorSpec, source: Source) -> Matrix:
    scale = None if source.scale is None else DTYPES[source.scale.dtype]
    return Matrix(spec.matrix, DTYPES[source.ref.dtype], source.format, scale)
