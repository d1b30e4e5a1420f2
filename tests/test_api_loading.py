"""LLM(directory): what is read, what can be chosen, and what is refused before the weights are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from localmoe.api import LLM
from localmoe.errors import ConfigError, ModelError, ResourceError, UsageError
from localmoe.experts.paging import Paging
from localmoe.sampler import SamplingParams
from tests.tiny_engine import write_tiny_model
from tests.tiny_v4 import CSA, HCA, SLIDING


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = {"layer_types": [SLIDING, CSA, HCA], "num_hash_layers": 1}
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-v4", **layers)


def test_a_model_is_named_after_its_directory_and_has_its_own_limits(directory: Path) -> None:
    llm = LLM(directory)
    assert (llm.name, llm.context, llm.config.num_layers) == ("tiny-v4", 1024, 3)
    assert LLM(str(directory), context=50).context == 50


@pytest.mark.parametrize("context", [0, 1, 1025, -5])
def test_a_context_the_model_cannot_have_is_refused(directory: Path, context: int) -> None:
    with pytest.raises(UsageError, match=f"context is {context}, expected 2 to 1024"):
        LLM(directory, context=context)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("dtype", "float16", "auto, float32, bfloat16"),
        ("kernels", "cuda", "auto, native, strict, reference"),
        ("kv_format", "int4", "full, fp8"),
    ],
)
def test_unknown_choices_are_refused_with_the_known_ones(option: str, value: str, allowed: str) -> None:
    """Fails if they are only noticed after the weights were read."""
    options: dict[str, Any] = {option: value}
    with pytest.raises(UsageError, match=f"{option} is {value}, expected one of {allowed}"):
        LLM("/nowhere", **options)


BRANCHES: list[dict[str, Any]] = [
    {"dtype": "bfloat16"},
    {"kv_format": "fp8"},
    {"kernels": "reference"},
    {"kernels": "reference", "dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", BRANCHES)
def test_every_choice_answers(tmp_path: Path, options: dict[str, Any]) -> None:
    """Fails if a dtype or cache format breaks off somewhere between prompt and text."""
    directory = write_tiny_model(tmp_path, layer_types=[SLIDING, CSA, HCA], head_dim=80)
    done = LLM(directory, **options).chat([{"role": "user", "content": "hi"}], SamplingParams(seed=1, max_tokens=4))
    assert (done.finish_reason, done.error) == ("length", None)


def test_weights_beyond_the_memory_are_refused_before_reading(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the machine would swap, or be killed, instead."""
    monkeypatch.setattr("localmoe.loader.available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"always needed take 0\.0 GiB of RAM and 0\.0 GiB are available"):
        LLM(directory)
    monkeypatch.setattr("localmoe.loader.available_memory", lambda: None)
    LLM(directory)


def test_experts_beyond_the_memory_stay_on_disk(directory: Path) -> None:
    """Fails if a model that does not fit is refused, counts nothing, or says something else than one that fits."""
    whole = LLM(directory, kernels="reference")
    assert whole.pager is None
    paged = LLM(directory, kernels="reference", paging=Paging(slots=3))
    params = SamplingParams(temperature=0, max_tokens=12)
    assert paged.generate("ab", params)[0].token_ids == whole.generate("ab", params)[0].token_ids
    assert paged.pager is not None
    assert paged.pager.misses > 0
    assert paged.pager.bytes_read > 0
    paged.close()
    whole.close()


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        LLM(tmp_path / "missing")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tmp_path: Path) -> None:
    """Fails if its larger ids would read beyond the embedding."""
    small = write_tiny_model(tmp_path / "small", layer_types=[SLIDING], num_hash_layers=0, vocab_size=300)
    with pytest.raises(ModelError, match="has ids up to 361, the model has 300 embeddings"):
        LLM(small)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, SamplingParams()),
        ('{"temperature": 0.25, "top_p": 0.75}', SamplingParams(temperature=0.25, top_p=0.75)),
        ('{"do_sample": true, "top_k": 9, "eos_token_id": 1}', SamplingParams(top_k=9)),
        ('{"do_sample": false, "temperature": 0.25}', SamplingParams(temperature=0)),
    ],
)
def test_default_params_come_from_generation_config(
    directory: Path, tmp_path: Path, text: str | None, expected: SamplingParams
) -> None:
    """Fails if a field is ignored, or greedy decoding is sampled."""
    copy = shutil.copytree(directory, tmp_path / "copy")
    if text is not None:
        (copy / "generation_config.json").write_text(text)
    assert LLM(copy).default_params() == expected


@pytest.mark.parametrize("text", ['{"temperature": "hot"}', '{"top_p": 7}', "[]", "{"])
def test_a_generation_config_that_makes_no_sense_is_refused(directory: Path, tmp_path: Path, text: str) -> None:
    """Fails if it is only noticed when the first reply is asked for, after the weights were read."""
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match="generation_config"):
        LLM(copy)


def test_loading_reports_its_progress(directory: Path) -> None:
    calls: list[tuple[int, int]] = []
    LLM(directory, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == sorted(calls)[-1][0]
