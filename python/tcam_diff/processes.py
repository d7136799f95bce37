"""Work on several processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tcam_diff.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def map_on_processes(function: Callable[[T], R], items: Iterable[T], jobs: int) -> Iterator[R]:
    """Yield ``function(item)`` for each item, in order, computed by ``jobs`` processes of one thread each.

    One job is done in this process. On Linux the others end with this process, also if it is killed. Raises UserError if one of
    them is killed.
    """
    if jobs <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(jobs, initializer=_start, initargs=(os.getpid(),)) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out; the same command with a lower --jobs continues"
            ) from error


def _start(parent: int) -> None:
    import torch

    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
            os._exit(1)  # the parent died before the call above
