"""How figures look, and how they become files that are the same, byte for byte, on every rerun."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#3d444d"
"""Text and axes. A page that knows its own text colour may put that in its place."""

COLOURS = {"gelu": "#2f7ed8", "relu": "#e8702a", "green": "#2a9d6f", "purple": "#8a63d2"}
"""Readable on white and on near-black, and apart for colour-blind eyes; line style and marker say it a second time."""

_TIP = "tip:"
"""Begins the id of a point with a text, until the SVG is finished."""

_PANEL_INCHES = (3.5, 2.75)
_SETTINGS = {
    "svg.hashsalt": "twofold",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}


@contextmanager
def applied() -> Iterator[None]:
    """The style, for drawing and for saving: whatever a user's matplotlibrc says, the files come out the same."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most `columns` of them side by side."""
    columns = max(1, min(count, columns))
    rows = math.ceil(count / columns)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows + 0.45), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, above them, from the labelled lines of one; as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=3.2)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


@dataclass(frozen=True)
class Line:
    """How one curve is drawn: its rows in a table of numbers, its name in the legend, colour, marker and dash."""

    rows: pd.DataFrame
    label: str
    colour: str
    marker: str = "o"
    dash: str = "-"


def strength_curves(
    axes: Axes, lines: Sequence[Line], column: str, within: tuple[float, float] | None = None, axis: str = "rho"
) -> None:
    """Draw `column` against rho, or another axis, with its 95 % intervals as bars.

    Each value of the axis is one step. A hollow marker says that runs behind the point diverged.

    Args:
        axes: the panel.
        lines: the curves; their rows have the axis, diverged, and the column with its _low and _high.
        column: what is drawn.
        within: values that can occur at all; bars are cut there.
        axis: the column of the rows that is the x axis.
    """
    strengths = sorted({strength for line in lines for strength in line.rows[axis]})
    place = {strength: i for i, strength in enumerate(strengths)}
    for i, line in enumerate(lines):
        shift = min(0.09, 0.6 / len(lines)) * (i - (len(lines) - 1) / 2)
        x = line.rows[axis].map(place) + shift
        y, low, high = (line.rows[column + end] for end in ("", "_low", "_high"))
        axes.vlines(x, low, high, color=line.colour, linewidth=1.3, alpha=0.55)
        axes.plot(x, y, color=line.colour, linestyle=line.dash, marker=line.marker, label=line.label)
        hollow = line.rows["diverged"] > 0
        axes.plot(x[hollow], y[hollow], color=line.colour, linestyle="", marker=line.marker, markerfacecolor="white")
        hover(axes, x, y, _texts(line, column, axis))
    axes.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axes.set_xlim(-0.4, len(strengths) - 0.6)
    axes.set_xlabel(axis)
    _show_means(axes, pd.concat([line.rows for line in lines]), column, within)


def hover(axes: Axes, x: Iterable[float], y: Iterable[float], texts: Iterable[str]) -> None:
    """Let points show a text under the pointer where the figure is an SVG."""
    for one_x, one_y, text in zip(x, y, texts, strict=True):
        axes.plot([one_x], [one_y], marker="o", markersize=11, alpha=0, gid=_TIP + text, scalex=False, scaley=False)


def _texts(line: Line, column: str, axis: str) -> list[str]:
    return [
        f"{line.label}, {axis} {row[axis]:g}: {with_interval(row, column)}, {seeds_of(row)}"
        for _, row in line.rows.iterrows()
    ]


def with_interval(row: pd.Series, column: str) -> str:
    """A mean and its interval as text."""
    return f"{row[column]:.4g} [{row[f'{column}_low']:.4g}, {row[f'{column}_high']:.4g}]"


def seeds_of(row: pd.Series) -> str:
    """How many seeds are behind a point, and how many of them diverged."""
    return f"{row['seeds']:.0f} seeds" + (f", {row['diverged']:.0f} diverged" if row["diverged"] else "")


def _show_means(axes: Axes, rows: pd.DataFrame, column: str, within: tuple[float, float] | None) -> None:
    """Scale the y axis to the means; wide bars may run out of the panel rather than flatten the curves."""
    bottom, top = rows[column].min(), rows[column].max()
    if math.isnan(bottom):
        return
    room = max(top - bottom, 1.0)
    low, high = rows[f"{column}_low"].min(), rows[f"{column}_high"].max()
    bottom, top = (max(bottom - 0.6 * room, min(low, bottom)), min(top + 0.6 * room, max(high, top)))
    if within is not None:
        bottom, top = max(bottom, within[0]), min(top, within[1])
    axes.set_ylim(bottom - 0.06 * room, top + 0.12 * room)


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, without date or program name."""
    svg = _saved(figure, "svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return re.sub(rf'<g id="{_TIP}([^"]*)">', r'<g class="tip"><title>\1</title>', svg.decode()).encode()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG on white, without program name."""
    return _saved(figure, "png", dpi=160, facecolor="white", metadata={"Software": None})


def _saved(figure: Figure, kind: str, **arguments) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, **arguments)
    return file.getvalue()
