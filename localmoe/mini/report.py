"""Facts about a trained localmoe-mini for its model card: loss curve, held-out loss, expert load, sample stories.

Measures the exported weights (quantized, as shipped), not the training state.
Run: python -m localmoe.mini.report RUN_DIR DATA_DIR OUT_DIR"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from localmoe.api import LLM
from localmoe.mini.losses import Corpus, expert_loads
from localmoe.sampler import SamplingParams
from localmoe.step import RouterRecord, Step

PROMPTS = (
    "Tell me a story about a brave frog.",
    "Write a short story about a little girl named Lily and a red ball.",
    "Who are you?",
    "How do I load my own model?",
)


@torch.inference_mode()
def held_out(llm: LLM, data: Path, sequences: int = 48, length: int = 512) -> tuple[float, torch.Tensor]:
    """Mean target loss in nats per token, and tokens per expert [layers, E], over held-out text."""
    feed = Corpus(data, "held_out").batches(np.random.default_rng(0), 1, length)
    losses, weights = [], []
    loads = torch.zeros(llm.config.num_layers, llm.config.num_experts)
    for _ in range(sequences):
        ids, mask = next(feed)
        log: list[RouterRecord] = []
        step = Step.of([(llm.engine.model.new_state(), ids[0, :-1].tolist())], all_logits=True, router_log=log)
        loss = F.cross_entropy(llm.engine.model.forward(step), ids[0, 1:], reduction="none")
        weight = mask[0, 1:].float()
        losses.append(float((loss * weight).sum()))
        weights.append(float(weight.sum()))
        loads += expert_loads(log, llm.config)
    return sum(losses) / sum(weights), loads


def load_table(loads: torch.Tensor) -> str:
    """Markdown table of each layer's busiest expert over the mean, and its idlest."""
    rows = ["| layer | max / mean | min / mean |", "|---|---|---|"]
    for layer, load in enumerate(loads):
        mean = load.mean()
        rows.append(f"| {layer} | {load.max() / mean:.2f} | {load.min() / mean:.2f} |")
    return "\n".join(rows)


def plot_losses(log: Path, out: Path) -> None:
    """Training and held-out loss against tokens, as a PNG. Needs matplotlib (the dev extra)."""
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, style in (("loss", {"linewidth": 0.8, "alpha": 0.7}), ("held_out", {"marker": "o", "markersize": 3})):
        points = [(row["tokens"] / 1e6, row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), label="training" if key == "loss" else "held out", **style)
    axes.set(xlabel="million tokens", ylabel="loss, nats per token", title="localmoe-mini")
    axes.set_ylim(top=4.5)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("run", "data", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plot_losses(args.run / "log.jsonl", args.out / "loss.png")
    llm = LLM()
    loss, loads = held_out(llm, args.data)
    print(f"held-out loss of the shipped (quantized) weights: {loss:.3f} nats per token\n\n{load_table(loads)}\n")
    for prompt in PROMPTS:
        params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=300)
        print(f"### {prompt}\n{llm.chat([{'role': 'user', 'content': prompt}], params).text}\n")


if __name__ == "__main__":
    main()
