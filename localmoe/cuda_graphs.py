"""Graphs of CUDA, for a Tape. Not proven on a GPU yet.

Memory: one pool for each GPU, which holds what is alive at once of the steps that were recorded, until forget()."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, suppress
from typing import Any

import torch

from localmoe.tape import Graph, Recorder


class CudaRecorder(Recorder):
    """One for an engine: graphs that share a pool must be replayed one after the other."""

    def __init__(self) -> None:
        # Kept for good: torch has memory, cuBLAS's among it, for each stream.
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # With the last graph made: torch takes no pool whose graphs are all gone.
        self._pools: dict[torch.device, tuple[Any, torch.cuda.CUDAGraph | None]] = {}
        self._begun: tuple[torch.device, torch.cuda.CUDAGraph, ExitStack] | None = None

    def begin(self, device: torch.device) -> None:
        """See Recorder.begin."""
        assert self._begun is None, "one graph at a time"
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle(), None
        graph, undo = torch.cuda.CUDAGraph(), ExitStack()
        self._begun = device, graph, undo
        # The default stream cannot be recorded.
        undo.enter_context(torch.cuda.stream(self._streams[device]))
        # What other threads tell the device meanwhile is theirs.
        graph.capture_begin(pool=self._pools[device][0], capture_error_mode="thread_local")

    def end(self) -> Graph:
        """See Recorder.end. The graph is replayed in the stream that is its device's current one then."""
        assert self._begun is not None, "begin() comes before end()"
        device, graph, undo = self._begun
        with undo, warnings.catch_warnings():
            # A graph may be empty: where a device takes over, the CPU may have something to do first.
            warnings.simplefilter("ignore", UserWarning)
            graph.capture_end()
        self._pools[device], self._begun = (self._pools[device][0], graph), None
        return graph

    def give_up(self) -> None:
        """See Recorder.give_up."""
        if self._begun is None:
            return
        (device, graph, undo), self._begun = self._begun, None
        # Whatever torch thinks of it now.
        pool, _ = self._pools.pop(device)
        with undo:
            try:
                graph.capture_end()
            except RuntimeError:
                # Says what the error was that led here. Some versions of torch hold from then on that something is
                # being recorded, and refuse to give memory back.
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(device.index, pool)

    def forget(self) -> None:
        """See Recorder.forget."""
        self._pools.clear()
