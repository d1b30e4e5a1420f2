"""What the engine asks of a model of any family, and what binding one comes to in all of them.

A family's own file says how its blocks are bound and stacked. Knows no family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from localmoe.backend import Backend
from localmoe.experts.resident import Expert, ExpertSource, resident
from localmoe.kernels.native import Library
from localmoe.layers.linear import Lookup, tensor
from localmoe.models.inputs import Inputs, Kept, Tables
from localmoe.ops import DeviceOps
from localmoe.sequence import SequenceState
from localmoe.site import Site
from localmoe.step import Places, Step
from localmoe.step_size import CacheSize, WorkBytes
from localmoe.weights import Observer, Weight, observed


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


class Options(TypedDict, total=False):
    """dtype: of activations and cache, by default that of the embedding. experts: None binds all of them. wrap: what
    stands before them, for example to record the routing. quantize_kv: round the cache to FP8. backend: None computes
    in torch. sites: where each layer is computed; None: all on the CPU by the backend. observer: shown what goes into
    matrices; experts that it observes are computed one product at a time."""

    dtype: torch.dtype | None
    experts: ExpertSource | None
    wrap: Callable[[ExpertSource], ExpertSource] | None
    quantize_kv: bool
    backend: Backend | None
    sites: Sequence[Site] | None
    observer: Observer | None


class Outside(NamedTuple):
    """Published names of the tensors before and after the blocks."""

    embed: str
    norm: str
    head: str


@dataclass(frozen=True)
class Binder:
    """Gives a layer its weights where it is computed. get: by published name, plain or packed."""

    site: Site
    get: Lookup
    observer: Observer | None

    def tensor(self, name: str) -> Tensor:
        """A weight that must be plain."""
        return tensor(self.get, name).to(self.site.device)

    def matrix(self, name: str) -> Weight:
        """A weight that is only ever multiplied."""
        return observed(self.site.bind(self.get(name)), name, self.observer)

    def expert(self, names: tuple[str, str, str], limit: float) -> Expert:
        """names: of w1, w2 and w3. limit: of the SwiGLU."""
        w1, w2, w3 = map(self.matrix, names)
        return Expert(w1, w2, w3, limit)


class Model(ABC):
    """Bound weights that turn a step of tokens into logits. Of a subclass: config's own class, and blocks."""

    config: ModelConfig
    blocks: Sequence[Block]

    def __init__(
        self,
        config: ModelConfig,
        get: Lookup,
        outside: Outside,
        *,
        dtype: torch.dtype | None = None,
        experts: ExpertSource | None = None,
        wrap: Callable[[ExpertSource], ExpertSource] | None = None,
        quantize_kv: bool = False,
        backend: Backend | None = None,
        sites: Sequence[Site] | None = None,
        observer: Observer | None = None,
    ) -> None:
        """get: weights by their published names; the caller decides plain or quantized. The others: see Options.

        Raises KeyError when `get` does not know a name (the loader has checked them all before)."""
        self.config = config
        self.quantize_kv = quantize_kv
        self._get, self.backend, self._observer = get, backend, observer
        self.sites = list(sites) if sites is not None else [Site(backend=backend)] * config.num_layers
        assert len(self.sites) == config.num_layers, "a site for each layer"
        # Devices, and what computes there besides products with weights.
        self._libraries = {site.device: site.library for site in self.sites}
        self._readers = {device for device, library in self._libraries.items() if _reads(library)}
        # The embedding is looked up by the CPU; what follows the layers is computed where the last of them is.
        self.embed, last = tensor(get, outside.embed), self._at(config.num_layers - 1)
        self.dtype = dtype or self.embed.dtype
        self.norm, self.head = last.tensor(outside.norm), last.matrix(outside.head)
        experts = experts or resident([self._bind_experts(layer) for layer in range(config.num_moe_layers)])
        self.experts = wrap(experts) if wrap else experts

    def _at(self, layer: int) -> Binder:
        """What binds the weights of a layer."""
        return Binder(self.sites[layer], self._get, self._observer)

    @property
    def devices(self) -> list[torch.device]:
        """Where layers are, in their order."""
        return list(self._libraries)

    def _read_by_devices(self, step: Step) -> bool:
        """Whether layers on devices are told the same at every position, and read it there: see Step.places."""
        return bool(self._readers) and step.decodes and not self.quantize_kv and not torch.is_grad_enabled()

    def _there(self, step: Step, inputs: Inputs | Kept) -> dict[torch.device, tuple[Step, Tables]]:
        """The step for the layers of each device, and the tables there."""
        found, reads = {}, self._read_by_devices(step)
        for device in self._libraries:
            tables = inputs.at(device)
            places = self._places(tables) if reads and device in self._readers else None
            found[device] = replace(step, positions=tables["positions"], places=places), tables
        return found

    @abstractmethod
    def new_state(self) -> SequenceState:
        """An empty decode state for one sequence."""

    def forward(self, step: Step) -> Tensor:
        """Run one step; returns logits [R, vocab] float32 for step.logit_rows and advances every state in the step."""
        logits = self.compute(step, self.begin(step))
        # Waits for devices, so not before everything else is on its way.
        step.commit()
        return logits

    def begin(self, step: Step) -> Inputs:
        """Say that a step is to be computed, and look up what it needs."""
        self.experts.prepare(step.token_ids.shape[0])
        return self._inputs(step)

    @abstractmethod
    def _inputs(self, step: Step) -> Inputs:
        """What is looked up for a step: "positions" among the tables."""

    @abstractmethod
    def compute(self, step: Step, inputs: Inputs | Kept) -> Tensor:
        """Its logits, between begin() and Step.commit()."""

    def changes_at(self) -> list[int]:
        """Positions from which on a decode step tells devices something else than before."""
        return []

    def _places(self, tables: Tables) -> Places:
        """What a decode step on a device reads."""
        return Places(tables["positions"])

    @abstractmethod
    def _expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """w1, w2 and w3 of a routed expert. layer: of those that have experts."""

    def _bind_experts(self, layer: int) -> list[Expert]:
        c = self.config
        binder = self._at(c.num_layers - c.num_moe_layers + layer)
        return [binder.expert(self._expert_names(layer, e), c.swiglu_limit) for e in range(c.num_experts)]


def _reads(library: Library | DeviceOps | None) -> bool:
    """Whether it takes positions that are on the device."""
    return library is not None and not isinstance(library, Library)
