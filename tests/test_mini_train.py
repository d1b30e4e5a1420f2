"""The trainer of localmoe-mini on a toy: it learns, it goes on where it stopped, and what it exports can be loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe import ops
from localmoe.api import LLM
from localmoe.kernels.codecs import fake_quantize_fp4, fake_quantize_fp8_block
from localmoe.mini import fused, losses, parameters, shape, train
from localmoe.mini.export import export
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_names import tensor_inventory
from localmoe.models.tensors import Published
from localmoe.sampler import SamplingParams
from localmoe.step import RouterRecord, Step
from tests.loops import noise
from tests.tiny_engine import bind, difference
from tests.tiny_tokenizer import tiny_description, tiny_tokenizer

VOCAB = tiny_tokenizer().vocab_size
TOY: dict[str, Any] = {
    "layer_types": [shape.SLIDING, shape.CSA, shape.HCA],
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "sliding_window": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "vocab_size": VOCAB,
}
TEXT = tiny_tokenizer().encode("a story about a brave frog; ")
PLAN = train.Plan(size="toy", minutes=10.0, context=32, sequences=2, workers=1, fused=0)


@pytest.fixture(autouse=True)
def toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shape.SIZES, "toy", TOY)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty documents of one sentence over and over, and the tokenizer; every second token is a target."""
    document = [0, *TEXT * 3]
    for split in ("train", "held_out"):
        np.array(document * 40, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
        (np.arange(len(document) * 40) % 2).astype(np.uint8).tofile(tmp_path / f"{split}_mask.bin")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_description()))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def feed(trainer: train.Trainer, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    return trainer.train.batches(np.random.default_rng(seed), trainer.plan.sequences, trainer.plan.context)


def at(trainer: train.Trainer, progress: float) -> train.Trainer:
    trainer.elapsed = progress * trainer.plan.minutes * 60
    return trainer


def test_a_few_steps_reduce_the_loss(data: Path, tmp_path: Path) -> None:
    """Fails if gradients have the wrong sign, or reach too few weights to learn one sentence."""
    trainer = at(train.Trainer(data, tmp_path / "run", PLAN), 0.2)
    batches = feed(trainer)
    losses = [trainer.step(batches)["loss"] for _ in range(12)]
    assert losses[0] == pytest.approx(np.log(VOCAB), rel=0.1)
    assert losses[-1] < 0.75 * losses[0]
    assert trainer.evaluate(2) < 0.75 * losses[0]


def test_training_goes_on_with_quantized_weights_at_the_end(data: Path, tmp_path: Path) -> None:
    """Fails if the last part of a run does not see the weights that will be published."""
    trainer = train.Trainer(data, tmp_path / "run", PLAN)
    name = "layers.1.attn.wq_a.weight"
    plain, rounded = (at(trainer, progress).model().blocks[1].attention.wq_a for progress in (0.5, 0.95))
    assert plain is trainer.parameters[name]
    assert isinstance(rounded, Tensor)
    assert torch.equal(rounded, fake_quantize_fp8_block(trainer.parameters[name].detach()))
    before = trainer.parameters[name].detach().clone()
    assert np.isfinite(trainer.step(feed(trainer))["loss"])
    assert not torch.equal(trainer.parameters[name], before)


def test_a_resumed_run_takes_the_same_next_step(data: Path, tmp_path: Path) -> None:
    """Fails if a parameter, a moment of an optimizer or the clock is not saved."""
    run = tmp_path / "run"
    run.mkdir()
    first = at(train.Trainer(data, run, PLAN), 0.3)
    for _ in range(2):
        first.step(feed(first))
    first.steps = 2
    first.save()
    second = train.Trainer(data, run, PLAN)
    assert (second.steps, second.tokens, second.elapsed) == (2, first.tokens, first.elapsed)
    assert first.step(feed(first, 1)) == second.step(feed(second, 1))
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def trained_run(data: Path, run: Path, minutes: float) -> train.Trainer:
    """The state of a run after fit() with so many minutes in all; at least one step beyond the state before."""
    train.Trainer(data, run, replace(PLAN, minutes=minutes)).fit()
    return train.Trainer(data, run, PLAN)


def test_a_run_is_trained_exported_and_loaded(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if any of the files between the trainer and LLM does not fit, or a second run starts over."""
    evaluate = train.Trainer.evaluate
    monkeypatch.setattr(train.Trainer, "evaluate", lambda trainer, batches=8: evaluate(trainer, 1))
    run, out = tmp_path / "run", tmp_path / "model"
    first = trained_run(data, run, minutes=1e-6)
    trained = trained_run(data, run, minutes=first.elapsed / 60 + 1e-6)
    assert 0 < first.steps < trained.steps
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_out" in row] == [first.steps, trained.steps]
    export(run, data, out)
    llm = LLM(out, kernels="reference")
    assert llm.generate("a brave", SamplingParams(temperature=0, max_tokens=3))[0].error is None
    inventory = tensor_inventory(llm.config)
    values = {n: losses.fake_quantized(inventory[n].published, p.detach()) for n, p in trained.parameters.items()}
    ids = [0, *TEXT]
    with torch.no_grad():
        model = bind(shape.config_json("toy"), values)
        expected = model.forward(Step.of([(model.new_state(), ids)], all_logits=True))
    assert difference(llm.logits(ids), expected) <= 2e-5


def test_the_learning_rate_warms_up_holds_and_decays(data: Path, tmp_path: Path) -> None:
    trainer = train.Trainer(data, tmp_path / "run", PLAN)
    scales = [at(trainer, p).learning_scale() for p in (0.0, 0.005, 0.2, 0.5, 0.75, 1.0)]
    assert scales == pytest.approx([0.01, 0.51, 1, 1, 0.5, 0.02])


def test_batches_begin_at_documents_and_use_each_once_per_epoch(data: Path) -> None:
    """Fails if a window begins in the middle of a text, or the targets are not the ids moved by one."""
    corpus = losses.Corpus(data, "train")
    batches = corpus.batches(np.random.default_rng(0), 3, 16)
    for _ in range(20):
        ids, mask = next(batches)
        assert ids.shape == mask.shape == (3, 17)
        assert (ids[:, 0] == 0).all()
        assert ids[0].tolist() == [0, *TEXT * 3][:17]


def test_a_text_smaller_than_a_batch_is_refused(data: Path) -> None:
    """Fails by waiting forever for a batch that never fills."""
    with pytest.raises(ValueError, match="40 windows of 16 tokens, a batch needs 41"):
        next(losses.Corpus(data, "train").batches(np.random.default_rng(0), 41, 16))


def test_prompts_weigh_less_than_replies() -> None:
    """Worked out by hand from the model's own logits."""
    config = shape.config_json("toy")
    fresh = parameters.initial_parameters(DeepseekV4Config.from_dict(config), np.ones(VOCAB), seed=0)
    model = bind(config, fresh)
    ids, weight = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[1.0, 0.1, 0.1, 1.0]])
    with torch.no_grad():
        loss, log = losses.loss_terms(model, ids, weight)
        logits = model.forward(Step.of([(model.new_state(), [0, 5, 6])], all_logits=True))
    terms = -logits.log_softmax(-1)[range(3), [5, 6, 7]]
    assert float(loss) == pytest.approx(float((0.1 * terms[0] + 0.1 * terms[1] + terms[2]) / 1.2), rel=1e-5)
    assert len(log) == 3


def test_the_hash_table_spreads_the_load_of_the_training_text() -> None:
    """Fails if a few frequent tokens fill some experts, or a token is given one expert twice."""
    counts = np.array([1000 / (i + 10) for i in range(300)])
    table = parameters.balanced_hash(counts, num_experts=8, top_k=2)
    assert (table[:, 0] != table[:, 1]).all()
    load = torch.zeros(8).double().index_add(0, table.flatten(), torch.from_numpy(counts).repeat_interleave(2))
    assert load.max() / load.mean() < 1.01
    assert load.min() / load.mean() > 0.99


def record(scores: Tensor | None, ids: list[list[int]], layer: int = 1) -> RouterRecord:
    return RouterRecord(layer, scores, torch.tensor(ids))


def test_the_balance_loss_is_one_when_even_and_more_otherwise() -> None:
    """Fails if hash layers count, or the loss does not fall when the busiest expert's score does."""
    even = torch.ones(4, 2)
    spread, crowded = [[0], [1], [0], [1]], [[0], [0], [0], [1]]
    hashed = record(None, crowded, layer=0)
    assert float(losses.balance_loss([hashed, record(even, spread)], 2)) == pytest.approx(1)
    skewed = torch.tensor([[3.0, 1.0]] * 4, requires_grad=True)
    loss = losses.balance_loss([hashed, record(skewed, crowded)], 2)
    assert float(loss.detach()) == pytest.approx(2 * (0.75 * 0.75 + 0.25 * 0.25))
    loss.backward()
    assert skewed.grad is not None
    assert (skewed.grad[:, 0] > 0).all()
    assert (skewed.grad[:, 1] < 0).all()


def test_biases_move_against_the_load() -> None:
    """Fails if the busiest expert is made busier. Layer 0 is hashed and has no bias."""
    config = DeepseekV4Config.from_dict(shape.config_json("toy"))
    loads = losses.expert_loads([record(None, [[0, 1]], 0), record(None, [[2, 0], [2, 1]], 1)], config)
    assert loads.tolist() == [[1, 1, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0]]
    bias = torch.zeros(4)
    losses.update_biases({"layers.1.ffn.gate.bias": bias}, loads, 0.5)
    assert bias.tolist() == [0, 0, -0.5, 0.5]


@pytest.mark.parametrize(
    ("published", "expected"),
    [("fp4", fake_quantize_fp4), ("fp8_block", fake_quantize_fp8_block), ("bf16", None), ("f32", None)],
)
def test_fake_quantized_weights_pass_gradients_unchanged(published: Published, expected: Any) -> None:
    """Fails if the forward sees other values than the checkpoint will hold, or rounding stops the gradient."""
    p = noise(64, 64).requires_grad_()
    value = losses.fake_quantized(published, p)
    target = {"bf16": p.bfloat16().float(), "f32": p}.get(published)
    assert difference(value, expected(p.detach()) if target is None else target) <= 1e-7
    (value * noise(64, 64, seed=1)).sum().backward()
    assert torch.equal(p.grad if p.grad is not None else p, noise(64, 64, seed=1))


def test_every_published_format_is_fake_quantized() -> None:
    """Fails if training does not see the rounding of what is published."""
    for name in ("fp8_block", "fp4"):
        assert not torch.equal(losses.fake_quantized(name, noise(64, 64)), noise(64, 64))  # type: ignore[arg-type]


def test_the_two_optimizers_share_the_parameters() -> None:
    """Fails if embeddings, routers or mixing parameters are orthogonalised."""
    inventory = tensor_inventory(DeepseekV4Config.from_dict(shape.config_json("toy")))
    muon = {n for n, spec in inventory.items() if parameters.is_muon(n, torch.empty(spec.shape, device="meta"))}
    assert {"layers.0.attn.wq_a.weight", "layers.1.ffn.experts.0.w1.weight"} <= muon
    assert not {n for n in muon if any(part in n for part in ("embed", "head", "hc_", "ffn.gate.", ".ape", "norm"))}


def test_fused_hyper_connections_compute_the_same() -> None:
    """Fails if the trainer and the engine mix streams differently. Not compiled here: that takes a minute."""
    streams, post, comb, y = noise(7, 4, 5), noise(7, 4, seed=1), noise(7, 4, 4, seed=2), noise(7, 5, seed=3)
    assert difference(fused.hyper_collapse(streams, post), ops.hyper_collapse(streams, post)) <= 1e-5
    expanded = fused.hyper_expand(streams, y, post, comb)
    assert difference(expanded, ops.hyper_expand(streams, y, post, comb)) <= 1e-5
