"""The model inside the package: what LLM() loads is what transformers reads from the same files."""

from __future__ import annotations

import functools

import pytest
import torch

from localmoe.api import LLM
from localmoe.backend import KernelChoice
from localmoe.library import EMBEDDED
from localmoe.sampler import SamplingParams
from localmoe.session import Session
from tests.native_kernels import library, needs_native


@functools.cache
def embedded() -> LLM:
    return LLM()


def test_the_embedded_model_has_every_mechanism_of_v4() -> None:
    """Fails if it stops being something real to run every part of the engine on."""
    config = embedded().config
    assert {config.layer_kind(i) for i in range(config.num_layers)} == {"sliding", "csa", "hca"}
    assert 0 < config.num_hash_layers < config.num_layers
    assert config.num_experts >= 16
    assert config.max_position_embeddings // config.csa_ratio > config.index_topk
    assert embedded().name == "localmoe-mini"


@functools.cache
def by_transformers() -> tuple[list[int], torch.Tensor]:
    """120 tokens (the few index heads tie beyond that) and their logits."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    ids = [0, *embedded().tokenizer.encode("Once upon a time there was a brave little frog. " * 12)][:120]
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(EMBEDDED, attn_implementation="eager").float().eval()
    with torch.inference_mode():
        return ids, model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kernels", ["reference", pytest.param("strict", marks=needs_native)])
def test_its_logits_are_those_of_transformers(kernels: KernelChoice) -> None:
    """Fails if the official layout is read or computed differently, in torch or in float32 by the C++ kernels."""
    ids, expected = by_transformers()
    # The tolerance of the oracle tests, which is meant for logits with a spread of one.
    assert (LLM(kernels=kernels).logits(ids) - expected).abs().max() <= 5e-5 * expected.std()


@needs_native
def test_fast_kernels_stay_within_the_error_of_bf16_activations() -> None:
    """Fails for more than rounding: now and then a rounded score chooses another expert or entry, so the typical
    difference is bounded, and the probabilities as a whole."""
    ids, expected = by_transformers()
    found = LLM(kernels="native").logits(ids)
    assert (found - expected).abs().median() <= 0.005 * expected.std()
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() <= 0.005


def test_it_answers_in_words() -> None:
    """Fails if the weights and the tokenizer in the package do not belong together."""
    params = SamplingParams(temperature=0, max_tokens=12)
    reply = embedded().chat([{"role": "user", "content": "Tell me a story about a brave frog."}], params)
    assert reply.error is None
    assert len(reply.text.split()) > 5


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_strict_logits_are_the_same_alone_and_in_company(threads: int) -> None:
    """Fails if any part of a decode step adds up differently because of batch mates or threads."""
    before = library().threads
    llm = LLM(kernels="strict", threads=threads)
    texts = ["Once upon a time there was a frog", "One day", "The dog and the cat were good friends and"]
    prompts = [[0, *llm.tokenizer.encode(text)] for text in texts]

    def sessions() -> list[Session]:
        made = [llm.session() for _ in prompts]
        for session, ids in zip(made, prompts, strict=True):
            llm.engine.advance([(session, ids)])
        return made

    next_ids = [[5, 300], [17, 4], [250, 99]]
    together, alone = sessions(), sessions()
    for step in range(2):
        batch = llm.engine.advance([(s, [ids[step]]) for s, ids in zip(together, next_ids, strict=True)]).logits
        single = [llm.engine.advance([(s, [ids[step]])]).logits for s, ids in zip(alone, next_ids, strict=True)]
        assert torch.equal(batch, torch.cat(single))
    reference_run = LLM(kernels="strict", threads=2)
    assert torch.equal(reference_run.logits(prompts[0]), llm.logits(prompts[0]))
    library().set_threads(before)
