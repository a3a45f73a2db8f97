"""Many runs on this machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twofold.lab.config import RunConfig

Progress = Callable[[int, int, float | None], None]
"""progress(done, total, seconds_left): called at the start and after every run; seconds_left is None until known."""


@dataclass(frozen=True)
class SweepResult:
    """What became of the runs of a sweep.

    Attributes:
        finished: ids of the finished runs, in the order of the configurations.
        diverged: ids of those whose loss became infinite or NaN: results, with metrics.
        failed: id -> error of those that raised or whose process died twice.
        reused: how many of the finished and diverged were there before.
    """

    finished: tuple[str, ...]
    diverged: tuple[str, ...]
    failed: Mapping[str, str]
    reused: int


def sweep(
    configs: Sequence[RunConfig],
    out: Path,
    *,
    workers: int | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Train every configuration that has no result in `out` yet."""
    raise NotImplementedError
