"""A V3 directory with its own chat template, from the terminal and from Python."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from localmoe import LLM, SamplingParams
from localmoe.cli.main import main
from localmoe.errors import ModelError, UsageError
from tests.chat_templates import SPECIAL, V31
from tests.tiny_mla import random_state, tiny_config
from tests.tiny_tokenizer import tiny_description, tiny_tokenizer
from tests.tiny_v4 import write_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = tiny_config("v3", vocab_size=tiny_tokenizer().vocab_size)
    path = write_model(tmp_path / "tiny-v3", config, random_state(config))
    (path / "tokenizer.json").write_text(json.dumps(tiny_description()))
    (path / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"chat_template": V31}))
    return path


def test_a_conversation_is_written_by_the_template(directory: Path) -> None:
    """Fails if another model's format were used, or a second turn read the first again."""
    llm = LLM(directory)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
    session = llm.session()
    *_, first = llm.stream_chat(messages, GREEDY, session=session)
    expected = f"{SPECIAL['bos_token']}<｜User｜>Hello<｜Assistant｜></think>"
    assert llm.tokenizer.decode(session.ids).startswith(expected)
    messages += [first.completion.message, {"role": "user", "content": "Again"}]
    *_, second = llm.stream_chat(messages, GREEDY, session=session)
    assert second.completion.stats.reused_tokens >= first.completion.prompt_tokens - 1
    llm.close()


def test_the_commands_take_it(directory: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["run", "-m", str(directory), "Hello", "-n", "4", "--temp", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["generated"] >= 1
    assert main(["show", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "deepseek_v3, 3 layers" in shown
    assert "template of tokenizer_config.json" in shown
    assert main(["plan", str(directory)]) == 0


def test_without_a_template_texts_are_continued_and_chats_are_not(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    llm = LLM(directory)
    assert llm.generate("Hello", GREEDY)[0].token_ids
    with pytest.raises(ModelError, match="has no chat template"):
        llm.chat([{"role": "user", "content": "Hello"}], GREEDY)
    llm.close()


def test_tools_and_effort_are_refused(directory: Path) -> None:
    """Fails if they would be taken and have no effect."""
    llm = LLM(directory)
    with pytest.raises(UsageError, match="tools are given"):
        llm.chat([{"role": "user", "content": "x"}], GREEDY, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(UsageError, match="knows no effort"):
        llm.chat([{"role": "user", "content": "x"}], GREEDY, thinking="on", effort="high")
    llm.close()
