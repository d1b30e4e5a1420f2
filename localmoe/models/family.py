"""The families of models that localmoe runs, and what the engine asks of any of them.

A family is a config class, a tensor inventory with its spellings, and a stack of blocks; config.json's model_type says
which one a directory needs. Everything above this file knows only the two protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from localmoe.backend import Backend
from localmoe.cache import SequenceState
from localmoe.config import Reader
from localmoe.errors import UsageError
from localmoe.experts.resident import ExpertSource
from localmoe.layers.linear import Lookup
from localmoe.models import deepseek_v4_names, mla_names
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.mla import Mla
from localmoe.models.mla_config import MODEL_TYPES as MLA_TYPES
from localmoe.models.mla_config import MlaConfig
from localmoe.models.tensors import Place, TensorSpec
from localmoe.step import Step
from localmoe.step_size import CacheSize, WorkBytes
from localmoe.weights import Observer, Weight


class ModelConfig(Protocol):
    """What is the same of every family. Layers of experts are counted from 0, dense layers left out."""

    # Each is a frozen dataclass.
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_moe_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_shared_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def num_hash_layers(self) -> int: ...
    @property
    def swiglu_limit(self) -> float: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def bos_token_id(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def num_nextn_predict_layers(self) -> int: ...
    @property
    def expert_weights(self) -> int: ...
    @property
    def layer_kinds(self) -> dict[str, int]:
        """How many layers there are of each kind, by its name."""

    @property
    def attention(self) -> str:
        """What attention keeps of each token, in words."""

    @property
    def work(self) -> WorkBytes: ...
    @property
    def cache(self) -> CacheSize: ...


class Block(Protocol):
    """One layer."""

    def sample_weights(self) -> tuple[Weight, ...]:
        """A few of this layer's weights, enough to tell two models apart."""


class Model(Protocol):
    """Bound weights that turn a step of tokens into logits."""

    dtype: torch.dtype
    quantize_kv: bool
    backend: Backend | None
    experts: ExpertSource
    embed: Tensor
    norm: Tensor
    head: Weight

    @property
    def config(self) -> ModelConfig: ...
    @property
    def blocks(self) -> Sequence[Block]: ...

    def new_state(self) -> SequenceState:
        """An empty decode state for one sequence."""

    def forward(self, step: Step) -> Tensor:
        """Logits [R, vocab] float32 for step.logit_rows; advances every state in the step."""


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


def build(
    config: ModelConfig,
    get: Lookup,
    *,
    dtype: torch.dtype | None = None,
    experts: ExpertSource | None = None,
    wrap: Callable[[ExpertSource], ExpertSource] | None = None,
    quantize_kv: bool = False,
    backend: Backend | None = None,
    observer: Observer | None = None,
) -> Model:
    """A bound model. get: weights by published name, plain or quantized.

    dtype: of activations and cache, by default that of the embedding. backend: None computes in torch. experts: None
    binds all of them from get. wrap: what stands before them. observer: shown what goes into matrices."""
    family = _FAMILIES[config.model_type]
    return family.model(
        config, get, dtype=dtype, experts=experts, wrap=wrap, quantize_kv=quantize_kv, backend=backend,
        observer=observer,
    )  # fmt: skip
