"""The families of models that localmoe runs.

A family is a config class, a tensor inventory with its spellings, and a stack of blocks; config.json's model_type says
which one a directory needs. Everything above this file knows a model by models.model only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from localmoe.config import Reader
from localmoe.errors import UsageError
from localmoe.layers.linear import Lookup
from localmoe.models import deepseek_v4_names, mla_names
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.mla import Mla
from localmoe.models.mla_config import MODEL_TYPES as MLA_TYPES
from localmoe.models.mla_config import MlaConfig
from localmoe.models.model import Model, ModelConfig, Options
from localmoe.models.tensors import Place, TensorSpec


class _Names(Protocol):
    """A module of names; `name` is always the published one."""

    def tensor_inventory(self, config: Any, /) -> dict[str, TensorSpec]: ...
    def places(self, config: Any, name: str, /) -> tuple[Place, ...]: ...
    def is_ignored(self, config: Any, name: str, /) -> bool: ...
    def expert_names(self, config: Any, layer: int, expert: int, /) -> tuple[str, str, str]: ...
    def part_of(self, name: str, /) -> str: ...


class _ConfigClass(Protocol):
    def from_dict(self, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig: ...


@dataclass(frozen=True)
class _Family:
    config: _ConfigClass
    names: _Names
    model: Callable[..., Model]


_FAMILIES = {"deepseek_v4": _Family(DeepseekV4Config, deepseek_v4_names, DeepseekV4)}
_FAMILIES |= dict.fromkeys(MLA_TYPES, _Family(MlaConfig, mla_names, Mla))
MODEL_TYPES = tuple(_FAMILIES)


def config_of(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """A parsed config.json; `source` names the file in errors. Raises ConfigError."""
    Reader(raw, source).must_be("model_type", *MODEL_TYPES)
    return _FAMILIES[raw["model_type"]].config.from_dict(raw, source)


def tensor_inventory(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor the model binds, by published name, in file order."""
    return _FAMILIES[config.model_type].names.tensor_inventory(config)


def places(config: ModelConfig, name: str) -> tuple[Place, ...]:
    """Where a checkpoint may keep a tensor: the published spelling first."""
    return _FAMILIES[config.model_type].names.places(config, name)


def is_ignored(config: ModelConfig, name: str) -> bool:
    """Tensors of a checkpoint that the forward pass does not use."""
    return _FAMILIES[config.model_type].names.is_ignored(config, name)


def expert_names(config: ModelConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """w1 (gate), w2 (down) and w3 (up) of a routed expert. layer: of those that have experts."""
    return _FAMILIES[config.model_type].names.expert_names(config, layer, expert)


def part_of(config: ModelConfig, name: str) -> str:
    """What a tensor is for, in words."""
    return _FAMILIES[config.model_type].names.part_of(name)


def check_kv_format(config: ModelConfig, kv_format: str) -> None:
    """Raises UsageError where a cache rounded to FP8 is not what the official code has."""
    if kv_format == "fp8" and config.model_type != DeepseekV4Config.model_type:
        raise UsageError(f"kv_format is fp8, which only deepseek_v4 has; {config.model_type} keeps its cache in full")


def build(config: ModelConfig, get: Lookup, **options: Unpack[Options]) -> Model:
    """A bound model. get: weights by published name, plain or quantized.

    Raises UsageError for an option that the family does not have."""
    check_kv_format(config, "fp8" if options.get("quantize_kv") else "full")
    return _FAMILIES[config.model_type].model(config, get, **options)
