"""Many runs, on this machine or on a cluster; nothing is computed twice."""

import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from twofold.errors import TwofoldError, TwofoldWarning
from twofold.lab import ranks
from twofold.lab.config import RunConfig
from twofold.lab.data import load
from twofold.lab.files import UnreadableError, UnwritableError
from twofold.lab.places import Place, WorkerDiedError, find_place
from twofold.lab.runs import BusyError, RunDirectory, code_version, prepare_output, run_id
from twofold.lab.training import train

Progress = Callable[[int, int, float | None], None]
"""progress(done, total, seconds_left): called at the start and after every run; seconds_left is None until known."""

Compute = Callable[[RunDirectory, Path | None], str]
"""compute(directory, data_dir) -> status: what a worker does with one run."""

_DIED_TWICE = "The process of this run died twice: it was killed, ran out of memory, or crashed."


@dataclass(frozen=True)
class SweepResult:
    """What became of the runs of a sweep.

    Attributes:
        finished: ids of the finished runs, in the order of the configurations.
        diverged: ids of those whose loss or a gradient became infinite or NaN: results, with metrics.
        failed: id -> error of those that raised, or whose process died twice; the traceback is in their status.json.
        reused: how many of the finished and diverged were there before, or came from another sweep meanwhile.
    """

    finished: tuple[str, ...]
    diverged: tuple[str, ...]
    failed: Mapping[str, str]
    reused: int


@dataclass(frozen=True)
class _Task:
    """A run to compute; `again`: its worker died once; `wait`: another process computed it when it was tried."""

    directory: RunDirectory
    again: bool = False
    wait: bool = False


@dataclass(frozen=True)
class _Outcome:
    """What a worker says of its task: a run's status, "busy", "unwritable" or "unreadable".

    `found`: it was there already.
    """

    status: str
    error: str = ""
    found: bool = False


def compute(directory: RunDirectory, data_dir: Path | None) -> str:
    """Train one run into its directory and return its status."""
    train(directory.config, data_dir=data_dir, directory=directory)
    run = directory.result() if ranks.is_first() else None
    status = "failed" if run is None else run.status
    return ranks.from_first(status, ranks.join(ranks.launched(), directory.config.device))


def sweep(
    configs: Sequence[RunConfig],
    out: Path,
    *,
    place: str = "local",
    workers: int | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
    compute: Compute = compute,
) -> SweepResult:
    """Train every configuration that has no result in `out` yet.

    The numbers of a run do not depend on the number of workers or on the order. A run that raises is recorded with its
    error and does not stop the others; a worker that dies costs its run one retry. Ctrl-C ends the sweep; finished runs
    stay, interrupted ones go on from their checkpoints the next time. Sweeps that share `out` share the work: what one
    computes at the moment the others leave for later.

    Args:
        configs: what to run; equal ones are run once.
        out: the output directory.
        place: where to compute, as in `find_place`: "local", "ray" or "slurm".
        workers: runs at once; None takes what the place has.
        data_dir: where data files lie.
        progress: called with (done, total, seconds left or None).
        compute: what a worker does with one run.

    Raises:
        TwofoldError: before anything starts: `out` cannot be written to, data cannot be had, or the place cannot be
            used; later: `out` cannot be written to any more (an UnwritableError), or the place takes no more runs.
    """
    # workers outlive a sweep, and with it the directory that relative paths start from
    out, data_dir = Path(out).absolute(), None if data_dir is None else Path(data_dir).absolute()
    directories = {directory.id: directory for directory in (RunDirectory(out, config) for config in configs)}
    group = ranks.join(ranks.launched(), next((config.device for config in configs), "cpu"))
    outcomes: dict[str, _Outcome] = ranks.from_first(
        {name: _Outcome(run.status, found=True) for name, d in directories.items() if (run := d.result())}, group
    )
    pending = [directory for name, directory in directories.items() if name not in outcomes]
    there = None
    if pending:
        prepare_output(out)
        for data in {directory.config.data for directory in pending}:
            load(data, data_dir)
        gpus = int(any(directory.config.device.startswith("cuda") for directory in pending))
        there = find_place(place, workers, out, gpus=gpus)
        there.slots = min(there.slots, len(pending))
    report = _Report(progress, len(outcomes), len(directories))
    if there is not None:

        def submit(task: _Task) -> Future:
            return there.submit(_work, compute, task, data_dir)

        def take(waiting: deque[_Task]) -> _Task:
            free = (i for i, task in enumerate(waiting) if not task.directory.is_busy())
            i = ranks.from_first(next(free, 0) if ranks.is_first() else 0, group)
            task = waiting[i]
            del waiting[i]
            return task

        def record(task: _Task, outcome: _Outcome) -> None:
            outcomes[task.directory.id] = outcome
            report.one_more(outcome)

        try:
            _run_all(pending, there, take, submit, record)
        except BaseException:
            there.stop()
            raise
    status = {name: outcomes[name].status for name in directories}
    return SweepResult(
        finished=tuple(name for name in directories if status[name] == "finished"),
        diverged=tuple(name for name in directories if status[name] == "diverged"),
        failed={name: outcomes[name].error for name in directories if status[name] == "failed"},
        reused=sum(outcome.found for outcome in outcomes.values()),
    )


def _run_all(
    pending: Sequence[RunDirectory],
    place: Place,
    take: Callable[[deque[_Task]], _Task],
    submit: Callable[[_Task], Future],
    record: Callable[[_Task, _Outcome], None],
) -> None:
    """Keep every slot busy, and try a run whose worker died once more: alone where one death takes all in flight."""
    waiting, again = deque(_Task(directory) for directory in pending), deque[_Task]()
    in_flight: dict[Future, _Task] = {}
    told = False
    while waiting or again or in_flight:
        while again and len(in_flight) < (place.slots if place.isolated else 1):
            task = again.popleft()
            in_flight[submit(task)] = task
        alone = not place.isolated and (bool(again) or any(task.again for task in in_flight.values()))
        while waiting and not alone and len(in_flight) < place.slots:
            task = take(waiting)
            if task.wait and not told:
                told = True
                warnings.warn("Another process computes some of these runs; they are waited for.", TwofoldWarning)
            in_flight[submit(task)] = task
        done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
        if not place.isolated and any(_died(future) for future in done):
            done, _ = wait(in_flight)
        lost = sum(_died(future) and not in_flight[future].again for future in done)
        if lost:
            these = "its run is" if lost == 1 else f"its run and {lost - 1} beside it are"
            warnings.warn(f"A worker died: killed, out of memory, or crashed; {these} tried once more.", TwofoldWarning)
        for future in done:
            task = in_flight.pop(future)
            if not _died(future):
                outcome = _result(future, task)
            elif task.again:
                outcome = _give_up(task)
            else:
                again.append(replace(task, again=True))
                continue
            if outcome.status == "unwritable":
                raise UnwritableError(outcome.error)
            if outcome.status == "unreadable":
                raise UnreadableError(outcome.error)
            if outcome.status == "busy":
                (again if task.again else waiting).append(replace(task, wait=True))
            else:
                record(task, outcome)


def _died(future: Future) -> bool:
    return isinstance(future.exception(), WorkerDiedError)


def _result(future: Future, task: _Task) -> _Outcome:
    error = future.exception()
    if error is None:
        return future.result()
    reason = f"{error}".strip().rpartition("\n")[2] or type(error).__name__
    raise TwofoldError(f"Run {task.directory.id} could not be started: {reason}") from error


def _give_up(task: _Task) -> _Outcome:
    """Record that a worker died twice, unless another sweep has taken the run meanwhile."""
    try:
        with task.directory.lock(wait=False):
            if (run := task.directory.result()) is not None:
                return _Outcome(run.status, found=True)
            task.directory.fail(_DIED_TWICE)
    except BusyError:
        return _Outcome("busy")
    return _Outcome("failed", _DIED_TWICE)


def _work(compute: Compute, task: _Task, data_dir: Path | None) -> _Outcome:
    directory = task.directory
    if directory.id != run_id(directory.config):
        raise TwofoldError(
            f"the code or torch of this worker ({code_version()}, {torch.__version__}) is not that of the sweep; start "
            "the sweep anew, with the same environment everywhere"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TwofoldWarning)  # a sweep varies on purpose what they warn about
            if ranks.launched() > 1:  # the ranks of a run agree among themselves on who waits for what
                return _Outcome(compute(directory, data_dir))
            with directory.lock(wait=task.wait):
                if (run := directory.result()) is not None:
                    return _Outcome(run.status, found=True)
                try:
                    return _Outcome(compute(directory, data_dir))
                except (BusyError, UnwritableError, UnreadableError):
                    raise
                except Exception:
                    if not directory.has_status():
                        directory.fail(traceback.format_exc())
                    raise
    except BusyError:
        return _Outcome("busy")
    except UnwritableError as error:
        return _Outcome("unwritable", str(error))
    except UnreadableError as error:
        return _Outcome("unreadable", str(error))
    except Exception as error:
        return _Outcome("failed", "".join(traceback.format_exception_only(error)).strip())


class _Report:
    """Counts runs and estimates the time left from those computed here."""

    def __init__(self, progress: Progress | None, reused: int, total: int) -> None:
        self._progress, self._done, self._total = progress, reused, total
        self._computed, self._started = 0, time.monotonic()
        self._tell(None)

    def one_more(self, outcome: _Outcome) -> None:
        self._done += 1
        self._computed += not outcome.found
        elapsed = time.monotonic() - self._started
        self._tell(elapsed / self._computed * (self._total - self._done) if self._computed else None)

    def _tell(self, seconds_left: float | None) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, seconds_left)
