"""A device's queues that are not there: what they are told is done late, in any order that is left to them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from localmoe.experts.queues import Queues


@dataclass(eq=False)
class Task:
    """What a queue was told. seconds: it takes, for each thing that `work` says it did."""

    queues: LateQueues
    work: Callable[[], Any]
    after: list[Task]
    each: float
    done: bool = False
    seconds: float = field(default=0.0)

    def wait(self) -> None:
        while not self.done:
            assert self.queues.step(), "waits for itself"


class LateQueues(Queues):
    """each: seconds of what is computed, of what is copied."""

    def __init__(self, seed: int = 0, each: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__(torch.device("cpu"))
        self._random, self._each = random.Random(seed), each
        self._computing, self._copied = deque[Task](), deque[Task]()

    def copy(self, target: Tensor, source: Tensor, after: Iterable[Any]) -> Any:
        return self._told(self._copied, lambda: (target.copy_(source), 1)[1], after, self._each[1])

    def compute(self, work: Callable[[], object], after: Iterable[Any]) -> Any:
        return self._told(self._computing, work, after, self._each[0])

    def step(self) -> bool:
        """Do one thing; False if there is none that can be done."""
        ready = [queue for queue in (self._computing, self._copied) if queue and all(t.done for t in queue[0].after)]
        if not ready:
            return False
        task = self._random.choice(ready).popleft()
        did = task.work()
        task.seconds = task.each * (did if isinstance(did, int) else 0)
        task.done = True
        return True

    def _told(self, queue: deque[Task], work: Callable[[], Any], after: Iterable[Any], each: float) -> Task:
        task = Task(self, work, list(after), each)
        queue.append(task)
        while self._random.random() < 0.3 and self.step():
            pass
        return task
