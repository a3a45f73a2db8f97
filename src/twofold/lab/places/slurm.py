"""Slurm, through submitit: every run a job of its own."""

import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.lab.places import ONE_THREAD, WorkerDiedError

_SECONDS_BETWEEN_LOOKS = 1.0
_GRACE_SECONDS = 15.0  # a result may reach a shared file system after its job has left the queue


class Slurm:
    """Jobs on a Slurm cluster whose nodes share this file system and this Python environment.

    A job costs the scheduler seconds: send runs of minutes and more. Whether a job lives is read from `squeue`, so no
    accounting data base is needed.

    Args:
        workers: jobs in the queue at once; None for 16.
        folder: where scripts, logs and results of the jobs go.
        options: "timeout_min=60,slurm_partition=gpu": arguments of submitit's `update_parameters`.
        gpus: GPUs of each job.

    Raises:
        TwofoldError: submitit or Slurm is not here, or an option is not one.
    """

    isolated = True

    def __init__(self, workers: int | None, *, folder: Path, options: str = "", gpus: int = 0) -> None:
        try:
            import submitit
        except ImportError as error:
            raise TwofoldError("A sweep on Slurm needs submitit: pip install 'twofold[slurm]'.") from error
        self.slots = workers or 16
        chosen = _options(options)
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
            self._executor.update_parameters(
                **{
                    "name": "twofold",
                    "cpus_per_task": 1,
                    "timeout_min": 24 * 60,
                    "slurm_setup": [f"export {name}={value}" for name, value in ONE_THREAD.items()],
                    **({"gpus_per_node": gpus} if gpus else {}),
                    **chosen,
                }
            )
        except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:
            raise TwofoldError(f"Slurm cannot be used as asked: {error}") from error
        self._read = submitit.core.utils.pickle_load
        self._waiting: dict[Any, tuple[Future, float]] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Compute function(*arguments) as a job."""
        outer: Future = Future()
        outer.set_running_or_notify_cancel()
        try:
            job = self._executor.submit(function, *arguments)
        except Exception as error:  # sbatch refuses in many ways, and a full disk takes no script
            raise TwofoldError(f"Slurm does not take the job: {f'{error}'.strip()}") from error
        with self._changed:
            self._waiting[job] = (outer, time.monotonic())
            self._changed.notify()
        return outer

    def stop(self) -> None:
        """Cancel the jobs in the queue."""
        with self._changed:
            for job in self._waiting:
                job.cancel(check=False)

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                jobs = dict(self._waiting)
            queued = _queued()
            for job, (outer, seen) in jobs.items():
                if _is_there(job.paths.result_pickle):
                    self._finish(job, outer)
                elif queued is None or job.job_id in queued:
                    with self._changed:
                        self._waiting[job] = (outer, time.monotonic())
                elif time.monotonic() - seen > _GRACE_SECONDS:
                    with self._changed:
                        del self._waiting[job]
                    outer.set_exception(WorkerDiedError())
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _finish(self, job: Any, outer: Future) -> None:
        with self._changed:
            del self._waiting[job]
        try:
            outcome, value = self._read(job.paths.result_pickle)
        except Exception:  # cut off, as on a full disk
            outer.set_exception(WorkerDiedError())
            return
        if outcome == "success":
            outer.set_result(value)
        else:
            outer.set_exception(RuntimeError(value))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a shared file system may lose a file for a moment
        return False


def _options(text: str) -> dict[str, Any]:
    """Read "name=value,..." with whole numbers as such."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    wrong = [name for name, sign, value in pairs if not (name and sign and value)]
    if wrong:
        raise TwofoldError(f"slurm:{text}: expected slurm:OPTION=VALUE,...; {', '.join(wrong)} has no value.")
    return {name: int(value) if value.isdigit() else value for name, _, value in pairs}


def _queued() -> set[str] | None:
    """Ids of this user's jobs that are queued or running; None where Slurm does not answer at the moment."""
    command = [
        "squeue",
        "--noheader",
        "--me",
        "--format=%i",
        "--states=PENDING,RUNNING,CONFIGURING,COMPLETING,SUSPENDED",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(answer.stdout.split()) if answer.returncode == 0 else None
