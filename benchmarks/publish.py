"""Make the tables of docs/benchmarks.md and benchmarks/results anew. Run: make bench, or publish.py [part ...]"""

import sys
import time
from collections.abc import Callable, Iterator

import compiled
import curvature
import memory
import oracles
import spectra
import steps
from models import MODELS
from results import Table


def costs() -> Iterator[Table]:
    """Of every model, and how they compare."""
    yield (table := curvature.table(list(MODELS)))
    yield curvature.speedups(table)


def peaks() -> Iterator[Table]:
    """Of memory."""
    yield memory.table(list(MODELS))


def programs() -> Iterator[Table]:
    """Of compiled products."""
    yield compiled.table(list(MODELS))


def training() -> Iterator[Table]:
    """Of training steps."""
    yield steps.table(list(steps.MODES))


def exact() -> Iterator[Table]:
    """What is right and what is not."""
    yield oracles.matrices()
    yield oracles.activation_diagonals()
    yield spectra.spectra()


PARTS: dict[str, Callable[[], Iterator[Table]]] = {
    "exact": exact,
    "costs": costs,
    "peaks": peaks,
    "programs": programs,
    "training": training,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        start = time.perf_counter()
        for table in PARTS[part]():
            table.publish()
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
