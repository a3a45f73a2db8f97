"""A Ray cluster: the one that is running, or one that is started on this machine."""

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from twofold.errors import TwofoldError
from twofold.lab.places import ONE_THREAD, WorkerDiedError


class RayCluster:
    """Tasks of one core (and GPU) on a Ray cluster, which keeps and reuses its worker processes.

    Args:
        workers: runs at once; None for one on each core (or GPU, where runs take one) of the cluster.
        address: "auto", "HOST:PORT" or "ray://HOST:PORT"; None takes $RAY_ADDRESS, or starts Ray on this machine.
        gpus: GPUs of each run.

    Raises:
        TwofoldError: Ray is not installed, or the cluster cannot be reached.
    """

    isolated = True

    def __init__(self, workers: int | None = None, *, address: str | None = None, gpus: int = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise TwofoldError("A sweep on Ray needs Ray: pip install 'twofold[ray]'.") from error
        self._ray = ray
        if not ray.is_initialized():
            terminate = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(
                    address=address,
                    runtime_env={"env_vars": ONE_THREAD},
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise TwofoldError(f"No Ray cluster can be reached at {address or 'this machine'}: {error}") from error
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminate)  # Ray's own handler would end us without a word
        there = ray.cluster_resources()
        self.slots = workers or max(1, int(there.get("GPU", 0) / gpus if gpus else there.get("CPU", 1)))
        self._options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0}
        self._in_flight: set[Any] = set()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Compute function(*arguments) as a task."""
        reference = self._ray.remote(**self._options)(function).remote(*arguments)
        self._in_flight.add(reference)
        outer: Future = Future()
        outer.set_running_or_notify_cancel()
        reference.future().add_done_callback(lambda done: self._pass_on(done, reference, outer))
        return outer

    def stop(self) -> None:
        """Cancel the tasks in flight."""
        for reference in tuple(self._in_flight):
            self._ray.cancel(reference, force=True)

    def _pass_on(self, done: Future, reference: Any, outer: Future) -> None:
        self._in_flight.discard(reference)
        error = done.exception()
        if error is None:
            outer.set_result(done.result())
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            outer.set_exception(error.cause or error)
        elif isinstance(error, self._ray.exceptions.RayError):
            outer.set_exception(WorkerDiedError())
        else:
            outer.set_exception(error)
