"""Many runs, on this machine or on a cluster; nothing is computed twice."""

import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

from twofold.errors import TwofoldWarning
from twofold.lab import ranks
from twofold.lab.config import RunConfig
from twofold.lab.data import load
from twofold.lab.places import Place, WorkerDiedError, find_place
from twofold.lab.runs import RunDirectory, prepare_output
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
        diverged: ids of those whose loss became infinite or NaN: results, with metrics.
        failed: id -> error of those that raised, or whose process died twice; the traceback is in their status.json.
        reused: how many of the finished and diverged were there before.
    """

    finished: tuple[str, ...]
    diverged: tuple[str, ...]
    failed: Mapping[str, str]
    reused: int


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
            used.
    """
    # workers outlive a sweep, and with it the directory that relative paths start from
    out, data_dir = Path(out).absolute(), None if data_dir is None else Path(data_dir).absolute()
    gpus = int(any(config.device.startswith("cuda") for config in configs))
    there = find_place(place, workers, out, gpus=gpus)
    prepare_output(out)
    directories = {directory.id: directory for directory in (RunDirectory(out, config) for config in configs)}
    group = ranks.join(ranks.launched(), next((config.device for config in configs), "cpu"))
    outcomes: dict[str, tuple[str, str]] = ranks.from_first(
        {name: (run.status, "") for name, d in directories.items() if (run := d.result()) is not None}, group
    )
    reused = len(outcomes)
    pending = [directory for name, directory in directories.items() if name not in outcomes]
    for data in {directory.config.data for directory in pending}:
        load(data, data_dir)

    report = _Report(progress, reused, len(directories))
    if pending:
        there.slots = min(there.slots, len(pending))

        def submit(directory: RunDirectory) -> Future:
            return there.submit(_work, compute, directory, data_dir)

        def take(waiting: deque[RunDirectory]) -> RunDirectory:
            free = (i for i, directory in enumerate(waiting) if not directory.is_busy())
            i = ranks.from_first(next(free, 0) if ranks.is_first() else 0, group)
            directory = waiting[i]
            del waiting[i]
            return directory

        def record(directory: RunDirectory, status: str, error: str) -> None:
            outcomes[directory.id] = (status, error)
            report.one_more()

        try:
            _run_all(pending, there, take, submit, record)
        except BaseException:
            there.stop()
            raise
    return SweepResult(
        finished=tuple(name for name in directories if outcomes[name][0] == "finished"),
        diverged=tuple(name for name in directories if outcomes[name][0] == "diverged"),
        failed={name: outcomes[name][1] for name in directories if outcomes[name][0] == "failed"},
        reused=reused,
    )


def _run_all(
    pending: Sequence[RunDirectory],
    place: Place,
    take: Callable[[deque[RunDirectory]], RunDirectory],
    submit: Callable[[RunDirectory], Future],
    record: Callable[[RunDirectory, str, str], None],
) -> None:
    """Keep every slot busy, and try a run whose worker died once more: alone where one death takes all in flight."""
    waiting, again = deque(pending), deque[RunDirectory]()
    in_flight: dict[Future, tuple[RunDirectory, bool]] = {}
    while waiting or again or in_flight:
        while again and len(in_flight) < (place.slots if place.isolated else 1):
            directory = again.popleft()
            in_flight[submit(directory)] = (directory, True)
        alone = not place.isolated and (bool(again) or any(second for _, second in in_flight.values()))
        while waiting and not alone and len(in_flight) < place.slots:
            directory = take(waiting)
            in_flight[submit(directory)] = (directory, False)
        done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
        if not place.isolated and any(isinstance(future.exception(), WorkerDiedError) for future in done):
            done, _ = wait(in_flight)
        for future in done:
            directory, second = in_flight.pop(future)
            if not isinstance(future.exception(), WorkerDiedError):
                record(directory, *future.result())
            elif second:
                directory.fail(_DIED_TWICE)
                record(directory, "failed", _DIED_TWICE)
            else:
                again.append(directory)


def _work(compute: Compute, directory: RunDirectory, data_dir: Path | None) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TwofoldWarning)  # a sweep varies on purpose what they warn about
            return compute(directory, data_dir), ""
    except Exception as error:
        return "failed", "".join(traceback.format_exception_only(error)).strip()


class _Report:
    """Counts runs and estimates the time left from those computed here."""

    def __init__(self, progress: Progress | None, reused: int, total: int) -> None:
        self._progress, self._done, self._total = progress, reused, total
        self._computed, self._started = 0, time.monotonic()
        self._tell(None)

    def one_more(self) -> None:
        self._done += 1
        self._computed += 1
        elapsed = time.monotonic() - self._started
        self._tell(elapsed / self._computed * (self._total - self._done))

    def _tell(self, seconds_left: float | None) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, seconds_left)
