"""Routers: which experts a token takes, and with what weights. One way through, three ways to score and choose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from localmoe import ops
from localmoe.device_ops import Scoring
from localmoe.kernels.native import Matrix, Mode, Routing
from localmoe.step import RouterRecord, Step
from localmoe.weights import DeviceWeight, Weight, linear_float32


@dataclass(frozen=True, kw_only=True)
class Router(ABC):
    """gate [E, D]. The chosen experts' scores, normalised to a sum of 1 if asked, times scale, are the weights."""

    gate: Weight
    top_k: int
    scale: float
    normalize: bool
    # [V, K]: the experts of each token id, where it alone decides.
    tid2eid: Tensor | None = None
    # [E], helps to choose and does not weigh.
    bias: Tensor | None

    @property
    @abstractmethod
    def scoring(self) -> Scoring:
        """How logits become scores."""

    @property
    def grouping(self) -> tuple[int, int, int]:
        """Groups, how many of them are kept, and how many of a group's best experts say how good it is."""
        return 1, 1, 1

    def __call__(self, x: Tensor, step: Step, layer: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, D] -> expert ids [T, K] and weights [T, K] float32. Logits are fp32: both operands are upcast.

        chosen: of a router by token id only, what the ids choose."""
        assert (chosen is None) == (self.tid2eid is None), "token ids choose, or scores"
        if isinstance(self.gate, DeviceWeight) and step.router_log is None and not torch.is_grad_enabled():
            logits, bias = linear_float32(x, self.gate), self.bias
            return self.gate.ops.route(
                logits, bias, self.top_k, self.scale,
                normalize=self.normalize, scoring=self.scoring, groups=self.grouping, given=chosen,
            )  # fmt: skip
        scores = self.scores(x)
        ids = self.choose(scores) if chosen is None else chosen
        if step.router_log is not None:
            step.router_log.append(RouterRecord(layer, scores if self.tid2eid is None else None, ids))
        return ids, ops.routing_weights(scores, ids, self.scale, normalize=self.normalize)

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E] float32."""

    @abstractmethod
    def choose(self, scores: Tensor) -> Tensor:
        """Scores [T, E] -> expert ids [T, K]; not of a router by token id."""


@dataclass(frozen=True, kw_only=True)
class BiasRouter(Router):
    """DeepSeek-V4: score + bias [E] chooses. bias is None where tid2eid does."""

    @property
    def scoring(self) -> Scoring:
        return "sqrtsoftplus"

    def scores(self, x: Tensor) -> Tensor:
        return ops.router_scores(linear_float32(x, self.gate))

    def choose(self, scores: Tensor) -> Tensor:
        assert self.bias is not None, "a score router has a bias"
        return ops.route(scores.detach(), self.bias, self.top_k)


@dataclass(frozen=True, kw_only=True)
class GroupRouter(Router):
    """DeepSeek-V2 and -V3: an expert is chosen from the `keep` best of `groups` groups.

    bias [E]: V3's, which helps to choose and does not weigh; None: softmax scores, as in V2. A group is as good as its
    best expert in V2, and as its two best in V3."""

    groups: int
    keep: int

    @property
    def scoring(self) -> Literal["softmax", "sigmoid"]:
        return "softmax" if self.bias is None else "sigmoid"

    @property
    def grouping(self) -> tuple[int, int, int]:
        return self.groups, self.keep, 1 if self.bias is None else 2

    def scores(self, x: Tensor) -> Tensor:
        logits = linear_float32(x, self.gate)
        return logits.softmax(dim=-1) if self.bias is None else logits.sigmoid()

    def choose(self, scores: Tensor) -> Tensor:
        scores = scores.detach()
        if self.bias is not None:
            scores = scores + self.bias
        if self.groups > 1:
            scores = ops.choose_groups(scores, *self.grouping)
        return ops.select_top(scores, self.top_k)

    def routing(self, gate: Matrix, mode: Mode) -> Routing:
        """This router for the C++ kernels."""
        return Routing(gate, mode, self.bias, self.top_k, self.scoring, self.scale, self.normalize, *self.grouping)
