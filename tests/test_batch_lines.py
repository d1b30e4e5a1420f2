"""localmoe.batch.input: whatever the lines are, each is a request or has a problem that is said; none is lost."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localmoe.batch import input as batch_input
from localmoe.batch.input import MAX_LINE, Source, Survey
from localmoe.batch.request import Reading, Refused, Request, parse
from localmoe.errors import UsageError
from localmoe.prompt import render_chat
from localmoe.sampler import SamplingParams
from tests.batch_files import batch, rows, write

pytestmark = pytest.mark.usefixtures("one_load")

NO_STDIN = io.BytesIO()
ASSISTANT = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello world!"}]
# In the shapes that others' tools write.
OPENAI: list[dict[str, Any]] = [
    {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "gpt-3.5-turbo-0125", "messages": ASSISTANT, "max_tokens": 3}},
    {"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "gpt-4o-mini", "messages": ASSISTANT, "max_completion_tokens": 3, "temperature": 0.2,
              "top_p": 0.9, "seed": 7, "stop": None, "n": 1, "stream": False}},
    {"custom_id": "request-3", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "gpt-4o-mini", "max_tokens": 3,
              "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}},
]  # fmt: skip
LM_EVAL: list[dict[str, Any]] = [
    {"custom_id": "gsm8k-0", "method": "POST", "url": "/v1/completions",
     "body": {"model": "m", "prompt": "Question: 1 + 1?\nAnswer:", "max_tokens": 3, "temperature": 0.0,
              "stop": ["Question:", "</s>", "<|im_end|>"], "seed": 1234, "logprobs": None, "echo": False}},
    {"custom_id": "loglikelihood-0", "method": "POST", "url": "/v1/completions",
     "body": {"model": "m", "prompt": [[5, 6, 7, 8]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
              "echo": True}},
    {"custom_id": "text-0", "method": "POST", "url": "/v1/completions",
     "body": {"model": "m", "prompt": ["Question: 1 + 1?"], "max_tokens": 3, "temperature": 0, "stop": ["Q:"]}},
    {"custom_id": "chat-0", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "m", "messages": ASSISTANT, "max_tokens": 3, "temperature": 0, "stop": ["Q:"], "seed": 1234}},
]  # fmt: skip


def surveyed(source: Source) -> tuple[Survey, list[str], list[Request | Refused]]:
    """What check() finds and says, and what requests() gives then."""
    said: list[str] = []
    survey = source.check(lambda: render_chat, said.append, skip_invalid=True)
    return survey, said, list(source.requests(survey, range(len(survey.order)), lambda: render_chat))


def problems(path: Path) -> list[str | None]:
    """Of each line, what is wrong with it."""
    _survey, _said, found = surveyed(Source(path, NO_STDIN, Reading()))
    return [request.problem if isinstance(request, Refused) else None for request in found]


def test_lines_of_other_tools_are_answered_unchanged(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [*OPENAI, *LM_EVAL])
    assert batch(source, tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert [row["custom_id"] for row in found] == [line["custom_id"] for line in (*OPENAI, *LM_EVAL)]
    assert {row["response"]["status_code"] for row in found} == {200}
    assert [row["response"]["body"]["object"] for row in found] == [
        *["chat.completion"] * 3, *["text_completion"] * 3, "chat.completion"
    ]  # fmt: skip
    assert all(row["response"]["body"]["usage"]["completion_tokens"] <= 3 for row in found)
    # What lm-eval reads of a prompt: a number for each of its tokens but the first.
    scores = found[4]["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"]
    assert scores[0] is None and len(scores) >= 4 and all(score <= 0 for score in scores[1:])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "a\xff"}', "not valid JSON"),
        (b"\xff\xfe{\x00", "not valid JSON"),
        (b'{"prompt": ["a", "b"]}', "a list of 2 prompts"),
        (b'{"prompt": [[5], [6]]}', "a list of 2 prompts"),
        (b'{"prompt": [["a"]]}', "prompt is no text"),
        (b'{"url": "/v1/completions", "body": {"prompt": ["a", ""]}}', "prompt is no text"),
        (b'{"url": "/v1/completions", "body": {"prompt": ["a", [5]]}}', "prompt is no text"),
        (b'{"url": "/v1/completions", "body": {"prompt": [[5], []]}}', "prompt is no text"),
        (b'{"url": "/v1/completions", "body": {"prompt": ["a", "\\ud83d"]}}', "lone surrogate"),
        (b'{"url": "/v1/completions", "body": {"prompt": ["a", "b", "c"], "n": 43}}', "3 prompts ask for 129 replies"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number"),
        (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is not a number"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is inf"),
        (b'{"prompt": "a", "temperature": -1}', "temperature is -1"),
        (b'{"prompt": "a", "seed": -1}', "seed is -1"),
        (b'{"prompt": "a", "top_k": -1}', "top_k is -1"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens is 1.5"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "a", "stop": 5}', "sampling parameters are wrong"),
        (b'{"prompt": "a", "stop": [""]}', "expected texts of at least one character"),
        (b'{"prompt": "a", "prompt": "b"}', "appears twice"),
        (b'{"prompt": ""}', "at least one character"),
        (b'{"messages": []}', "at least one message"),
        (b'{"messages": [5]}', "messages"),
        (b'{"messages": "a"}', "at least one message"),
        (b'{"body": []}', "body is not an object"),
        (b'{"body": {"prompt": "a"}, "extra": 1}', "beside body"),
        (b'{"custom_id": "", "prompt": "a"}', "custom_id"),
        (b'{"prompt": "a", "model": 5}', "model is 5"),
        (b'{"prompt": "a", "url": "/v1/completions", "thinking": true}', "thinking has no effect"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": ' + b"[" * 300 + b"]" * 300 + b"}", "nested too deeply"),
        (b'{"messages": [{"role": "user", "content": ' + b"[" * 900 + b"]" * 900 + b"}]}", ""),
        (b'["a"]', "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, line: bytes, problem: str) -> None:
    (tmp_path / "in").write_bytes(b'{"prompt": "good"}\n' + line + b'\n{"prompt": "good"}')
    first, found, last = problems(tmp_path / "in")
    assert first is last is None and found is not None and problem in found


def test_the_longest_line_is_read_and_no_longer_one(tmp_path: Path) -> None:
    with open(tmp_path / "in", "wb") as file:
        for size in (MAX_LINE, MAX_LINE + 1):
            start, end = b'{"prompt": "', b'"}'
            file.write(start + b"a" * (size - len(start) - len(end)) + end + b"\r\n")
        file.write(b'{"prompt": "good"}\n')
    assert problems(tmp_path / "in") == [None, "the line is longer than 16 MiB", None]


def test_a_line_without_end_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MiB of nothing, in a file with holes. Fails if more than a line of the most there may be is kept."""
    monkeypatch.setattr(batch_input, "MAX_LINE", 1 << 20)
    with open(tmp_path / "in", "wb") as file:
        file.write(b'{"prompt": "good"}\n')
        file.truncate(1 << 28)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"prompt": "good"}\n')
    source = Source(tmp_path / "in", NO_STDIN, Reading())
    tracemalloc.start()
    survey = source.check(lambda: render_chat, lambda _problem: None, skip_invalid=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert survey.bad == {1} and len(survey.order) == 3
    assert peak < 8 << 20


def test_no_line_is_kept(tmp_path: Path) -> None:
    """20 MB in 2,000 lines. Fails if memory grows with the file."""
    with open(tmp_path / "in", "w") as file:
        for number in range(2000):
            file.write(json.dumps({"prompt": f"{number} " * 2000}) + "\n")
    source = Source(tmp_path / "in", NO_STDIN, Reading())
    tracemalloc.start()
    survey = source.check(lambda: render_chat, print)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(survey.order) == 2000 and peak < 2 << 20


def test_a_pipe_and_stdin_are_read_once(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "a"}\n\n  \n{"prompt": "b"}\r\n{"prompt": "c"}'
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(content),))
    writer.start()
    read = surveyed(Source(pipe, NO_STDIN, Reading()))
    writer.join()
    assert [request.custom_id for request in read[2]] == ["1", "4", "5"] and not read[0].bad
    assert surveyed(Source(Path("-"), io.BytesIO(content), Reading())) == read


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_broken_gz_is_an_error(tmp_path: Path, damage: str) -> None:
    lines = "".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(20_000))
    packed = bytearray(gzip.compress(lines.encode()))
    if damage == "cut":
        del packed[-40:]
    else:
        packed[len(packed) // 2 :] = random.Random(0).randbytes(len(packed) // 2)
    (tmp_path / "in.gz").write_bytes(packed)
    with pytest.raises(UsageError, match="cannot be read after line"):
        Source(tmp_path / "in.gz", NO_STDIN, Reading()).check(lambda: render_chat, lambda _problem: None)


SEEDS = [
    *OPENAI,
    *LM_EVAL,
    {"prompt": "a", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    {
        "custom_id": "b",
        "messages": [*ASSISTANT, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    },
    {"messages": [{"role": "user", "content": "a"}], "thinking": {"type": "enabled"}, "reasoning_effort": "high"},
]
PIECES = [
    b"null", b"NaN", b"-1", b"1e999", b"[]", b"{}", b"\xff", b"\x00", b"\\ud800", b'"', b"{", b"]", b",", b":", b"true",
    b"\xe2\x80\xa8", b"\r", b'"custom_id"', b'"prompt"', b'"messages"', b'"body"', b"[" * 1200, b"9" * 400,
]  # fmt: skip


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Lines of what is valid, with a few changes each: of bytes, or of a value."""
    draw = random.Random(seed)
    for _ in range(count):
        line = bytearray(json.dumps(draw.choice(SEEDS)).encode())
        for _ in range(draw.randint(0, 3)):
            at, size = draw.randrange(len(line) + 1), draw.choice((0, 0, 1, 4, 30))
            line[at : at + size] = draw.choice((*PIECES, bytes([draw.randrange(256)]), bytes(line[:size])))
        yield bytes(line).replace(b"\n", b" ")


def test_mutated_lines_are_requests_or_refused(tmp_path: Path) -> None:
    """Fails if a line is lost, has no problem said, or breaks the reader."""
    lines = [line for line in mutations(0, 1500) if line.strip()]
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(lines))
    survey, said, found = surveyed(Source(path, NO_STDIN, Reading()))
    assert len(found) == len(survey.order) == len(lines)
    assert len({request.custom_id for request in found}) == len(lines)
    refused = {place for place, request in enumerate(found) if isinstance(request, Refused)}
    assert refused == survey.bad and 300 < len(refused) < len(lines)
    assert len(said) == 20 and all(
        f": line {place + 1}: " in one for place, one in zip(sorted(refused), said, strict=False)
    )
    assert all(request.problem for request in found if isinstance(request, Refused))


def test_mutated_lines_all_have_a_row(tmp_path: Path) -> None:
    """Some of them, answered. Fails if one that is taken for a request brings the run down."""
    source = tmp_path / "in"
    lines = []
    for number, line in enumerate(mutations(1, 400)):
        source.write_bytes(line)
        (request,) = surveyed(Source(source, NO_STDIN, Reading()))[2]
        # Long replies take long.
        if (number % 4 and isinstance(request, Refused)) or (request_tokens(request) or 99) < 9:
            lines.append(line)
    source.write_bytes(b"\n".join(lines[:150]))
    assert batch(source, tmp_path / "out", "--skip-invalid") == 3
    found = rows(tmp_path / "out")
    assert len({row["custom_id"] for row in found}) == len(found) == 150
    assert {row["response"]["status_code"] for row in found} == {200, 400}


def request_tokens(request: Request | Refused) -> int | None:
    return None if isinstance(request, Refused) else request.sampling.get("max_tokens")


def test_a_seed_depends_on_the_id_and_the_run_only() -> None:
    """Fails if all requests draw alike, or if one would draw otherwise in another place of the file."""

    def seed(custom_id: str, number: int, of_the_run: int = 0, **own: int) -> int | None:
        line = json.dumps({"custom_id": custom_id, "prompt": "a"} | own).encode()
        return parse(line, number, Reading()).params(SamplingParams(), of_the_run).seed

    assert seed("a", 1) == seed("a", 7)
    assert len({seed("a", 1), seed("b", 1), seed("a", 1, of_the_run=1)}) == 3
    assert seed("a", 1, of_the_run=1, seed=5) == 5
