"""What localmoe-mini is trained on and for: batches of text, next-token loss, balanced experts, rounded weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from localmoe.kernels.codecs import fake_quantize_fp4, fake_quantize_fp8_block
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.model import ModelConfig
from localmoe.models.tensors import Published
from localmoe.step import RouterRecord, Step


class Corpus:
    """Documents back to back, each starting with BOS; batches are random windows that start at a document."""

    def __init__(self, directory: Path, split: str) -> None:
        self.ids = np.fromfile(directory / f"{split}.bin", dtype=np.uint16)
        self.mask = np.fromfile(directory / f"{split}_mask.bin", dtype=np.uint8)
        self.starts = np.flatnonzero(self.ids == 0)

    def batches(self, rng: np.random.Generator, count: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (ids, target mask), both [count, length + 1]; every document start is used once per epoch."""
        usable = self.starts[self.starts + length + 1 <= len(self.ids)]
        # Windows overlap their followers; a stride keeps an epoch close to one reading of the text.
        mean = max(len(self.ids) // max(len(self.starts), 1), 1)
        stride = max(length // mean, 1)
        if len(usable) // stride < count:
            found = f"{len(usable) // stride} windows of {length} tokens"
            raise ValueError(f"the text has {found}, a batch needs {count}")
        while True:
            order = rng.permutation(usable[rng.integers(stride) :: stride])
            for at in range(0, len(order) - count + 1, count):
                rows = order[at : at + count, None] + np.arange(length + 1)
                yield torch.from_numpy(self.ids[rows].astype(np.int64)), torch.from_numpy(self.mask[rows])


def loss_terms(model: DeepseekV4, ids: Tensor, weight: Tensor) -> tuple[Tensor, list[RouterRecord]]:
    """Weighted next-token loss of a batch [B, L + 1], each row a sequence of its own."""
    log: list[RouterRecord] = []
    step = Step.of([(model.new_state(), row) for row in ids[:, :-1].tolist()], all_logits=True, router_log=log)
    losses = F.cross_entropy(model.forward(step), ids[:, 1:].flatten(), reduction="none")
    w = weight[:, 1:].flatten()
    return (losses * w).sum() / w.sum(), log


def balance_loss(log: list[RouterRecord], num_experts: int) -> Tensor:
    """Load balancing as in Switch: E * sum_e (share of tokens on e) * (mean normalised score of e)."""
    terms = []
    for record in log:
        if record.scores is not None:
            share = torch.bincount(record.ids.flatten(), minlength=num_experts) / record.ids.numel()
            score = (record.scores / record.scores.sum(-1, keepdim=True)).mean(0)
            terms.append(num_experts * (share * score).sum())
    return torch.stack(terms).mean()


def expert_loads(log: list[RouterRecord], config: ModelConfig) -> Tensor:
    """How many tokens each expert of each layer received, [layers, E] float32."""
    loads = torch.zeros(config.num_layers, config.num_experts)
    for record in log:
        loads[record.layer] += torch.bincount(record.ids.flatten(), minlength=config.num_experts)
    return loads


@torch.no_grad()
def update_biases(parameters: dict[str, Tensor], loads: Tensor, step: float) -> None:
    """Auxiliary-loss-free balancing: lower the bias of experts above the mean load, raise the others."""
    for layer, load in enumerate(loads):
        bias = parameters.get(f"layers.{layer}.ffn.gate.bias")
        if bias is not None:
            bias += step * torch.sign(load.mean() - load)


def fake_quantized(published: Published, p: Tensor) -> Tensor:
    """The value the published checkpoint will hold, with gradients passed straight through."""
    with torch.no_grad():
        if published == "fp4":
            value = fake_quantize_fp4(p)
        elif published == "fp8_block":
            value = fake_quantize_fp8_block(p)
        elif published == "bf16":
            value = p.bfloat16().float()
        else:
            return p
    return p + (value - p).detach()
