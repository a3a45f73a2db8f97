"""Where a run's numbers go while it trains, beside its own files: TensorBoard, Weights & Biases.

A new one is a class with `log` and `close`, and a row in LOGGERS.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from twofold.errors import TwofoldError
from twofold.lab.config import RunConfig


class Logger(Protocol):
    """Takes numbers by name, in the order of the steps."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the numbers of a step."""

    def close(self) -> None:
        """Write what is pending."""


class TensorBoard:
    """Event files in <run>/tensorboard, for `tensorboard --logdir`."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TwofoldError(
                "The tensorboard logger needs TensorBoard: pip install 'twofold[tensorboard]'."
            ) from error
        self._writer = SummaryWriter(str(path / "tensorboard"))
        self._writer.add_text("config", config.label(), 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one scalar for each number."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases in <run>/wandb; offline unless WANDB_MODE says otherwise, for `wandb sync`."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TwofoldError("This logger needs Weights & Biases: pip install 'twofold[wandb]'.") from error
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "twofold"),
            mode=os.environ.get("WANDB_MODE", "offline"),
            id=path.name,
            resume="allow",
            name=config.label(),
            config=config.to_dict(),
            dir=str(path),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add to the run's history."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, RunConfig], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


Log = Callable[[Mapping[str, Any], int], None]
"""log(metrics, step)"""


@contextmanager
def opened(names: Sequence[str], path: Path | None, config: RunConfig) -> Iterator[Log]:
    """Open loggers by name and yield log(metrics, step), which all of them get.

    Args:
        names: of LOGGERS.
        path: the run's directory.
        config: what is run.

    Raises:
        TwofoldError: an unknown name, a package that is not installed, or no directory to write into.
    """
    unknown = [name for name in names if name not in LOGGERS]
    if unknown or isinstance(names, str):
        raise TwofoldError(f"loggers are names among {', '.join(LOGGERS)}; {names!r} came.")
    if names and path is None:
        raise TwofoldError(f"loggers={tuple(names)!r}: pass directory=, where they write.")
    with ExitStack() as stack:
        loggers = []
        for name in names:
            logger = LOGGERS[name](Path(path or "."), config)
            stack.callback(logger.close)
            loggers.append(logger)

        def log(metrics: Mapping[str, Any], step: int) -> None:
            for logger in loggers:
                logger.log({name: value for name, value in metrics.items() if name != "step"}, step)

        yield log
