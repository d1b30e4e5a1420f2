"""Compiles every Triton kernel for a GPU that need not be there, down to machine code, at the shapes of V4-Flash.

    python -m tests.compile_triton 90 [experts | others]        (compute capability, times ten; half of the kernels)

A process of its own, because the kernels of the others are interpreted. Nothing is run, so nothing is said of speed or
results: only that the compiler takes what the interpreter takes, and how many registers and how much shared memory it
needs, which must not be more than there are."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

COMPILED: list[tuple[str, Any]] = []
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


class NoDevice:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def install(capability: int) -> None:
    """From now on a launch only compiles."""
    driver.set_active(NoDevice(capability))  # type: ignore[arg-type]
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **(options | {"warmup": True}))
        COMPILED.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]


def matrices(shape: tuple[int, int]) -> dict[str, Any]:
    """A weight of each format, its numbers left as they are."""
    from localmoe.kernels.triton.matrix import Matrix

    rows, cols = shape
    codes, half = torch.empty(rows, cols, dtype=torch.uint8), torch.empty(rows, cols // 2, dtype=torch.uint8)
    blocks = torch.empty(-(-rows // 128), -(-cols // 128))
    return {
        "f32": Matrix.of("plain", shape, torch.empty(rows, cols)),
        "bf16": Matrix.of("plain", shape, torch.empty(rows, cols, dtype=torch.bfloat16)),
        "fp8_block": Matrix.of("fp8_block", shape, codes, blocks),
        "fp4": Matrix.of("fp4", shape, half, torch.empty(rows, cols // 32, dtype=torch.uint8)),
        "int8": Matrix.of("int8", shape, codes, torch.empty(rows, cols // 128, dtype=torch.bfloat16), group=128),
        "int4": Matrix.of("int4", shape, half, torch.empty(rows, cols // 32, dtype=torch.bfloat16),
                          zero=torch.empty(rows, cols // 32, dtype=torch.uint8), group=32),
        "nf4": Matrix.of("nf4", shape, half, torch.empty(rows, cols // 64), group=64),
    }  # fmt: skip


def of_experts() -> None:
    """Calls every launcher of experts; what it returns is never filled."""
    from localmoe.kernels.triton import experts
    from localmoe.kernels.triton.slab import Experts

    up, down = matrices((2048, 4096)), matrices((4096, 2048))
    for name in up:
        table = Experts.of([(up[name], down[name], up[name])] * 2, 2, 10.0)
        for tokens in (1, 512):
            x, ids = torch.empty(tokens, 4096, dtype=torch.bfloat16), torch.zeros(tokens, 6, dtype=torch.long)
            experts.experts(table, x, ids, torch.ones(tokens, 6))
        if name == "f32":
            # What takes the most shared memory.
            experts.experts(table, x.float(), ids, torch.ones(tokens, 6), exact=True)


def of_others() -> None:
    """Calls every other launcher."""
    from localmoe.kernels.triton import attention, compress, hyper, indexer, linear, norm_rope, router
    from localmoe.kernels.triton.depth import Depth

    for name, weight in matrices((2048, 4096)).items():
        for tokens in (1, 4, 16, 512):
            linear.linear(torch.empty(tokens, 4096, dtype=torch.bfloat16), weight)
        linear.linear(torch.empty(512, 8, 4096, dtype=torch.bfloat16), weight, 8)
        if name == "f32":
            linear.linear(torch.empty(512, 4096), weight, exact=True)
    q, near, far = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((2, 64, 512), (128, 512), (600, 512)))
    mask, bias, sink = torch.ones(2, 128, dtype=torch.bool), torch.zeros(2, 600), torch.zeros(64)
    attention.sparse_attention(q, near, mask, far, bias, sink)
    attention.sparse_attention(q[:1], near, None, far.expand(1, -1, -1), None, sink)
    at = torch.zeros(1, dtype=torch.long)
    attention.sparse_attention(q[:1], near, None, far, None, sink, depth=Depth(at, 4))
    attention.sparse_attention(q[:1], near, None, far[None], None, sink, depth=Depth(at, 0))
    for ratio, width in ((4, 1024), (4, 256), (128, 512)):
        row, opened = torch.empty(1, width), (torch.empty(8 if ratio == 4 else 128, width),) * 2
        pool, turn = torch.empty(64, width // (2 if ratio == 4 else 1), dtype=torch.bfloat16), (torch.empty(1, 32),) * 2
        compress.append_entry(row, row, opened, Depth(at, ratio), torch.empty(pool.shape[1]), 1e-6, turn, pool)
    q, cache = torch.empty(2, 128, 576, dtype=torch.bfloat16), torch.empty(900, 576, dtype=torch.bfloat16)
    attention.latent_attention(q[:1], cache, None, width=512, scale=0.1)
    attention.latent_attention(q[:1], cache, None, width=512, scale=0.1, depth=Depth(at, 1))
    for rows in (cache, cache.expand(2, -1, -1)):
        attention.latent_attention(q, rows, torch.ones(2, 900, dtype=torch.bool), width=512, scale=0.1)
    attention.latent_attention(q.float(), cache.float(), None, width=512, scale=0.1, exact=True)
    indexer.index_scores(torch.empty(2, 64, 128), torch.empty(500, 128), torch.empty(2, 64))
    indexer.index_scores(torch.empty(1, 64, 128), torch.empty(500, 128), torch.empty(1, 64), depth=Depth(at, 4))
    indexer.pool_windows(torch.empty(3, 128, 512), torch.empty(3, 128, 512))
    angle = torch.empty(2, 32)
    norm_rope.norm_rope(q, angle, angle, weight=torch.empty(576), eps=1e-6)
    norm_rope.rms_norm(torch.empty(2, 4096), torch.empty(4096), 1e-6)
    streams = torch.empty(2, 4, 4096)
    hyper.hyper_enter(streams, torch.empty(24, 4 * 4096), torch.empty(24), torch.empty(3), torch.empty(4096),
                      iterations=20, norm_eps=1e-6, eps=1e-6)  # fmt: skip
    hyper.hyper_expand(streams, torch.empty(2, 4096), torch.empty(2, 4), torch.empty(2, 4, 4))
    linear.swiglu(q, q, 10.0)
    linear.linear(torch.empty(1, 4096), weight, dtype=torch.bfloat16)
    logits, bias = torch.empty(2, 256), torch.empty(256)
    router.route(logits, bias, 6, 1.5, normalize=True)
    router.route(logits, None, 6, 1.5, normalize=True, given=torch.zeros(2, 6, dtype=torch.long))
    router.route(logits, bias, 8, 2.5, normalize=True, scoring="sigmoid", groups=(8, 4, 2))
    router.route(logits[:, :160], None, 6, 16.0, normalize=False, scoring="softmax", groups=(8, 3, 1))


def main() -> int:
    capability = int(sys.argv[1])
    install(capability)
    for name, call in {"experts": of_experts, "others": of_others}.items():
        if sys.argv[2:] in ([], [name]):
            call()
    too_much = [
        f"{name}: {kernel.metadata.shared} bytes of shared memory"
        for name, kernel in COMPILED
        if kernel.metadata.shared > SHARED_BYTES[capability] or "cubin" not in kernel.asm
    ]
    names = {name for name, _ in COMPILED}
    what = f"{len(COMPILED)} launches of {len(names)} kernels"
    print(f"triton {triton.__version__}, compute capability {capability / 10}: {what}: {' '.join(sorted(names))}")
    for line in too_much:
        print(line)
    return bool(too_much)


if __name__ == "__main__":
    sys.exit(main())
