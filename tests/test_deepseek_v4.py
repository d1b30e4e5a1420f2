"""The V4 forward: against transformers, against a decoder in numpy, and against itself in every order of work."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe import step_size, weights
from localmoe.engine import Engine
from localmoe.formats import FORMATS
from localmoe.layers import sparse
from localmoe.layers.compressor import quantize_latent
from localmoe.models.deepseek_v4_config import DeepseekV4Config
from localmoe.models.deepseek_v4_names import tensor_inventory
from localmoe.step import RouterRecord, Step
from tests.numpy_v4 import NumpyV4
from tests.tiny_engine import as_bf16, bind, difference, run, token_ids
from tests.tiny_v4 import CSA, HCA, SLIDING, build_transformers, random_state, rounded_state, tiny_config

# Logits have a spread of about 1. An oracle adds up in another order; two runs of ours only in other chunks.
ORACLE, CHUNKING = 5e-5, 2e-5

# All layer types, both kinds of routers; 310 tokens make 77 CSA entries for a top-k of 4 and 19 HCA entries.
# Fewer Sinkhorn iterations than published, because they are most of the time of a tiny step.
SMALL = tiny_config(hc_sinkhorn_iters=5)
# The ratios and the window of the published models: 310 tokens make two HCA entries.
REAL = tiny_config(compress_rates={CSA: 4, HCA: 128}, sliding_window=128, index_topk=16)
# As many entries as the indexer may choose, or fewer: scoring is skipped.
ALL_CHOSEN = tiny_config(layer_types=[CSA, SLIDING], index_topk=512)
CONFIGS = {"small": SMALL, "real": REAL, "all chosen": ALL_CHOSEN}
IDS = token_ids(310)


@functools.cache
def engine_of(name: str) -> Engine:
    return Engine(bind(CONFIGS[name], random_state(CONFIGS[name])))


@functools.cache
def at_once(name: str) -> Tensor:
    return run(engine_of(name), IDS)


@functools.cache
def in_chunks(name: str, chunk: int) -> Tensor:
    return run(engine_of(name), IDS, chunk)


@functools.cache
def by_transformers(name: str) -> Tensor:
    return transformers_logits(CONFIGS[name], random_state(CONFIGS[name]), IDS)


def transformers_logits(config: dict[str, Any], state: dict[str, Tensor], ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = build_transformers(config, state)(torch.tensor([ids])).logits[0]
    return logits


def numpy_logits(config: dict[str, Any], state: dict[str, Tensor], ids: list[int]) -> Tensor:
    decoder = NumpyV4(config, state)
    return torch.from_numpy(np.stack([decoder.next(i) for i in ids])).float()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str) -> None:
    """The oracle test: fails for any mistake in the forward that shows within 310 tokens."""
    pytest.importorskip("transformers")
    assert difference(at_once(name), by_transformers(name)) <= ORACLE


def test_decoding_equals_transformers_prefill() -> None:
    """Fails if decode picks other entries than prefill once there are more than index_topk of them."""
    pytest.importorskip("transformers")
    assert difference(in_chunks("small", 1), by_transformers("small")) <= ORACLE


def test_decoding_across_a_closing_window_of_128_equals_transformers_prefill() -> None:
    """Fails if the entry that closes with the 128th token is seen too early or too late."""
    pytest.importorskip("transformers")
    engine = engine_of("real")
    session = engine.new_session()
    prefill = run(engine, IDS[:120], session=session)
    decoded = run(engine, IDS[120:140], chunk=1, session=session)
    assert difference(torch.cat((prefill, decoded)), by_transformers("real")[:140]) <= ORACLE


def test_logits_equal_a_decoder_in_numpy() -> None:
    """The same oracle without transformers: 100 tokens, 25 CSA entries for a top-k of 4, 6 HCA entries."""
    ids = IDS[:100]
    expected = numpy_logits(SMALL, random_state(SMALL), ids)
    assert difference(at_once("small")[: len(ids)], expected) <= ORACLE


def test_numpy_follows_the_published_ratios() -> None:
    """Fails if an entry is seen before its 128th token, or not at it."""
    config = tiny_config(layer_types=[HCA], compress_rates={CSA: 4, HCA: 128}, num_hash_layers=0)
    state = random_state(config, seed=2)
    engine = Engine(bind(config, state))
    assert difference(run(engine, IDS[:140]), numpy_logits(config, state, IDS[:140])) <= ORACLE


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_any_chunking_gives_the_same_logits(chunk: int) -> None:
    """Fails if anything is lost or seen twice at a chunk's border."""
    assert difference(in_chunks("small", chunk), at_once("small")) <= CHUNKING


@pytest.mark.parametrize("chunk", [64, 127, 129])
def test_any_chunking_gives_the_same_logits_at_the_published_ratios(chunk: int) -> None:
    """Fails if a window of 128 must be closed by one chunk, or at a chunk's end."""
    assert difference(run(engine_of("real"), IDS, chunk), at_once("real")) <= CHUNKING


@pytest.mark.parametrize("name", ["small", "real"])
@pytest.mark.parametrize("lengths", [(40, 9), (130, 1, 17)])
def test_sequences_of_different_lengths_share_a_step(name: str, lengths: tuple[int, ...]) -> None:
    """Fails if rows of one sequence reach another. Prefill together, then one token each, then chunks of all sizes."""
    engine = engine_of(name)
    texts = [token_ids(length + 14, seed) for seed, length in enumerate(lengths)]
    alone = [run(engine, ids) for ids in texts]
    sessions = [engine.new_session() for _ in texts]
    together: list[list[Tensor]] = [[] for _ in texts]
    plans = [lengths, [1] * len(texts), range(3, 3 + len(texts)), [1] * len(texts)]
    for plan in plans:
        work = [(s, ids[s.length : s.length + n]) for s, ids, n in zip(sessions, texts, plan, strict=True)]
        logits = engine.advance(work, all_logits=True).logits
        for i, part in enumerate(logits.split([len(chunk) for _, chunk in work])):
            together[i].append(part)
    for mine, reference in zip(together, alone, strict=True):
        found = torch.cat(mine)
        assert difference(found, reference[: len(found)]) <= CHUNKING


def test_only_the_last_row_of_each_chunk_gives_logits_unless_all_are_asked_for() -> None:
    engine = engine_of("small")
    a, b = engine.new_session(), engine.new_session()
    last = engine.advance([(a, IDS[:9]), (b, IDS[:4])]).logits
    assert difference(last, at_once("small")[[8, 3]]) <= CHUNKING


def with_repeats(config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights whose hash tables name one expert twice for every second token."""
    state = random_state(config)
    for name, table in state.items():
        if name.endswith("tid2eid"):
            table[::2, 1] = table[::2, 0]
    return state


def test_a_repeated_expert_in_a_hash_table_counts_twice() -> None:
    """Fails if a token's experts are made distinct."""
    config, ids = tiny_config(layer_types=[SLIDING, CSA]), IDS[:40]
    state = with_repeats(config)
    logits = run(Engine(bind(config, state)), ids)
    assert difference(logits, numpy_logits(config, state, ids)) <= ORACLE
    assert difference(logits, run(Engine(bind(config, random_state(config))), ids)) > 0.01


def test_a_repeated_expert_counts_as_in_transformers() -> None:
    pytest.importorskip("transformers")
    config, ids = tiny_config(layer_types=[SLIDING, CSA]), IDS[:40]
    state = with_repeats(config)
    logits = run(Engine(bind(config, state)), ids)
    assert difference(logits, transformers_logits(config, state, ids)) <= ORACLE


@pytest.mark.parametrize(
    ("name", "length"),
    [("small", n) for n in (1, 3, 4, 5, 15, 16, 17, 31)] + [("real", n) for n in (127, 128, 129)],
)
def test_going_back_to_a_mark_leaves_no_trace(name: str, length: int) -> None:
    """Fails at the borders of CSA and HCA windows if a ring, an open row or an entry keeps the abandoned tokens."""
    engine = engine_of(name)
    session, straight = engine.new_session(), engine.new_session()
    run(engine, IDS[:length], session=session)
    session.mark()
    run(engine, token_ids(40, seed=9), session=session)
    session.rewind(length)
    run(engine, IDS[:length], session=straight)
    for chunk in (1, 5, 1):
        ids = token_ids(chunk, seed=chunk)
        assert torch.equal(run(engine, ids, session=session), run(engine, ids, session=straight))


def test_packed_weights_compute_as_their_values() -> None:
    """Fails if a quantized matrix, or one group's rows of wo_a, takes another path than a plain one."""
    state = random_state(SMALL)
    plain: dict[str, Any] = rounded_state(SMALL, state)
    inventory = tensor_inventory(DeepseekV4Config.from_dict(SMALL))
    formats = {name: FORMATS[spec.published] for name, spec in inventory.items() if spec.published in FORMATS}
    packed = plain | {name: fmt.quantize(state[name]) for name, fmt in formats.items()}
    ids = IDS[:40]
    assert torch.equal(run(Engine(bind(SMALL, packed)), ids), run(Engine(bind(SMALL, plain)), ids))


def test_bf16_stays_near_float32() -> None:
    """Loose on purpose: rounding flips some experts and entries. Fails if something is held too coarsely."""
    logits = run(Engine(bind(SMALL, as_bf16(SMALL, random_state(SMALL)))), IDS)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert (logits - at_once("small")).abs().mean() < 0.1


def test_an_fp8_cache_holds_rounded_rows_and_changes_little() -> None:
    """Fails if quantize_kv does nothing, rounds the rotated dimensions too, or forgets the compressed entries."""
    config, ids = tiny_config(head_dim=80), IDS[:100]
    engines = [Engine(bind(config, random_state(config), quantize_kv=on)) for on in (False, True)]
    (exact, full), (rounded, fp8) = [(e.new_session(), e) for e in engines]
    a, b = run(full, ids, session=exact), run(fp8, ids, session=rounded)
    assert 1e-4 < (a - b).abs().mean() < 0.2
    assert torch.equal(exact.state.layers[0].window.ring[:, -16:], rounded.state.layers[0].window.ring[:, -16:])
    for layer in rounded.state.layers:
        held = [layer.window.ring] + ([layer.entries.pool.extend(None)] if layer.entries else [])
        assert all(torch.equal(quantize_latent(rows, 16), rows) for rows in held)


def test_small_blocks_of_queries_and_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a bound on memory cuts a block at the wrong row, or moves its positions."""
    monkeypatch.setattr(step_size, "SCORE_ELEMENTS", 2000)
    monkeypatch.setattr(weights, "_EXPANDED_ROWS", 7)
    assert difference(run(engine_of("small"), IDS), at_once("small")) <= CHUNKING


def test_the_router_log_has_one_record_per_layer() -> None:
    """Fails if a hash layer reports scores, which balancing would then try to even out."""
    log: list[RouterRecord] = []
    model = engine_of("small").model
    with torch.no_grad():
        model.forward(Step.of([(model.new_state(), IDS[:5])], router_log=log))
    assert [record.layer for record in log] == list(range(6))
    assert [record.scores is None for record in log] == [True, True, False, False, False, False]
    assert all(record.ids.shape == (5, 2) for record in log)


def test_the_parts_of_a_long_step_do_not_cut_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a prompt's parts, between which nothing carries a gradient, are made while one learns."""

    def learnt() -> dict[str, Tensor]:
        state = random_state(SMALL)
        for name, tensor in state.items():
            tensor.requires_grad_(not name.endswith(("gate.bias", "tid2eid")))
        model = bind(SMALL, state)
        logits = model.forward(Step.of([(model.new_state(), IDS[:60])], all_logits=True))
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return {name: tensor.grad for name, tensor in state.items() if tensor.grad is not None}

    whole = learnt()
    monkeypatch.setattr(sparse, "ATTENTION_TOKENS", 16)
    parts = learnt()
    assert all(torch.equal(parts[name], grad) for name, grad in whole.items())


@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_a_step_in_parts_gives_the_same_logits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a part begins at the position of the step, or misses what the one before it has left behind."""
    monkeypatch.setattr(sparse, "ATTENTION_TOKENS", size)
    assert difference(run(engine_of("small"), IDS), at_once("small")) <= CHUNKING


def test_training_computes_the_same_and_every_weight_in_use_learns() -> None:
    """Fails if a gradient is cut, the indexer's included, or the training path chooses other entries."""
    state, log = random_state(SMALL), list[RouterRecord]()
    for name, tensor in state.items():
        tensor.requires_grad_(not name.endswith(("gate.bias", "tid2eid")))
    model = bind(SMALL, state)
    logits = model.forward(Step.of([(model.new_state(), IDS[:100])], all_logits=True, router_log=log))
    assert difference(logits, at_once("small")[:100]) <= CHUNKING
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    unused = {f"layers.{r.layer}.ffn.experts.{e}." for r in log for e in set(range(8)) - set(r.ids.flatten().tolist())}
    for name, tensor in state.items():
        if tensor.requires_grad and not name.startswith(tuple(unused)):
            assert tensor.grad is not None, name
            assert tensor.grad.abs().sum() > 0, name
