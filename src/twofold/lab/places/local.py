"""This machine: one process a core or a GPU, kept between runs, so that start-up and data are paid for once."""

import atexit
import gc
import importlib
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import loky
import torch

from twofold.lab.orphans import end_with
from twofold.lab.places import ONE_THREAD, WorkerDiedError

# loky starts another worker in its place; a run that was lost is told of by the sweep
warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given", category=UserWarning)

_CLAIMED: list[filelock.BaseFileLock] = []
_IDLE_SECONDS = 30  # workers outlive a sweep by this long, so that the next one starts at once


class Local:
    """Processes on this machine, each with a GPU of its own where runs take one.

    One that dies breaks the pool, and with it all runs in flight; a new pool follows.
    """

    isolated = False

    def __init__(self, workers: int | None = None, *, gpus: int = 0) -> None:
        self._gpus = torch.cuda.device_count() if gpus else 0
        self.slots = workers or self._gpus or loky.cpu_count()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Compute function(*arguments) in a process of the pool."""
        inner = self._pool().submit(function, *arguments)
        outer: Future = Future()
        outer.set_running_or_notify_cancel()
        inner.add_done_callback(lambda done: _pass_on(done, outer))
        return outer

    def stop(self) -> None:
        """Kill the workers."""
        self._pool().shutdown(wait=True, kill_workers=True)

    def _pool(self):
        """The pool of this process: the one of before while it is whole, a new one after a worker died."""
        return loky.get_reusable_executor(
            self.slots,
            timeout=_IDLE_SECONDS,
            initializer=_start_worker,
            initargs=(os.getpid(), (_folder_of_locks(), self.slots, self._gpus) if self._gpus else None),
            env=ONE_THREAD,
        )


def _pass_on(done: Future, outer: Future) -> None:
    error = done.exception()
    if isinstance(error, BrokenExecutor):
        outer.set_exception(WorkerDiedError())
    elif error is not None:
        outer.set_exception(error)
    else:
        outer.set_result(done.result())


def _start_worker(parent: int, shared_gpus: tuple[str, int, int] | None) -> None:
    if shared_gpus is not None:
        folder, slots, gpus = shared_gpus
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(_claim(Path(folder), slots) % gpus)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    end_with(parent)
    importlib.import_module("twofold.lab.sweep")
    gc.freeze()  # loky collects garbage after every run; looking through all that is imported took a tenth of a second


@cache
def _folder_of_locks() -> str:
    """Where the workers of this process lock their numbers; it goes when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="twofold-")
    atexit.register(folder.cleanup)
    return folder.name


def _claim(folder: Path, slots: int) -> int:
    """A number below `slots` that no other living worker has; one that dies gives it back."""
    while True:
        for number in range(slots):
            lock = filelock.FileLock(folder / f"slot-{number}", blocking=False)
            try:
                lock.acquire()
            except filelock.Timeout:
                continue
            _CLAIMED.append(lock)
            return number
        time.sleep(0.1)  # the worker that this one replaces has not quite ended


def _visible(gpu: int) -> str:
    """What CUDA_VISIBLE_DEVICES is to be for one of the GPUs that this machine, or this job, may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return allowed.split(",")[gpu] if allowed else str(gpu)
