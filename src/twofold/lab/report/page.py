"""The page: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup

import twofold
from twofold.lab.figures import Figure
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.style import INK
from twofold.lab.figures.verdicts import Verdict
from twofold.lab.runs import Run, flatten

_PACKAGES = ("numpy", "scipy", "pandas", "matplotlib")


@dataclass(frozen=True)
class FigureOnPage:
    """A figure with everything that the page shows of it.

    Attributes:
        figure: the figure.
        numbers: what is drawn; columns NAME_low and NAME_high are the interval of NAME.
        svg: the drawing with panels side by side.
        narrow_svg: the same with panels below each other, for narrow screens.
        csv: the CSV file.
        runs: ids of its runs.
        command: what makes this figure alone.
    """

    figure: Figure
    numbers: pd.DataFrame
    svg: str
    narrow_svg: str
    csv: bytes
    runs: Sequence[str] = ()
    command: str = ""

    @property
    def csv_uri(self) -> str:
        """The CSV file as a data URI."""
        return "data:text/csv;base64," + base64.b64encode(self.csv).decode()


def render_page(
    *,
    scale: Scale,
    data: Sequence[str],
    command: str,
    verdicts: Sequence[Verdict],
    figures: Sequence[FigureOnPage],
    runs: Sequence[Run],
) -> str:
    """The whole page as HTML. Every text from outside (names, errors, the command) stays text.

    Args:
        scale: the scale that was run.
        data: names of the data sets.
        command: the command line that made it.
        verdicts: all verdicts; they come first.
        figures: the figures, in order.
        runs: all runs behind them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["urlencode"] = lambda text: quote(str(text), errors="replace")
    common, varied = _configurations(runs)
    of_id = {run.id: run.config for run in runs}
    methods = {
        item.figure.name: sorted({of_id[name].regularizer.name for name in item.runs if name in of_id})
        for item in figures
    }
    return environment.get_template("page.html.j2").render(
        version=twofold.__version__,
        scale=scale,
        data=data,
        command=command,
        counts=Counter(verdict.verdict for verdict in verdicts),
        statuses=Counter(run.status for run in runs),
        verdicts=verdicts,
        reach={name: _reach([v for v in verdicts if v.figure == name]) for name in {v.figure for v in verdicts}},
        figures=figures,
        methods=methods,
        every_method=sorted({run.config.regularizer.name for run in runs}),
        runs=runs,
        common=common,
        varied=varied,
        environment=_environment(runs),
        inline=inline_svg,
        cells=readable_cells,
        number=_decimal,
        strip=_strip,
        flat=_fields,
    )


def inline_svg(svg: str, prefix: str) -> Markup:
    """An SVG file as an element of a page: text in the page's own colour, ids that no other figure has."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", element, count=3)
    element = element.replace("xlink:href=", "href=").replace(INK, "currentColor")
    element = re.sub(r'\bid="', f'id="{prefix}-', element)
    element = re.sub(r'href="#', f'href="#{prefix}-', element)
    element = re.sub(r"url\(#", f"url(#{prefix}-", element)
    return Markup(element.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def readable_cells(numbers: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of numbers, each mean and its interval in one cell."""
    columns = [name for name in numbers.columns if not name.endswith(("_low", "_high"))]

    def cell(row: pd.Series, name: str) -> str:
        if f"{name}_low" not in numbers.columns:
            return f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])
        return f"{_decimal(row[name])} [{_decimal(row[f'{name}_low'])}, {_decimal(row[f'{name}_high'])}]"

    return columns, [[cell(row, name) for name in columns] for _, row in numbers.iterrows()]


def _decimal(value: float) -> str:
    """A percentage or a difference of two, as text: two decimals are enough, and the minus sign is a real one."""
    return "–" if math.isnan(value) else f"{value:.2f}".replace("-", "−")


def _reach(verdicts: Sequence[Verdict]) -> float:
    """Half the width, in points, of the strip of effects: room for every effect, not for every wide interval."""
    effects = [abs(verdict.effect) for verdict in verdicts if not math.isnan(verdict.effect)]
    return max(2.0, 2 * max(effects, default=0.0))


def _strip(verdict: Verdict, reach: float) -> dict[str, float] | None:
    """Where a verdict's effect and interval lie on a strip from 0 to 100; None where there is no effect."""
    if math.isnan(verdict.effect):
        return None

    def place(value: float) -> float:
        return round(50 + 50 * min(max(value / reach, -1.0), 1.0), 2)

    low, high = (verdict.effect if math.isnan(end) else end for end in (verdict.low, verdict.high))
    return {"effect": place(verdict.effect), "low": place(low), "width": round(place(high) - place(low), 2)}


def _configurations(runs: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    """Fields that all runs share with their values, and the names of those that vary."""
    configs = [_fields(run) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    values = {name: {json.dumps(config.get(name)) for config in configs} for name in names}
    common = {name: configs[0].get(name) for name in names if len(values[name]) == 1}
    return common, [name for name in names if name not in common]


def _fields(run: Run) -> dict[str, Any]:
    return flatten(run.config.to_dict())


def _environment(runs: Sequence[Run]) -> dict[str, str]:
    """Where the runs were made, and the packages that drew the page; several values where runs differ."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, value in _read_mapping(run.path / "environment.json").items():
            found.setdefault(name, set()).add(str(value))
    started = sorted(found.pop("started", set()))
    texts = {name: ", ".join(sorted(values)) for name, values in found.items()}
    if started:
        texts["started"] = " to ".join(dict.fromkeys((started[0], started[-1])))
    return texts | {name: version(name) for name in _PACKAGES}


def _read_mapping(path: Path) -> Mapping[str, Any]:
    """A JSON object, or nothing where there is none: the environment is told, never needed."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
