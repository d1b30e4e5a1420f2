"""Sample stories from a llama2.c checkpoint (stories15M): the raw text that localmoe-mini is trained on.

Owns the llama2.c file format and a small batched sampler. Knows nothing of DeepSeek or of localmoe's engine.
Memory: float32 weights plus the KV cache, 2 * layers * batch * context * dim * 4 bytes.
Float32 throughout: bf16 is slower on CPUs without AMX.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

BOS = 1
SEPARATOR = "<|endoftext|>"

# Openings that move the teacher off its favourite story (most of its free samples are about a girl named Lily).
TRAITS = (
    "little big brave kind clever shy silly lazy curious happy sad lonely proud gentle hungry tiny old young funny "
    "grumpy"
)
HEROES = (
    "frog bear cat dog rabbit mouse fox owl duck lion monkey elephant turtle bird fish squirrel pig horse cow sheep "
    "bee butterfly dragon fairy princess prince king queen robot wizard boy girl farmer baker chicken puppy kitten "
    "goat tiger wolf snail ant spider whale dolphin crab penguin deer hedgehog giraffe zebra"
)
PLACES = "forest|village|big city|small house|garden|farm|castle|zoo|pond|park|cave|tall tree|school|jungle|mountain"
OPENINGS = (
    "Once upon a time, there was a {trait} {hero}",
    "Once upon a time, a {trait} {hero} lived in a {place}",
    "Once upon a time, in a {place}, there lived a {trait} {hero}",
    "One day, a {trait} {hero}",
    "There once was a {trait} {hero} who",
    "A {trait} {hero} and a {trait2} {hero2} were friends.",
)


def openings(rng: random.Random) -> Iterator[str]:
    """Endless random story openings."""
    traits, heroes, places = TRAITS.split(), HEROES.split(), PLACES.split("|")
    while True:
        words = dict(trait=rng.choice(traits), hero=rng.choice(heroes), place=rng.choice(places))
        words |= dict(trait2=rng.choice(traits), hero2=rng.choice(heroes))
        yield re.sub(r"\b([Aa]) ([aeiou])", r"\1n \2", rng.choice(OPENINGS).format(**words))


@dataclass(frozen=True)
class TeacherConfig:
    """The seven int32 of a llama2.c header; a negative vocab_size there means an untied head."""

    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context: int


def read_vocabulary(path: Path, size: int) -> tuple[list[bytes], list[float]]:
    """The byte string and merge score of every token in a llama2.c tokenizer.bin (score, length, bytes per token)."""
    data = path.read_bytes()
    pieces, scores, at = [], [], 4
    for _ in range(size):
        score, length = struct.unpack_from("<fi", data, at)
        piece = data[at + 8 : at + 8 + length]
        at += 8 + length
        if len(piece) == 6 and piece.startswith(b"<0x"):
            piece = bytes([int(piece[3:5], 16)])
        pieces.append(piece)
        scores.append(score)
    return pieces, scores


class Teacher:
    """A Llama-2 style decoder with one KV cache slot per story."""

    def __init__(self, path: Path, batch: int) -> None:
        raw = np.fromfile(path, dtype=np.float32)
        self.config = c = TeacherConfig(*(int(v) for v in raw[:7].view(np.int32)))
        if c.vocab_size < 0 or c.num_heads != c.num_kv_heads:
            raise ValueError(f"{path}: only tied-head, non-grouped llama2.c checkpoints are read")
        self._flat, self._at = torch.from_numpy(raw), 7
        self.head_dim = c.dim // c.num_heads
        self.embed = self._take(c.vocab_size, c.dim)
        self.norm_attn = self._take(c.num_layers, c.dim)
        self.wqkvo = [self._take(c.num_layers, c.dim, c.dim) for _ in range(4)]
        self.norm_mlp = self._take(c.num_layers, c.dim)
        self.w1 = self._take(c.num_layers, c.hidden_dim, c.dim)
        self.w2 = self._take(c.num_layers, c.dim, c.hidden_dim)
        self.w3 = self._take(c.num_layers, c.hidden_dim, c.dim)
        self.norm = self._take(c.dim)
        del self._flat
        cache = (2, c.num_layers, batch, c.num_heads, c.context, self.head_dim)
        self.cache = torch.zeros(cache, dtype=torch.float32)
        inv_freq = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        self.angle = torch.arange(c.context)[:, None] * inv_freq

    def _take(self, *shape: int) -> torch.Tensor:
        size = int(np.prod(shape))
        out = self._flat[self._at : self._at + size].view(shape)
        self._at += size
        return out

    def _rope(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rotate interleaved pairs of x [B, H, head_dim] by each row's own position [B]."""
        angle = self.angle[position][:, None]
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    @torch.inference_mode()
    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Feed one token [B] at its slot's position [B]; returns logits [B, vocab] float32."""
        c, rows = self.config, torch.arange(len(token))
        longest = int(position.max()) + 1
        hidden = (torch.arange(longest)[None] > position[:, None])[:, None, None]
        x = self.embed[token]
        for layer in range(c.num_layers):
            h = F.rms_norm(x, (c.dim,), self.norm_attn[layer], 1e-5)
            q, k, v = (F.linear(h, w[layer]).unflatten(-1, (c.num_heads, -1)) for w in self.wqkvo[:3])
            keys, values = self.cache[0, layer], self.cache[1, layer]
            keys[rows, :, position] = self._rope(k, position)
            values[rows, :, position] = v
            out = F.scaled_dot_product_attention(
                self._rope(q, position)[:, :, None], keys[:, :, :longest], values[:, :, :longest], attn_mask=~hidden
            )
            x = x + F.linear(out.flatten(1), self.wqkvo[3][layer])
            h = F.rms_norm(x, (c.dim,), self.norm_mlp[layer], 1e-5)
            x = x + F.linear(F.silu(F.linear(h, self.w1[layer])) * F.linear(h, self.w3[layer]), self.w2[layer])
        return F.linear(F.rms_norm(x, (c.dim,), self.norm, 1e-5), self.embed).float()


def encode(text: str, pieces: list[bytes], scores: list[float]) -> list[int]:
    """Sentencepiece BPE: from single characters, always merge the neighbours whose joint piece scores best."""
    ids_of = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    ids = [ids_of[c.encode()] for c in " " + text]
    while True:
        pairs = (ids_of.get(pieces[a] + pieces[b]) for a, b in itertools.pairwise(ids))
        merges = [(scores[joined], -at, joined) for at, joined in enumerate(pairs) if joined is not None]
        if not merges:
            return ids
        _score, at, joined = max(merges)
        ids[-at : -at + 2] = [joined]


def pick(logits: torch.Tensor, temperature: torch.Tensor, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """Nucleus sampling over the 64 likeliest tokens of each row (the rest of a story model's mass is noise)."""
    value, index = logits.topk(64, dim=-1)
    probability = torch.softmax(value / temperature[:, None], dim=-1)
    probability[probability.cumsum(-1) - probability > top_p] = 0.0
    return index.gather(1, torch.multinomial(probability, 1, generator=generator))[:, 0]


def sample_stories(model: Path, tokenizer: Path, *, batch: int, seed: int, opened: float) -> Iterator[str]:
    """Endless finished stories; a share `opened` starts with one of our openings, the rest is free.

    Unfinished stories (context exhausted) are dropped; slots are refilled at once."""
    teacher = Teacher(model, batch)
    pieces, scores = read_vocabulary(tokenizer, teacher.config.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    prompts = openings(rng)
    temperature = torch.linspace(0.8, 1.0, batch)

    def start() -> list[int]:
        return encode(next(prompts), pieces, scores) if rng.random() < opened else []

    forced = [start() for _ in range(batch)]
    written: list[list[int]] = [[] for _ in range(batch)]
    token = torch.full((batch,), BOS)
    position = torch.zeros(batch, dtype=torch.long)
    while True:
        token = pick(teacher.step(token, position), temperature, 0.95, generator)
        position = position + 1
        full = (position >= teacher.config.context).tolist()
        for slot, value in enumerate(token.tolist()):
            if len(written[slot]) < len(forced[slot]):
                value = forced[slot][len(written[slot])]
                token[slot] = value
            if value == BOS:
                yield b"".join(pieces[i] for i in written[slot]).decode("utf-8", "replace").strip()
            if value == BOS or full[slot]:
                written[slot], forced[slot] = [], start()
                token[slot], position[slot] = BOS, 0
            else:
                written[slot].append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="stories15M.bin")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.bin of the llama2 vocabulary")
    parser.add_argument("output", type=Path, help="text file to append to, stories separated by " + SEPARATOR)
    parser.add_argument("--stories", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--opened", type=float, default=0.8, help="share of stories given an opening of ours")
    args = parser.parse_args()
    seen: set[str] = set()
    start = time.monotonic()
    with args.output.open("a", encoding="utf-8") as out:
        for story in sample_stories(args.model, args.tokenizer, batch=args.batch, seed=args.seed, opened=args.opened):
            if len(story) < 200 or story in seen or "\ufffd" in story:
                continue
            seen.add(story)
            out.write(f"{story}\n{SEPARATOR}\n")
            if len(seen) % 500 == 0:
                out.flush()
                print(f"{len(seen)} stories, {len(seen) / (time.monotonic() - start):.1f}/s", file=sys.stderr)
            if len(seen) >= args.stories:
                return


if __name__ == "__main__":
    main()
