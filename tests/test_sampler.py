"""localmoe.sampler: the right frequencies, the same tokens for the same seed, and nothing drawn from NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import GenerationError
from localmoe.sampler import Sampler, SamplingParams

# Probabilities 0.4, 0.3, 0.2, 0.1, out of order so that an id is not its rank.
LOGITS = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()


def draws(logits: torch.Tensor, count: int, **options: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**{"seed": 7, **options}))
    return [sampler.pick(logits, []).id for _ in range(count)]


def check_frequencies(ids: list[int], probabilities: list[float]) -> None:
    """Pearson's chi-square against the 99.99 % quantile for that many tokens; no token of probability 0 occurs."""
    counts = [ids.count(token) for token in range(len(probabilities))]
    possible = [(n, p * len(ids)) for n, p in zip(counts, probabilities, strict=True) if p > 0]
    assert sum(n for n, _ in possible) == len(ids)
    freedom = len(possible) - 1
    # Wilson and Hilferty's approximation; 3.72 is the normal quantile.
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 0.0
    assert sum((n - expected) ** 2 / expected for n, expected in possible) <= quantile


def normalised(*weights: float) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, normalised(2, 4, 1, 3)),
        ({"temperature": 0.5}, normalised(4, 16, 1, 9)),
        ({"temperature": 2.0}, normalised(2**0.5, 4**0.5, 1, 3**0.5)),
        ({"top_k": 2}, normalised(0, 4, 0, 3)),
        ({"top_k": 1}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 99}, normalised(2, 4, 1, 3)),
        # 0.4 + 0.3 reach 0.65; at 0.75 the third is needed.
        ({"top_p": 0.65}, normalised(0, 4, 0, 3)),
        ({"top_p": 0.75}, normalised(2, 4, 0, 3)),
        ({"top_p": 1e-9}, [0.0, 1.0, 0.0, 0.0]),
        # 0.2 is half of 0.4, 0.1 is not.
        ({"min_p": 0.45}, normalised(2, 4, 0, 3)),
        ({"min_p": 1.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"min_p": 0.6, "top_p": 0.95}, normalised(0, 4, 0, 3)),
    ],
    ids=str,
)
def test_tokens_come_with_their_probabilities(options: dict[str, Any], expected: list[float]) -> None:
    """Fails if a filter is off by one token, or what is kept is not renormalised."""
    check_frequencies(draws(LOGITS, 2000, **options), expected)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        # Temperature first: at 0.5 the shares are 16, 9, 4, 1 of 30, and two tokens reach 0.8 instead of three.
        ({"temperature": 0.5, "top_p": 0.8}, {1, 3}),
        ({"top_p": 0.8}, {0, 1, 3}),
        # Top-k before top-p: of 4/7 and 3/7 the first reaches 0.5, of the whole it does not.
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        # Top-p before min-p: min-p would leave 4 and 3 of 7, of which the first reaches 0.5.
        ({"top_p": 0.5, "min_p": 0.7}, {1, 3}),
    ],
    ids=str,
)
def test_filters_act_in_the_documented_order(options: dict[str, Any], kept: set[int]) -> None:
    """Fails if any two of them are exchanged."""
    assert set(draws(LOGITS, 200, **options)) == kept


def kept_by_the_book(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """The oracle: Python lists, one filter after the other, each renormalising."""
    scores = [logit / params.temperature for logit in logits.double().tolist()]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    weights = {token: math.exp(scores[token] - max(scores)) for token in order[: params.top_k or None]}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    for token, weight in weights.items():
        if sum(kept.values()) >= params.top_p * total:
            break
        kept[token] = weight
    return {token for token, weight in kept.items() if weight >= params.min_p * max(kept.values())}


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 1 << 30), st.integers(1, 40), st.sampled_from([0, 1, 3, 17]), st.sampled_from([1.0, 0.9, 0.5, 0.01])
)
def test_only_kept_tokens_are_drawn(seed: int, size: int, top_k: int, top_p: float) -> None:
    """Fails if leaving out small tokens before the sort drops one that top-p keeps, or ties break differently."""
    # Rounded to quarters, so that there are ties.
    logits = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, seed=seed)
    sampler = Sampler(params)
    kept = kept_by_the_book(logits, params)
    drawn = {sampler.pick(logits, []).id for _ in range(100)}
    assert drawn <= kept
    assert int(logits.argmax()) in kept
    if len(kept) <= 2 and logits[list(kept)].unique().numel() == 1:
        assert drawn == kept


def test_a_large_vocabulary_keeps_every_token_of_its_nucleus() -> None:
    """129,280 equal tokens, of which top-p 0.5 keeps the first half: fails if rounding decides."""
    ids = draws(torch.zeros(129_280), 8, top_p=0.5)
    assert max(ids) < 129_280 // 2 + 2
    assert max(ids) > 129_280 // 4
    assert max(draws(torch.zeros(129_280), 3, top_k=100)) < 100


def test_the_same_seed_gives_the_same_tokens() -> None:
    """Fails if state outside the sampler is used: torch's own generator is moved in between."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    first = draws(logits, 50, top_p=0.9)
    torch.rand(3)
    assert draws(logits, 50, top_p=0.9) == first
    assert draws(logits, 50, top_p=0.9, seed=8) != first


def test_batch_mates_change_nothing() -> None:
    """Fails if samplers share a generator: one in company of others against the same alone."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    alone = draws(logits, 20)
    samplers = [Sampler(SamplingParams(seed=seed)) for seed in (1, 7, 9)]
    together = [[sampler.pick(logits, []).id for sampler in samplers] for _ in range(20)]
    assert [row[1] for row in together] == alone


def test_a_sampler_without_a_seed_tells_the_one_it_drew() -> None:
    """Fails if a run cannot be repeated, or if two runs without a seed are the same."""
    logits = torch.zeros(100_000)
    sampler = Sampler(SamplingParams())
    ids = [sampler.pick(logits, []).id for _ in range(5)]
    assert draws(logits, 5, seed=sampler.seed) == ids
    assert Sampler(SamplingParams()).seed != sampler.seed


def test_greedy_takes_the_smaller_id_of_a_tie() -> None:
    """Fails if the last maximum is taken, or any randomness is used."""
    assert draws(torch.tensor([0.0, 2.0, 1.0, 2.0]), 5, temperature=0, seed=None) == [1] * 5
    assert draws(torch.tensor([-math.inf, -math.inf, -5.0]), 1, temperature=0) == [2]


def test_an_extreme_temperature_is_still_a_distribution() -> None:
    """Fails if a division overflows: next to 0 it is greedy, very large it is uniform."""
    for tiny in (1e-4, 1e-30, 5e-324):
        assert set(draws(LOGITS, 20, temperature=tiny)) == {1}
    check_frequencies(draws(LOGITS, 2000, temperature=1e30), [0.25] * 4)


def test_barred_tokens_are_never_drawn() -> None:
    """Fails if -inf gets a share, even at the ends of the vocabulary and at a high temperature."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    check_frequencies(draws(logits, 1000, temperature=50.0), [0, 0.5, 0, 0.5, 0])
    assert set(draws(logits, 200, top_k=4, top_p=0.99, min_p=0.01)) == {1, 3}


def test_the_smallest_random_number_draws_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.0 comes once in 2**53 draws: fails if it stands for the first token although that one is barred."""
    monkeypatch.setattr("random.Random.random", lambda _: 0.0)
    assert draws(torch.tensor([-math.inf, 0.0, 0.0]), 1) == [1]


def test_the_penalty_falls_on_every_token_already_there() -> None:
    """2 and -2 with penalty 4: 0.5 and -8. Fails if it is subtracted, misses the prompt, or counts repeats twice."""
    logits = torch.tensor([2.0, -2.0, 0.4, 0.6])
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=4.0))
    assert sampler.pick(logits, [1, 0, 0]).id == 3
    assert sampler.pick(logits, [1, 0, 0, 3]).id == 0
    weights = [math.exp(0.5), math.exp(-8), math.exp(0.4), math.exp(0.15)]
    sampler = Sampler(SamplingParams(seed=7, repetition_penalty=4.0))
    check_frequencies([sampler.pick(logits, [1, 0, 0, 3]).id for _ in range(2000)], normalised(*weights))
    assert sampler.pick(logits, [1, 0, 0, 3]).logprob in [pytest.approx(float(x)) for x in logits.log_softmax(0)]


def test_the_history_is_read_once() -> None:
    """Fails if a long prompt is walked through again for every token."""
    read: list[int] = []

    class History(list[int]):
        def __getitem__(self, where: Any) -> Any:
            found = super().__getitem__(where)
            read.extend(found)
            return found

    sampler = Sampler(SamplingParams(repetition_penalty=1.5))
    history = History([0, 1])
    sampler.pick(LOGITS, history)
    history.append(2)
    sampler.pick(LOGITS, history)
    assert read == [0, 1, 2]
    Sampler(SamplingParams()).pick(LOGITS, history)
    assert read == [0, 1, 2]


def test_logprobs_are_of_the_model_not_of_the_filters() -> None:
    """Fails if they are taken after temperature, penalty or top-k, or the top is unsorted or cut by the filters."""
    options: dict[str, Any] = {"temperature": 0.1, "top_k": 1, "repetition_penalty": 3.0, "logprobs": 3}
    sample = Sampler(SamplingParams(**options)).pick(LOGITS, [1])
    assert sample.logprob == pytest.approx(float(LOGITS[sample.id]))
    assert [token for token, _ in sample.top] == [1, 3, 0]
    assert [logprob for _, logprob in sample.top] == pytest.approx([math.log(0.4), math.log(0.3), math.log(0.2)])
    assert Sampler(SamplingParams(logprobs=0)).pick(LOGITS, []).top == ()
    assert len(Sampler(SamplingParams(logprobs=99)).pick(LOGITS, []).top) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0, math.nan, 1.0], "1 NaN and 0 .inf"),
        ([math.nan] * 3, "3 NaN"),
        ([0.0, math.inf, -math.inf], "0 NaN and 1 .inf"),
        ([-math.inf] * 3, "only -inf"),
    ],
)
def test_logits_that_are_no_distribution_are_refused(logits: list[float], message: str, temperature: float) -> None:
    """Peers take the argmax over NaN, which is token 0. Fails if any token at all comes out."""
    with pytest.raises(GenerationError, match=message):
        Sampler(SamplingParams(temperature=temperature)).pick(torch.tensor(logits), [])


def test_a_penalty_that_overflows_is_refused() -> None:
    """Fails if 3e38 / 1e-9 is drawn from as if it were a logit."""
    with pytest.raises(GenerationError, match="repetition penalty"):
        Sampler(SamplingParams(repetition_penalty=1e-9)).pick(torch.tensor([3e38, 0.0]), [0])


def test_half_precision_logits_are_accepted() -> None:
    """Fails if bf16 logits are summed in bf16."""
    sample = Sampler(SamplingParams(temperature=0)).pick(torch.zeros(1000, dtype=torch.bfloat16), [])
    assert sample.logprob == pytest.approx(-math.log(1000), abs=1e-5)
