"""Tables as a reproduction would leave them, with accuracies that a test chooses."""

from collections.abc import Callable

import pandas as pd

from twofold.lab.config import RunConfig
from twofold.lab.figures import Figure
from twofold.lab.figures.scales import Scale
from twofold.lab.runs import flatten

SPLITS = ("train", "validation", "test")


def table_of(
    figure: Figure, scale: Scale, accuracy: Callable[[RunConfig, str], float], data: tuple[str, ...] = ("mnist1d",)
) -> pd.DataFrame:
    """The figure's runs, all finished, with `accuracy(config, split)` in percent."""
    rows = []
    for config in (config for name in data for config in figure.runs(scale, name)):
        metrics = {f"{split}/accuracy": accuracy(config, split) / 100 for split in SPLITS}
        rows.append({"id": f"run-{len(rows)}", "status": "finished", **flatten(config.to_dict()), **metrics})
    return pd.DataFrame(rows)


def noise(config: RunConfig) -> float:
    """A small deviation of each seed and method, so that intervals have a width."""
    return 0.1 * ((7 * config.seed + 3 * len(config.regularizer.name)) % 5 - 2)
