"""Graphs of CUDA, for a Tape. Not proven on a GPU yet.

Memory: one pool for each GPU, which holds what is alive at once of the steps that were recorded."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from localmoe.tape import Graph, Recorder


@dataclass(frozen=True)
class _Graph(Graph):
    device: torch.device
    graph: torch.cuda.CUDAGraph

    def replay(self) -> None:
        """See Graph.replay: in the stream that is the device's current one."""
        with torch.cuda.device(self.device):
            self.graph.replay()


class CudaRecorder(Recorder):
    """One for an engine: graphs that share a pool must be replayed one after the other."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, Any] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._begun: tuple[_Graph, ExitStack] | None = None

    def begin(self, device: torch.device) -> None:
        """See Recorder.begin."""
        assert self._begun is None, "one graph at a time"
        if device not in self._pools:
            with torch.cuda.device(device):
                self._pools[device], self._streams[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        stream, graph = self._streams[device], torch.cuda.CUDAGraph()
        # The default stream cannot be recorded. What it has been told before comes first.
        stream.wait_stream(torch.cuda.current_stream(device))
        undo = ExitStack()
        undo.enter_context(torch.cuda.stream(stream))
        try:
            # Threads that read experts may allocate meanwhile.
            graph.capture_begin(pool=self._pools[device], capture_error_mode="thread_local")
        except BaseException:
            undo.close()
            raise
        self._begun = _Graph(device, graph), undo

    def end(self) -> Graph:
        """See Recorder.end."""
        assert self._begun is not None, "begin() comes before end()"
        (made, undo), self._begun = self._begun, None
        with undo, warnings.catch_warnings():
            # A graph may be empty: where a device takes over, the CPU may have something to do first.
            warnings.simplefilter("ignore", UserWarning)
            made.graph.capture_end()
        return made

    def give_up(self) -> None:
        """See Recorder.give_up."""
        if self._begun is None:
            return
        (made, undo), self._begun = self._begun, None
        with undo:
            try:
                made.graph.capture_end()
            except RuntimeError:
                # Says what the error was that led here.
                return
