"""Where the runs of a sweep are computed: this machine, a Ray cluster, or Slurm.

Adding one: a file with a class that has what `Place` has, and a branch in `find_place`.
"""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from twofold.errors import TwofoldError
from twofold.lab.ranks import launched

PLACES = ("local", "ray", "slurm")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""The environment of a worker: a run sets torch's own threads, as its configuration says."""


class WorkerDiedError(Exception):
    """The process of a run ended before the run did: killed, out of memory, preempted, or crashed."""


class Place(Protocol):
    """Somewhere that computes.

    Attributes:
        slots: how many runs it takes at once.
        isolated: whether a worker that dies takes only its own run with it.
    """

    slots: int
    isolated: bool

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Compute function(*arguments) there; the future raises WorkerDiedError where its process did."""
        ...

    def stop(self) -> None:
        """End what is being computed."""
        ...


def find_place(text: str, workers: int | None, out: Path, *, gpus: int = 0) -> Place:
    """Return the place that `text` names.

    Args:
        text: "local" (under torchrun: all its processes together, one run after the other), "ray", "ray:ADDRESS",
            "slurm" or "slurm:OPTION=VALUE,...", where the options are those of submitit
            (timeout_min=60,slurm_partition=gpu).
        workers: runs at once; None takes one for each core (or GPU, where runs take one) of this machine, one for each
            core of the Ray cluster, 16 on Slurm.
        out: the output directory; Slurm's logs go to its folder "slurm".
        gpus: GPUs of each run.

    Raises:
        TwofoldError: there is no such place, it cannot be reached, or it needs a package that is not installed.
    """
    name, _, details = text.partition(":")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise TwofoldError(f"workers is {workers!r}; expected an integer of at least 1, or None for as many as fit.")
    if launched() > 1:
        if text != "local" or workers not in (None, 1):
            raise TwofoldError(
                f"torchrun has started {launched()} processes, which compute one run after the other together: leave "
                "--place and --workers out, or start without torchrun."
            )
        from twofold.lab.places.here import Here

        return Here()
    if name == "local" and not details:
        from twofold.lab.places.local import Local

        return Local(workers, gpus=gpus)
    if name == "ray":
        from twofold.lab.places.ray_cluster import RayCluster

        return RayCluster(workers, address=details or None, gpus=gpus)
    if name == "slurm":
        from twofold.lab.places.slurm import Slurm

        return Slurm(workers, folder=out / "slurm", options=details, gpus=gpus)
    raise TwofoldError(f"There is no place {text!r} for a sweep; known: {', '.join(PLACES)}.")
