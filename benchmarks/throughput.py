"""What a sweep costs beside its runs: the same runs by plain processes side by side, by this machine's pool, by Ray.

Run: python benchmarks/throughput.py, on an idle machine; with a number of runs it shows the table and keeps nothing.

Each way starts in a new process and an empty directory, and every run writes its directory. "In all" is from the start
of the process to its end; "running" from the first run's start to the last one's end, without what is paid once. The
ways take turns, and the fastest of each counts.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from results import Table, show
from twofold.lab.config import RunConfig, mnist1d
from twofold.lab.places.local import Local
from twofold.lab.runs import RunDirectory
from twofold.lab.sweep import sweep
from twofold.lab.training import train

PROCESSES = 2
RUNS = 40
ROUNDS = 3


def configs(count: int) -> list[RunConfig]:
    return [replace(mnist1d(), seed=seed) for seed in range(count)]


def plain(out: Path, count: int, part: int) -> None:
    """Every PROCESSES-th run, in turn, with no sweep."""
    for config in configs(count)[part::PROCESSES]:
        train(config, directory=RunDirectory(out, config))


def swept(out: Path, count: int, place: str) -> None:
    result = sweep(configs(count), out, place=place, workers=PROCESSES)
    assert len(result.finished) == count
    if place == "local":
        Local(PROCESSES).stop()  # they would outlive the sweep, ready for the next one


def measured(start: Callable[[Path], list[list[str]]], count: int) -> tuple[float, float]:
    """Seconds in all and of running, of processes side by side."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        processes = [subprocess.Popen([sys.executable, __file__, *line]) for line in start(Path(folder))]
        for process in processes:
            assert process.wait() == 0
        seconds = time.perf_counter() - begin
        runs = list(Path(folder, "runs").iterdir())
        assert len(runs) == count
        first = min((run / "config.json").stat().st_mtime for run in runs)
        last = max((run / "status.json").stat().st_mtime for run in runs)
        return seconds, last - first


def table(count: int = RUNS) -> Table:
    """All ways, one after the other."""
    ways: dict[str, Callable[[Path], list[list[str]]]] = {
        f"{PROCESSES} processes, no sweep": lambda out: [
            ["plain", str(out), str(count), str(part)] for part in range(PROCESSES)
        ],
        "this machine's pool": lambda out: [["swept", str(out), str(count), "local"]],
        "Ray": lambda out: [["swept", str(out), str(count), "ray"]],
    }
    rounds = [{name: measured(start, count) for name, start in ways.items()} for _ in range(ROUNDS)]
    times = {name: [min(values) for values in zip(*(r[name] for r in rounds), strict=True)] for name in ways}
    base = next(iter(times.values()))
    rows = [
        {
            "way": name,
            "runs": count,
            "in all, s": total,
            "running, s": running,
            "runs a minute": 60 * count / running,
            "throughput": base[1] / running,
            "throughput in all": base[0] / total,
        }
        for name, (total, running) in times.items()
    ]
    return Table("throughput", rows)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["plain", out, count, part]:
            plain(Path(out), int(count), int(part))
        case ["swept", out, count, place]:
            swept(Path(out), int(count), place)
        case [count]:
            show(table(int(count)))
        case _:
            table().publish()
