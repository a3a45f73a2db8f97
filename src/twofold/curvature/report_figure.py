"""The figure of a curvature report. Imported only when a report is plotted."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

if TYPE_CHECKING:
    from twofold.curvature.report import CurvatureReport

_INK, _SOFT = "#3d444d", "#8b949e"
_COLOURS = {
    "hessian": _INK,
    "gauss_newton": "#2f7ed8",
    "nme": "#e8702a",
    "activation_nme": "#c9417c",
    "rest": "#f2b25c",
}
_LABELS = {"hessian": "H", "gauss_newton": "GN", "nme": "NME", "activation_nme": "NME, phi''", "rest": "NME, rest"}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
}
_BLUES = LinearSegmentedColormap.from_list("gauss_newton", ["#f4f8fd", "#9cc3ee", "#2f7ed8", "#123c70"])
_ORANGES = LinearSegmentedColormap.from_list("nme", ["#fdf6f1", "#f4b892", "#e8702a", "#7d3407"])

_COLUMNS = 3


def draw(report: "CurvatureReport") -> Figure:
    """Draw every part that a report has, one panel each."""
    panels: list[tuple[int, Callable[[Any, CurvatureReport], None]]] = []  # (columns wide, how to draw)
    if report.densities:
        panels.append((2, _spectra))
    panels.append((1, _norms))
    if report.eigenvalues:
        panels.append((1, _eigenvalues))
    if report.block_norms:
        panels += [(1, _gauss_newton_blocks), (1, _nme_blocks)]
    panels.append((1, _traces))
    panels.append((1, _shares))
    if report.anatomy:
        panels.append((1, _anatomy))
    places, row, column = [], 0, 0
    for width, _ in panels:
        if column + width > _COLUMNS:
            row, column = row + 1, 0
        places.append((row, column, width))
        column += width
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(12.0, 3.3 * (row + 1) + 0.7), layout=layout)
        grid = figure.add_gridspec(row + 1, _COLUMNS)
        figure.suptitle(
            f"{report.model}: H = GN + NME    P = {report.num_parameters:,},  loss {report.loss:.4g},  "
            f"||NME|| / ||GN|| = {report.nme_ratio.value:.3g},  cosine {report.cosine.value:.2g}",
            x=0.012,
            ha="left",
            fontsize=11.5,
            fontweight="bold",
        )
        for (_, panel), (at, left, width) in zip(panels, places, strict=True):
            panel(figure.add_subplot(grid[at, left : left + width]), report)
        return figure


def _spectra(axes: Axes, report: "CurvatureReport") -> None:
    lowest = math.inf
    for name in ("gauss_newton", "nme", "hessian"):
        density = report.densities[name]
        x, y = density.grid.numpy(), density.density.numpy()
        colour = _COLOURS[name]
        lowest = min(lowest, 0.5 / (report.num_parameters * math.sqrt(2 * math.pi) * density.sigma))
        if name != "hessian":
            axes.fill_between(x, y, 1e-300, color=colour, alpha=0.22, linewidth=0)
        axes.plot(x, y, color=colour, linewidth=1.5, label=_LABELS[name], zorder=3 if name == "hessian" else 2)
    top = max(density.density.max().item() for density in report.densities.values())
    # no lower than half of one eigenvalue's height, nor than what a quadrature rule can tell
    axes.set_yscale("log")
    axes.set_ylim(max(lowest, 1e-9 * top), 3 * top)
    x = report.densities["hessian"].grid
    axes.set_xlim(x[0].item(), x[-1].item())
    if report.eigenvalues:
        values = [eigenvalue.value for eigenvalue in report.eigenvalues]
        axes.plot(values, [0.02] * len(values), "|", color=_INK, ms=9, mew=1.4, transform=axes.get_xaxis_transform())
    axes.set_title("Spectral densities")
    axes.set_xlabel("eigenvalue   (ticks: eigenvalues of H)" if report.eigenvalues else "eigenvalue")
    axes.set_ylabel("density")
    axes.grid(True)
    axes.legend(loc="upper right", ncols=3)


def _norms(axes: Axes, report: "CurvatureReport") -> None:
    _bars(axes, report, {name: (e.value, e.stderr) for name, e in report.frobenius.items()})
    axes.set_title("Frobenius norms")


def _traces(axes: Axes, report: "CurvatureReport") -> None:
    _bars(axes, report, {name: (e.value, e.stderr) for name, e in report.traces.items()})
    axes.set_title("Traces")


def _shares(axes: Axes, report: "CurvatureReport") -> None:
    _bars(axes, report, {name: (value, 0.0) for name, value in report.along_gradient.items()})
    axes.set_title("Along the gradient, g'A g / g'g")


def _bars(axes: Axes, report: "CurvatureReport", figures: dict[str, tuple[float, float]]) -> None:
    names = list(figures)
    places = np.arange(len(names))[::-1]
    values = [value if math.isfinite(value) else 0.0 for value, _ in figures.values()]
    errors = [error if math.isfinite(error) else 0.0 for _, error in figures.values()]
    axes.barh(places, values, xerr=errors, height=0.62, color=[_COLOURS[name] for name in names], ecolor=_SOFT)
    axes.axvline(0, color=_SOFT, linewidth=0.8)
    axes.set_yticks(places, [_LABELS[name] for name in names])
    low = min(0.0, *(v - e for v, e in zip(values, errors, strict=True)))
    high = max(0.0, *(v + e for v, e in zip(values, errors, strict=True)))
    room = (high - low) or 1.0
    axes.set_xlim(low - (0.05 * room if low < 0 else 0), high + 0.3 * room)
    for place, (value, _) in zip(places, figures.values(), strict=True):
        axes.text(1.0, place, f"{value:.3g}", transform=axes.get_yaxis_transform(), va="center", ha="right", fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.locator_params(axis="x", nbins=5)


def _eigenvalues(axes: Axes, report: "CurvatureReport") -> None:
    """Each eigenvalue as the sum of its halves: bars of opposite signs lie on opposite sides of zero."""
    found = report.eigenvalues[::-1]
    places = np.arange(len(found))[::-1]
    for name, halves in (("gauss_newton", [e.gauss_newton for e in found]), ("nme", [e.nme for e in found])):
        shift = 0.19 if name == "gauss_newton" else -0.19
        axes.barh(places + shift, halves, 0.36, color=_COLOURS[name], label=_LABELS[name])
    axes.plot([e.value for e in found], places, "D", color=_INK, ms=4.5, label="of H", zorder=3)
    axes.axvline(0, color=_SOFT, linewidth=0.8)
    axes.set_yticks(places, [f"{e.value:.3g}" for e in found])
    axes.tick_params(axis="y", length=0)
    axes.set_title("Eigenvalues of H, and their halves")
    axes.set_xlabel("v'GN v,  v'NME v")
    axes.grid(True, axis="x")
    axes.locator_params(axis="x", nbins=6)
    axes.legend(loc="best")


def _gauss_newton_blocks(axes: Axes, report: "CurvatureReport") -> None:
    _blocks(axes, report, "gauss_newton", _BLUES)


def _nme_blocks(axes: Axes, report: "CurvatureReport") -> None:
    _blocks(axes, report, "nme", _ORANGES)


def _blocks(axes: Axes, report: "CurvatureReport", matrix: str, colours: Any) -> None:
    """The norms of the blocks, on one scale of four decades for both halves."""
    norms = report.block_norms[matrix].value.numpy()
    high = max(report.block_norms[half].value.max().item() for half in ("gauss_newton", "nme")) or 1.0
    shown = np.ma.masked_less_equal(norms, high * 1e-4)
    image = axes.imshow(shown, cmap=colours, norm=LogNorm(high * 1e-4, high))
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03).outline.set_visible(False)
    names = _shortened(report.block_norms[matrix].blocks)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=7.5)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#f3f4f6")  # what is zero, or below four decades
    axes.set_title(f"{_LABELS[matrix]}: norms of blocks")


def _shortened(names: Sequence[str], longest: int = 18) -> list[str]:
    return [name if len(name) <= longest else "…" + name[1 - longest :] for name in names]


def _anatomy(axes: Axes, report: "CurvatureReport") -> None:
    parts = {kind: part for kind, part in report.anatomy.items() if part.frobenius.value > 0}
    places = np.arange(len(parts))[::-1]
    values = [part.frobenius.value for part in parts.values()]
    errors = [part.frobenius.stderr for part in parts.values()]
    colours = [_COLOURS[{"loss": "gauss_newton", "activation": "activation_nme"}.get(kind, "rest")] for kind in parts]
    axes.barh(places, values, xerr=np.nan_to_num(errors), height=0.62, color=colours, ecolor=_SOFT)
    axes.set_yticks(places, list(parts))
    axes.tick_params(axis="y", length=0)
    axes.set_title("Anatomy: norms by kind of operation")
    axes.grid(True, axis="x")
    axes.locator_params(axis="x", nbins=5)
