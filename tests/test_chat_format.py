"""localmoe.chat_format: which format a model's prompts have, and what ends a reply."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe import LLM
from localmoe.chat_format import chat_format, described, template_text
from localmoe.cli.main import main
from localmoe.errors import ConfigError
from localmoe.identity import difference
from localmoe.models.family import config_of
from localmoe.tokenizer import Tokenizer
from tests import tiny_mla, tiny_v4
from tests.chat_templates import HELLO, SPECIAL, V3, V31
from tests.tiny_tokenizer import tiny_description, tiny_tokenizer
from tests.tiny_v4 import write_model

MLA = config_of(tiny_mla.tiny_config("v3", vocab_size=tiny_tokenizer().vocab_size))
V4 = config_of(tiny_v4.tiny_config(vocab_size=tiny_tokenizer().vocab_size))


def configured(folder: Path, template: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"chat_template": template}))
    return folder


def test_v4_has_its_encoder_whatever_lies_beside_it(tmp_path: Path) -> None:
    configured(tmp_path, "{{ 1 / 0 }}")
    found = chat_format(tmp_path, V4, tiny_tokenizer())
    assert template_text(tmp_path, V4) is None and described(tmp_path, V4) == "DeepSeek-V4 encoder"
    assert found.render([HELLO]).text.endswith("</think>")


def test_others_have_their_template(tmp_path: Path) -> None:
    assert described(tmp_path, MLA) == "none: run --raw continues texts"
    configured(tmp_path, V3)
    assert described(tmp_path, MLA) == "template of tokenizer_config.json"
    assert chat_format(tmp_path, MLA, tiny_tokenizer()).render([HELLO]).text.endswith("<｜Assistant｜>")
    (tmp_path / "chat_template.jinja").write_text("hello")
    assert described(tmp_path, MLA) == "template of chat_template.jinja"
    assert chat_format(tmp_path, MLA, tiny_tokenizer()).render([HELLO]).text == "hello"


def test_what_ends_a_reply(tmp_path: Path) -> None:
    """As GLM and Kimi have it: fails if the model would go on and speak for the user."""
    description = tiny_description()
    size = len(description["model"]["vocab"])
    for number, text in enumerate(("<|user|>", "<|im_end|>", "<|begin_of_box|>")):
        description["added_tokens"].append({"id": size + number, "content": text, "special": True})
    (configured(tmp_path, V3) / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    tokenizer = Tokenizer(description)
    ends = chat_format(tmp_path, dataclasses.replace(MLA, eos_token_ids=(5,)), tokenizer).turn_end_ids  # type: ignore[type-var]
    spelled = {tokenizer.token_id(spelling) for spelling in ("<｜User｜>", "<｜Assistant｜>", *SPECIAL.values())}
    assert {5, 7, 8, size, size + 1} | spelled <= ends
    assert size + 2 not in ends and tokenizer.token_id("</think>") not in ends


def test_an_end_that_is_no_token_is_named(tmp_path: Path) -> None:
    (configured(tmp_path, V3) / "generation_config.json").write_text('{"eos_token_id": 100000}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        chat_format(tmp_path, MLA, tiny_tokenizer())


def test_saved_sessions_belong_to_a_template(tmp_path: Path) -> None:
    """Fails if a session would go on with prompts of another form; a session of V4 has no such fact, as before."""
    config = tiny_mla.tiny_config("v3", vocab_size=tiny_tokenizer().vocab_size)
    folder = write_model(tmp_path / "tiny", config, tiny_mla.random_state(config))
    (folder / "tokenizer.json").write_text(json.dumps(tiny_description()))
    first = LLM(configured(folder, V3)).identity()
    assert difference(first, LLM(folder).identity()) is None
    assert difference(first, LLM(configured(folder, V31)).identity()) == (
        "it belongs to a model with another chat template"
    )
    assert "template" not in LLM().identity()


@pytest.mark.parametrize("name", list(tiny_mla.CONFIGS))
def test_show_and_list_know_every_family(name: str, library_folder: Path, capsys: Any) -> None:
    config = tiny_mla.tiny_config(name)
    write_model(
        library_folder / "tiny", config, {n: t.to(torch.bfloat16) for n, t in tiny_mla.random_state(config).items()}
    )
    assert main(["show", "tiny"]) == 0
    out = capsys.readouterr().out
    assert f"{config['model_type']}, 3 layers ({config['first_k_dense_replace']} dense" in out
    assert "4 heads; a latent of 32 + 16 for each token" in out
    assert ("index keys of 24; the 16 best are read" in out) == (name == "v3.2")
    assert "none: run --raw" in out and "choose by token" not in out
    assert main(["show", "tiny", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["model_type"] == config["model_type"] and record["chat_format"].startswith("none")
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["problem"] is None


def test_a_chat_goes_on(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns with a template and a saved session: fails if any part of a chat still writes V4's prompts."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = tiny_mla.tiny_config("v3", vocab_size=tiny_tokenizer().vocab_size)
    folder = configured(write_model(tmp_path / "tiny", config, tiny_mla.random_state(config)), V31)
    (folder / "tokenizer.json").write_text(json.dumps(tiny_description()))
    for text, thinking in (("hello", "off"), ("again", "on")):
        stdin = tmp_path / "stdin"
        stdin.write_text(f"{text}\n/cache\n")
        with stdin.open() as file:
            monkeypatch.setattr("sys.stdin", file)
            arguments = ["chat", "-m", str(folder), "-n", "4", "--temp", "0", "--session", "s", "--think", thinking]
            assert main(arguments) == 0
        shown = capsys.readouterr()
        assert "not answered" not in shown.out + shown.err
