"""Routed experts that are all in memory, computed in torch or by the C++ kernels.

`ExpertSource.apply` is the seam of the engine: whatever stores or computes experts elsewhere implements that method.
Knows layers and expert ids; does not know routers or tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmoe import ops
from localmoe.kernels import native
from localmoe.kernels.native import Mode
from localmoe.weights import DeviceWeight, NativeWeight, Weight, linear


@dataclass(frozen=True)
class Expert:
    """A clamped SwiGLU: w1 (gate) and w3 (up) [F, D], w2 (down) [D, F]."""

    w1: Weight
    w2: Weight
    w3: Weight
    limit: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        swiglu = self.w1.ops.swiglu if isinstance(self.w1, DeviceWeight) else ops.swiglu
        return linear(swiglu(linear(x, self.w1), linear(x, self.w3), self.limit), self.w2)

    def native_weights(self) -> tuple[NativeWeight, NativeWeight, NativeWeight] | None:
        """w1, w2 and w3 if the kernels can compute the expert in one call: all bound to them, gate and up alike."""
        w1, w2, w3 = self.w1, self.w2, self.w3
        if not (isinstance(w1, NativeWeight) and isinstance(w2, NativeWeight) and isinstance(w3, NativeWeight)):
            return None
        return (w1, w2, w3) if w1.matrix.format == w3.matrix.format else None


class ExpertSource(Protocol):
    """Anything that can compute a layer's routed experts. Only apply() has to do something.

    prompt_tokens: most of a prompt in one step, None for as many as usual."""

    prompt_tokens: int | None = None

    def prepare(self, tokens: int) -> None:
        """A step of so many tokens begins."""
        return

    def give_back(self) -> bool:
        """Give up some of the memory of devices, between steps; False if there is none to be given up."""
        return False

    def announce(self, layer: int, ids: Tensor, *, early: bool = False) -> None:
        """apply() is to follow with the same ids [T, K], so reading may begin. early: the step is not there yet."""
        return

    def leaves_device(self, layer: int) -> bool:
        """Whether apply() for tensors on a device has the CPU do something, or wait."""
        return True

    def wants_guess(self, layer: int) -> bool:
        """Whether guess() is worth its price for this layer, the next; to be asked once a layer."""
        return False

    def guess(self, layer: int, ids: Tensor) -> None:
        """apply() will probably ask for these ids [T, K]."""
        return

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum over k of weights[t, k] * expert ids[t, k] (hidden[t]).

        hidden: [T, D]; ids: [T, K] int64; weights: [T, K] float32. Returns [T, D] float32."""
        ...


class ResidentExperts(ExpertSource):
    """Experts held as tensors, run one by one over the tokens that chose them, in order of expert id."""

    def __init__(self, layers: Mapping[int, list[Expert]] | list[list[Expert]]) -> None:
        self._layers = layers

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertSource.apply. Each token's terms are added in order of expert id, whatever its batch mates."""
        experts, top_k = self._layers[layer], ids.shape[1]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        tokens = order // top_k
        counts = torch.bincount(flat, minlength=len(experts)).cpu().tolist()
        grouped = hidden[tokens].split(counts)
        outputs = [expert(x) for expert, x in zip(experts, grouped, strict=True) if len(x)]
        terms = torch.cat(outputs).float() * weights.flatten()[order][:, None]
        return torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device).index_add(0, tokens, terms)


class NativeExperts(ExpertSource):
    """Experts bound to the C++ kernels; a layer's whole sum is one call."""

    def __init__(self, layers: list[list[Expert]]) -> None:
        """All experts must have native_weights()."""
        self._layers = [NativeLayer(experts) for experts in layers]

    def apply(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See ExpertSource.apply. Each token's terms are added in order of expert id, whatever its batch mates."""
        return self._layers[layer](hidden, ids, weights)

    def layer(self, layer: int) -> NativeLayer:
        """For whoever computes more than the experts in a call."""
        return self._layers[layer]


class SharedExpert:
    """An expert that every token takes: like Expert, in one call."""

    def __init__(self, expert: Expert) -> None:
        self.w1, self.w2 = expert.w1, expert.w2
        self.native = NativeLayer([expert])

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D] float32."""
        return self.native(
            x, x.new_zeros((x.shape[0], 1), dtype=torch.long), x.new_ones((x.shape[0], 1), dtype=torch.float32)
        )


class NativeLayer:
    """One layer's experts as the library reads them."""

    def __init__(self, experts: list[Expert]) -> None:
        weights = [expert.native_weights() for expert in experts]
        bound = [each for each in weights if each is not None]
        assert len(bound) == len(experts), "experts bound to the kernels"
        self._library = bound[0][0].library
        self.mode: Mode = "strict" if any(w.mode == "strict" for each in bound for w in each) else "fast"
        self.table = native.Experts([(w1.matrix, w2.matrix, w3.matrix) for w1, w2, w3 in bound], experts[0].limit)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._library.experts(self.table, hidden.float(), ids, weights, mode=self.mode)


def resident(layers: list[list[Expert]]) -> ExpertSource:
    """The fastest source for these experts."""
    return NativeExperts(layers) if all(_alike(experts) for experts in layers) else ResidentExperts(layers)


def _alike(experts: list[Expert]) -> bool:
    """True if the kernels can compute all of a layer's experts in one call: bound to them, and of the same formats."""
    bound = [expert.native_weights() for expert in experts]
    return None not in bound and len({(w[0].matrix.format, w[1].matrix.format) for w in bound if w}) == 1


def shared(expert: Expert) -> Expert | SharedExpert:
    """The fastest form of a shared expert."""
    return SharedExpert(expert) if expert.native_weights() else expert
