"""Train localmoe-mini through the project's own forward, on the CPU; resumable, bounded by minutes.

Owns parameters, data order, losses and the schedule. The forward is localmoe.models.deepseek_v4 unchanged: the same
code that answers in the chat, with float32 tensors bound instead of a checkpoint.
Run: python -m localmoe.mini.train DATA_DIR RUN_DIR --size cpu --minutes 60"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from localmoe.checkpoint import Checkpoint
from localmoe.mini.fused import fuse_hyper_connections
from localmoe.mini.losses import (
    Corpus,
    balance_loss,
    expert_loads,
    fake_quantized,
    loss_terms,
    update_biases,
)
from localmoe.mini.optimizer import Muon
from localmoe.mini.parameters import EMBEDDINGS, initial_parameters, is_muon
from localmoe.mini.shape import config_json
from localmoe.models.deepseek_v4 import DeepseekV4
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.family import tensor_inventory
from localmoe.safetensors_io import write_safetensors


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run. Prompts are learned with a small weight so that their words get embeddings."""

    size: str = "cpu"
    minutes: float = 60.0
    context: int = 512
    sequences: int = 4
    accumulate: int = 1
    workers: int = 2
    muon_lr: float = 2.5e-3
    embed_lr: float = 3e-3
    mixing_lr: float = 5e-4
    warmup: float = 0.01
    decay_from: float = 0.5
    quantize_from: float = 0.9
    prompt_weight: float = 0.1
    balance_weight: float = 0.01
    bias_step: float = 1e-3
    seed: int = 1
    fused: int = 1


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all workers."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for t, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(value.view_as(t))


class Trainer:
    """One run: parameters, optimizers, elapsed training time, and the files of RUN_DIR."""

    def __init__(self, data: Path, run: Path, plan: Plan, rank: int = 0) -> None:
        self.plan, self.run, self.rank = plan, run, rank
        self.raw_config = config_json(plan.size)
        self.config = DeepseekV4Config.from_dict(self.raw_config)
        self.inventory = tensor_inventory(self.config)
        self.train, self.held_out = Corpus(data, "train"), Corpus(data, "held_out")
        counts = np.bincount(self.train.ids, minlength=self.config.vocab_size)
        self.parameters = initial_parameters(self.config, counts, plan.seed)
        learned = {n: p for n, p in self.parameters.items() if p.requires_grad}
        matrices = [p for n, p in learned.items() if is_muon(n, p)]
        self.muon = Muon(matrices)
        # Routers and hyper-connections steer everything after them: at the embedding's rate they diverge.
        rates = {n: plan.embed_lr if n in EMBEDDINGS else plan.mixing_lr for n in learned}
        groups = [{"params": [p], "lr": rates[n], "rate": rates[n]} for n, p in learned.items() if not is_muon(n, p)]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.elapsed, self.steps, self.tokens = 0.0, 0, 0
        if (run / "state").exists():
            self._resume()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name; values are shared with the run."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"muon.{i}": buffer for i, buffer in enumerate(self.muon.buffers)}
        for i, moments in enumerate(self.adam.state.values()):
            tensors |= {f"adam.{i}.{key}": value for key, value in moments.items()}
        return tensors

    def _resume(self) -> None:
        with Checkpoint.open(self.run / "state") as saved:
            values = {name: saved.read(ref) for name, ref in saved.refs.items()}
        self.elapsed, self.steps, self.tokens = (
            f(v) for f, v in zip((float, int, int), values.pop("clock"), strict=True)
        )
        for i, p in enumerate(p for group in self.adam.param_groups for p in group["params"]):
            self.adam.state[p] = {key: values[f"adam.{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for name, tensor in self._tensors().items():
            tensor.copy_(values[name])

    def save(self) -> None:
        """Write the run's state under RUN_DIR/state; complete or not at all."""
        clock = torch.tensor([self.elapsed, self.steps, self.tokens], dtype=torch.float64)
        (self.run / "state").mkdir(exist_ok=True)
        write_safetensors(self.run / "state" / "model.safetensors", {**self._tensors(), "clock": clock})

    @property
    def progress(self) -> float:
        return self.elapsed / (self.plan.minutes * 60)

    def learning_scale(self) -> float:
        """Warm up, hold, then decay linearly to 2 %."""
        warm = min(1.0, (self.progress + 1e-4) / self.plan.warmup)
        left = (1 - self.progress) / (1 - self.plan.decay_from)
        return warm * max(min(1.0, left), 0.02)

    def model(self) -> DeepseekV4:
        if self.progress < self.plan.quantize_from:
            return DeepseekV4(self.config, self.parameters.__getitem__)
        return DeepseekV4(self.config, lambda n: fake_quantized(self.inventory[n].published, self.parameters[n]))

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One optimizer step over `accumulate` micro-batches."""
        total, balance = 0.0, 0.0
        loads = torch.zeros(self.config.num_layers, self.config.num_experts)
        for _ in range(self.plan.accumulate):
            ids, mask = next(batches)
            weight = mask.float().clamp(min=self.plan.prompt_weight)
            loss, log = loss_terms(self.model(), ids, weight)
            even = balance_loss(log, self.config.num_experts)
            ((loss + self.plan.balance_weight * even) / self.plan.accumulate).backward()
            total, balance = total + loss.item(), balance + even.item()
            loads += expert_loads(log, self.config)
            self.tokens += (ids.numel() - len(ids)) * self.plan.workers
        learned = [p for p in self.parameters.values() if p.requires_grad]
        for p in learned:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        average([loads, *(p.grad for p in learned if p.grad is not None)])
        others = [p for g in self.adam.param_groups for p in g["params"]]
        norm = torch.nn.utils.clip_grad_norm_(others, 1.0)
        scale = self.learning_scale()
        self.muon.step(self.plan.muon_lr * scale)
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * scale
        self.adam.step()
        for p in self.parameters.values():
            p.grad = None
        update_biases(self.parameters, loads, self.plan.bias_step * min(1.0, scale * 2))
        n = self.plan.accumulate
        return {"loss": total / n, "balance": balance / n, "norm": float(norm), "scale": scale}

    @torch.no_grad()
    def evaluate(self, batches: int = 8) -> float:
        """Mean target loss on a fixed sample of the held-out text."""
        feed = self.held_out.batches(np.random.default_rng(0), self.plan.sequences, self.plan.context)
        losses = []
        for _ in range(batches):
            ids, mask = next(feed)
            losses.append(loss_terms(self.model(), ids, mask.float())[0].item())
        return float(np.mean(losses))

    def fit(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "plan.json").write_text(json.dumps(asdict(self.plan), indent=1))
        (self.run / "config.json").write_text(json.dumps(self.raw_config, indent=2) + "\n")
        rng = np.random.default_rng([self.plan.seed, self.steps, self.rank])
        feed = self.train.batches(rng, self.plan.sequences, self.plan.context)
        last = saved = time.monotonic()
        while self.progress < 1:
            report = self.step(feed)
            now = time.monotonic()
            clock = torch.tensor(self.elapsed + now - last, dtype=torch.float64)
            average([clock])
            self.elapsed, last = clock.item(), now
            self.steps += 1
            if self.steps % 50 == 0:
                report["held_out"] = self.evaluate()
            if self.rank == 0 and self.steps % 5 == 0:
                self._log(report)
            if self.rank == 0 and now - saved > 120:
                self.save()
                saved = now
        if self.rank == 0:
            self.save()
            self._log({"held_out": self.evaluate(32)})

    def _log(self, report: dict[str, float]) -> None:
        row = {"step": self.steps, "tokens": self.tokens, "minutes": round(self.elapsed / 60, 2), **report}
        with (self.run / "log.jsonl").open("a") as out:
            out.write(json.dumps({k: round(v, 5) for k, v in row.items()}) + "\n")
        print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def work(rank: int, data: Path, run: Path, plan: Plan) -> None:
    """One of plan.workers processes, each on its share of the threads and its own batches."""
    torch.set_num_threads(max((os.cpu_count() or 1) // plan.workers, 1))
    if plan.workers > 1:
        rendezvous = f"file://{run.resolve()}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=plan.workers)
    if plan.fused:
        fuse_hyper_connections()
    Trainer(data, run, plan, rank).fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="directory made by localmoe.mini.corpus")
    parser.add_argument("run", type=Path, help="directory for the state and the log; an existing run goes on")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = vars(parser.parse_args())
    data, run = args.pop("data"), args.pop("run")
    run.mkdir(parents=True, exist_ok=True)
    (run / "rendezvous").unlink(missing_ok=True)
    plan = Plan(**args)
    spawn(work, (data, run, plan), nprocs=plan.workers)


if __name__ == "__main__":
    main()
