"""This machine: one process a core, kept between runs, so that start-up and data are paid for once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from typing import Any

import loky

from twofold.lab.places import ONE_THREAD, WorkerDiedError

_IDLE_SECONDS = 30  # workers outlive a sweep by this long, so that the next one starts at once


class Local:
    """Processes on this machine. One that dies breaks the pool, and with it all runs in flight; a new pool follows."""

    isolated = False

    def __init__(self, workers: int | None = None) -> None:
        self.slots = workers or loky.cpu_count()

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
            self.slots, timeout=_IDLE_SECONDS, initializer=_start_worker, initargs=(os.getpid(),), env=ONE_THREAD
        )


def _pass_on(done: Future, outer: Future) -> None:
    error = done.exception()
    if isinstance(error, BrokenExecutor):
        outer.set_exception(WorkerDiedError())
    elif error is not None:
        outer.set_exception(error)
    else:
        outer.set_result(done.result())


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Without this, the worker of a killed sweep would go on with its run and keep the next sweep waiting for it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
