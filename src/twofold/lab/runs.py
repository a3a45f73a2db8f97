"""Run directories: `<out>/runs/<id>/`, written once, never computed twice, read as a table.

    config.json           what was run
    environment.json      where and with which versions
    metrics.csv           one row an epoch, from epoch 0 (before training) on; no times in it
    curvature.csv         one row a tracked step, where the configuration has track_every
    weights.safetensors   the model at the end
    status.json           finished, diverged or failed (with the error); written last, with checksums of the others
    checkpoint.safetensors  while the run is under way

Every file is written beside its place and renamed into it, so that a reader sees the whole file or none.
"""

import json
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import filelock
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor, nn

import twofold
from twofold.curvature.track import Tracker
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.lab.config import RunConfig
from twofold.lab.files import (
    UnreadableError,
    checksum,
    make_room,
    read_json,
    read_table,
    read_tensors,
    to_csv,
    to_json,
    unwritable,
    write_whole,
)
from twofold.lab.models import build

Status = Literal["finished", "diverged", "failed"]
Row = dict[str, float]

_CONFIG, _ENVIRONMENT, _METRICS = "config.json", "environment.json", "metrics.csv"
_TRACKED, _WEIGHTS, _STATUS = "curvature.csv", "weights.safetensors", "status.json"
_CHECKPOINT = "checkpoint.safetensors"
_CHANGES_NO_NUMBERS = (
    "__main__.py",
    "cli.py",
    "integrations",
    "lab/costs.py",
    "lab/figures",
    "lab/loggers.py",
    "lab/places",
    "lab/report",
    "lab/sweep.py",
    "lab/terminal.py",
)


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk.

    Attributes:
        id: its name, a hash of what makes it what it is.
        config: what was run.
        status: "finished", "diverged" (its loss or a gradient became infinite or NaN: a result) or "failed".
        metrics: one row an epoch; empty for a failed run.
        final: the last row of `metrics`.
        path: its directory.
        error: the traceback of a failed run, else "".
        tracked: the curvature along training, one row a tracked step; empty where nothing was tracked.
        tracking: what that took: seconds, num_matvecs, num_records and share (of the run's time).
    """

    id: str
    config: RunConfig
    status: Status
    metrics: pd.DataFrame
    final: dict[str, float]
    path: Path
    error: str = ""
    tracked: pd.DataFrame = field(default_factory=pd.DataFrame)
    tracking: Mapping[str, float] = field(default_factory=dict)


def run_id(config: RunConfig) -> str:
    """The name of a run: a hash of its configuration (threads and device among it), of twofold's code and of torch.

    Example:
        >>> from twofold.lab.config import mnist1d
        >>> run_id(mnist1d()) == run_id(mnist1d())
        True
    """
    identity = {"config": config.to_dict(), "code": code_version(), "torch": torch.__version__}
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def code_version() -> str:
    """twofold's version, and a checksum of the sources that decide a run's numbers: a changed checkout runs anew."""
    root = Path(twofold.__file__).parent
    digest = sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(_CHANGES_NO_NUMBERS):
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{twofold.__version__}+{digest.hexdigest()[:12]}"


def prepare_output(out: Path) -> None:
    """Make `<out>/runs` and see that it can be written to.

    Raises:
        UnwritableError: it cannot.
    """
    runs = Path(out) / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs) as file:
            file.write(bytes(1 << 16))  # a full disk still takes an empty file
    except OSError as error:
        raise unwritable(Path(out), error) from error


class BusyError(TwofoldError):
    """Another process computes this run at the moment."""


class RunDirectory:
    """The directory of one run, for the one who computes it.

    Args:
        out: the output directory; the run lies in `<out>/runs/<id>`.
        config: what is run.
    """

    def __init__(self, out: Path, config: RunConfig) -> None:
        self.config = config
        self.id = run_id(config)
        self.path = Path(out) / "runs" / self.id

    @contextmanager
    def lock(self, *, wait: bool = True) -> Iterator[None]:
        """Keep other processes from computing this run; a killed process lets go. Nests within a process.

        Args:
            wait: whether to wait (then told) until no other process computes it.

        Raises:
            BusyError: another process computes it, and `wait` is False.
            UnwritableError: the directory cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / ".lock", is_singleton=True)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                busy = f"Another process computes {self.path} at the moment."
                if not wait:
                    raise BusyError(busy) from None
                warnings.warn(f"{busy} This one waits for it.", TwofoldWarning, stacklevel=2)
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise unwritable(self.path, error) from error
        try:
            yield
        finally:
            lock.release()

    def is_busy(self) -> bool:
        """Whether a process computes this run at the moment."""
        if not self.path.is_dir():
            return False
        lock = filelock.FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            return True
        except (OSError, NotImplementedError):  # whoever computes it will say
            return False
        lock.release()
        return False

    def result(self) -> Run | None:
        """The run if it is finished or diverged; None if it is to be computed.

        A damaged result, or that of another configuration, is told (a TwofoldWarning that names the file) and counts as
        none.

        Raises:
            UnreadableError: a file is there and cannot be read.
        """
        if not self.has_status():
            return None
        try:
            run = load_run(self.path)
            if run.config != self.config:
                raise TwofoldError(f"{self.path / _CONFIG} is that of another run.")
        except UnreadableError:
            raise
        except TwofoldError as error:
            warnings.warn(f"{error} The run is computed anew.", TwofoldWarning, stacklevel=2)
            return None
        return None if run.status == "failed" else run

    def has_result(self) -> bool:
        """Whether its status says finished or diverged, without a look at the other files."""
        try:
            return json.loads((self.path / _STATUS).read_text()).get("status") in ("finished", "diverged")
        except (OSError, ValueError, AttributeError):
            return False

    def begin(self) -> None:
        """Clear what an earlier attempt left, except its checkpoint; write configuration and environment."""
        try:
            for stale in [_STATUS, _METRICS, _TRACKED, _WEIGHTS]:
                make_room(self.path / stale)
            for other in [_CONFIG, _ENVIRONMENT, _CHECKPOINT]:
                if (self.path / other).is_dir():
                    make_room(self.path / other)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._write(_CONFIG, to_json(self.config.to_dict()))
        self._write(_ENVIRONMENT, to_json(_environment(self.config)))

    def write_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep what is needed to go on: tensors by name, and JSON values."""
        text = json.dumps(state)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"state": text, "sha256": _checksum(tensors, self.id + text)}
        # not durable: after a power cut the checksum tells, and the run starts over
        self._write(_CHECKPOINT, safetensors.torch.save(tensors, metadata), durable=False)

    def read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `write_checkpoint` kept; None if there is none, or (then told) if it is damaged or another run's.

        Raises:
            UnreadableError: it is there and cannot be read.
        """
        path = self.path / _CHECKPOINT
        if not path.exists():
            return None
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("sha256") != _checksum(tensors, self.id + metadata.get("state", "")):
                raise TwofoldError(f"{path} is damaged, or that of another run: its checksum does not match.")
        except UnreadableError:
            raise
        except TwofoldError as error:
            warnings.warn(f"{error} The run starts over.", TwofoldWarning, stacklevel=2)
            return None
        return tensors, json.loads(metadata["state"])

    def finish(
        self,
        *,
        status: Literal["finished", "diverged"],
        rows: Sequence[Row],
        model: nn.Module,
        input_shape: Sequence[int],
        num_classes: int,
        seconds: float,
        tracker: Tracker | None = None,
    ) -> None:
        """Write metrics, what was tracked, and weights, then the status; the checkpoint goes."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        # one entry: safetensors writes several in random order, and the file would differ from run to run
        metadata = {"model": json.dumps({"input_shape": list(input_shape), "num_classes": num_classes})}
        self._write(_METRICS, to_csv(rows))
        self._write(_WEIGHTS, safetensors.torch.save(weights, metadata))
        record: dict[str, Any] = {"status": status, "seconds": round(seconds, 3)}
        if tracker is not None:
            self._write(_TRACKED, to_csv(tracker.history))
            record["tracking"] = asdict(tracker.overhead)
        files = [_CONFIG, _METRICS, _WEIGHTS, *([_TRACKED] if tracker is not None else [])]
        record["sha256"] = {name: checksum(self.path / name) for name in files}
        self._write(_STATUS, to_json(record))
        with suppress(OSError):  # the run is whole without
            (self.path / _CHECKPOINT).unlink()

    def has_status(self) -> bool:
        """Whether it has been told what became of the run."""
        return (self.path / _STATUS).exists()

    def fail(self, error: str) -> None:
        """Record that the run failed, and why; the next attempt goes on from its checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(_CONFIG, to_json(self.config.to_dict()))
        self._write(_STATUS, to_json({"status": "failed", "error": error, "sha256": {}}))

    def _write(self, name: str, content: bytes, durable: bool = True) -> None:
        write_whole(self.path / name, content, durable=durable)


def load_run(directory: Path) -> Run:
    """Read one run directory, checking every file against the checksums in its status.

    Raises:
        TwofoldError: there is no run, it is not finished, or a file of it is damaged; the message names the file.
    """
    path = Path(directory)
    if not (path / _STATUS).exists():
        state = "has not finished" if (path / _CONFIG).exists() else "is no run directory"
        raise TwofoldError(f"{path} {state}: it holds no {_STATUS}.")
    status = read_json(path / _STATUS)
    checksums = status.get("sha256")
    if status.get("status") not in ("finished", "diverged", "failed") or not isinstance(checksums, dict):
        raise TwofoldError(f"{path / _STATUS} is damaged: it holds no status that is known.")
    if status["status"] != "failed":
        _verify(path, checksums)
    values = read_json(path / _CONFIG)
    try:
        config = RunConfig.from_dict(values)
    except TwofoldError as error:
        raise TwofoldError(f"{path / _CONFIG} is damaged: {error}") from error
    metrics, tracked = pd.DataFrame(), pd.DataFrame()
    if status["status"] != "failed":
        metrics = read_table(path / _METRICS)
        if config.track_every:
            tracked = read_table(path / _TRACKED)
    final = {str(name): value for name, value in metrics.iloc[-1].items()} if len(metrics) else {}
    error, tracking = str(status.get("error", "")), status.get("tracking")
    tracking = tracking if isinstance(tracking, dict) else {}
    return Run(path.name, config, status["status"], metrics, final, path, error, tracked, tracking)


def load_runs(out: Path, ids: Sequence[str] | None = None) -> list[Run]:
    """The runs of an output directory, in the order of `ids`, or all that have a status, by id.

    Damaged runs are left out with a warning that names the file, unless they are asked for by id.

    Raises:
        TwofoldError: a run in `ids` is missing or damaged.
    """
    runs = Path(out) / "runs"
    if ids is not None:
        return [load_run(runs / name) for name in ids]
    found = []
    for status in sorted(runs.glob(f"*/{_STATUS}")):
        try:
            found.append(load_run(status.parent))
        except TwofoldError as error:
            warnings.warn(f"{error} The run is left out.", TwofoldWarning, stacklevel=2)
    return found


def load_table(out: Path, ids: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a run: id, status, every field of its configuration ("regularizer.strength"), its final metrics.

    Under "metrics" each row holds the run's whole table, one row an epoch.

    Args:
        out: the output directory.
        ids: which runs, in this order; None takes all.

    Raises:
        TwofoldError: a run in `ids` is missing or damaged.
    """
    rows = []
    for run in load_runs(out, ids):
        row = {"id": run.id, "status": run.status, "metrics": run.metrics}
        rows.append({**row, **flatten(run.config.to_dict()), **run.final})
    return pd.DataFrame(rows)


def load_model(directory: Path) -> tuple[nn.Module, RunConfig]:
    """The trained model of a run, on the CPU and in eval mode, and its configuration.

    Raises:
        TwofoldError: the run has no weights (it failed), or a file of it is damaged.
    """
    run = load_run(directory)
    if run.status == "failed":
        raise TwofoldError(f"{run.path} has no weights: the run failed.")
    weights, metadata = read_tensors(run.path / _WEIGHTS)
    try:
        model = build(run.config.model, **json.loads(metadata["model"]), seed=0)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TwofoldError(f"{run.path / _WEIGHTS} does not fit the model of {_CONFIG}: {error}") from error
    return model.eval(), run.config


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _environment(config: RunConfig) -> dict[str, Any]:
    cuda = config.device.startswith("cuda") and torch.cuda.is_available()
    return {
        "twofold": code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": config.threads,
        "device": torch.cuda.get_device_name(config.device) if cuda else platform.machine(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _verify(path: Path, checksums: Mapping[str, str]) -> None:
    for name in (_CONFIG, _METRICS, _WEIGHTS, *({_TRACKED} & checksums.keys())):
        if checksum(path / name) != checksums.get(name):
            raise TwofoldError(f"{path / name} is damaged: its checksum is not the one in {_STATUS}.")


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + bytes(tensors[name].reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
