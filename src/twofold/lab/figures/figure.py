"""What a figure is: its runs, its drawing, its numbers and its verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twofold.lab.config import RunConfig
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.verdicts import Verdict

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd


@dataclass(frozen=True)
class Figure:
    """One figure of the paper (arXiv 2401.10809), or one that it lacks, as an experiment that can be run and judged.

    Attributes:
        name: the figure's number in the paper, as text; a word for what the paper does not have.
        title: what it shows, in a few words.
        caption: what is drawn, for the page; also the text for readers who do not see the picture.
        differs: what differs from the paper's set-up, one sentence each.
        rule: how its findings are judged; fixed before the runs.
        runs: (scale, data set's name) -> the configurations to run.
        draw: (table of those runs, panels side by side) -> the drawing; the table may hold several data sets.
        numbers: table of those runs -> what is drawn, one row a point; becomes the CSV file.
        verdicts: (table of those runs, scale) -> one verdict for each finding and data set.
    """

    name: str
    title: str
    caption: str
    differs: tuple[str, ...]
    rule: str
    runs: Callable[[Scale, str], list[RunConfig]]
    draw: Callable[[pd.DataFrame, int], matplotlib.figure.Figure]
    numbers: Callable[[pd.DataFrame], pd.DataFrame]
    verdicts: Callable[[pd.DataFrame, Scale], list[Verdict]]

    @property
    def stem(self) -> str:
        """Name of its files without the ending."""
        return f"figure-{self.name}"

    @property
    def heading(self) -> str:
        """How texts call it."""
        return f"Figure {self.name}" if self.name.isdecimal() else f"Beyond the paper, {self.name}"
