"""A reproduction: which figures at which scale, the runs behind them, and the files that it leaves.

report.html                       everything, on one page
verdicts.json                     one object for each finding and data set
figures/figure-<n>.svg|png|csv    the same, byte for byte, on every rerun
reproduction.json                 what was asked for, by one command or several, and which runs answer it
runs/<id>/                        the runs themselves
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from twofold.errors import TwofoldError
from twofold.lab.config import RunConfig
from twofold.lab.figures import Figure, figure_names, find_figure, select_figures, style
from twofold.lab.figures.scales import find_scale
from twofold.lab.figures.verdicts import Verdict
from twofold.lab.files import to_json, write_whole
from twofold.lab.ranks import is_first, launched
from twofold.lab.report.page import FigureOnPage, render_page
from twofold.lab.runs import code_version, load_runs, load_table, prepare_output, run_id
from twofold.lab.sweep import Progress, SweepResult, sweep

RECORD, VERDICTS, PAGE, FIGURES = "reproduction.json", "verdicts.json", "report.html", "figures"


@dataclass(frozen=True)
class Reproduction:
    """What is to be reproduced.

    Attributes:
        figures: their names.
        scale: the scale's name.
        data: names of the data sets; None takes for each figure those that the scale has for it.
    """

    figures: tuple[str, ...]
    scale: str
    data: tuple[str, ...] | None

    def configs(self, name: str) -> list[RunConfig]:
        """The runs of one figure, over all data sets; under torchrun its processes share each."""
        return [config for data in self.data_of(name) for config in self.configs_on(name, data)]

    def data_of(self, name: str) -> tuple[str, ...]:
        """The data sets of one figure."""
        return find_scale(self.scale).data_of(name) if self.data is None else self.data

    def configs_on(self, name: str, data: str) -> list[RunConfig]:
        """The runs of one figure on one data set."""
        return [replace(c, ranks=launched()) for c in find_figure(name).runs(find_scale(self.scale), data)]


@dataclass(frozen=True)
class Report:
    """What a reproduction says.

    Attributes:
        verdicts: in the order of the figures.
        page: the HTML page.
    """

    verdicts: list[Verdict]
    page: Path


def plan(
    figures: Sequence[int | str] = (),
    scale: str = "quick",
    data: str | None = None,
    *,
    gpu: bool = True,
) -> Reproduction:
    """Check what is asked for before anything runs.

    Args:
        figures: names of figures; none means all.
        scale: "smoke", "quick", "cpu" or "paper".
        data: one data set; None takes those of the scale.
        gpu: whether a scale that takes a GPU needs it here.

    Raises:
        TwofoldError: an unknown figure or scale, a data set that the scale does not run, or a GPU that is not there.
    """
    if data is not None:
        find_scale(scale).recipe(data)
    selected = select_figures(tuple(figures))
    names = tuple(figure.name for figure in selected)
    reproduction = Reproduction(names, scale, None if data is None else (data,))
    devices = {config.device for name in reproduction.figures for config in reproduction.configs(name)}
    if gpu and any(device.startswith("cuda") for device in devices) and not torch.cuda.is_available():
        raise TwofoldError(
            f"Scale {scale!r} needs a CUDA GPU, and torch sees none here. Take scale smoke, quick or cpu, or a place "
            "that has GPUs (--place slurm or ray); --dry-run says what it costs."
        )
    return reproduction


def reproduce(
    reproduction: Reproduction,
    out: Path,
    *,
    place: str = "local",
    workers: int | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Report | None, SweepResult]:
    """Compute the runs that `out` does not hold yet, then write the report; return it and what became of the runs.

    Figures that an earlier call left in `out` stay in the report, if scale, data sets, ranks and code were the same.

    Under torchrun the first process writes the report; the others return None in its place.

    Args:
        reproduction: from `plan`.
        out: the output directory.
        place: where to compute, as in `find_place`: "local", "ray" or "slurm".
        workers: runs at once; None takes what the place has.
        data_dir: where data files lie.
        progress: called with (runs done, total, seconds left or None).

    Raises:
        TwofoldError: before any run: `out` cannot be written to, or data cannot be had.
    """
    prepare_output(out)
    configs = {name: reproduction.configs(name) for name in reproduction.figures}
    needed = [config for of_figure in configs.values() for config in of_figure]
    result = sweep(needed, out, place=place, workers=workers, data_dir=data_dir, progress=progress)
    if not is_first():
        return None, result
    record = {
        "scale": reproduction.scale,
        "data": None if reproduction.data is None else list(reproduction.data),
        "ranks": launched(),
        "code": code_version(),
        "figures": {name: [run_id(config) for config in of_figure] for name, of_figure in configs.items()},
    }
    record["figures"] = {**_other_figures(record, Path(out)), **record["figures"]}
    write_whole(Path(out) / RECORD, to_json(record))
    return write_report(out), result


def _other_figures(record: dict[str, Any], out: Path) -> dict[str, list[str]]:
    """Figures of an earlier record of the same kind whose runs are still there."""
    try:
        before = _read_record(out / RECORD)
    except TwofoldError:
        return {}
    if any(before[name] != value for name, value in record.items() if name != "figures"):
        return {}
    there = {path.parent.name for path in (out / "runs").glob("*/status.json")}
    return {name: ids for name, ids in before["figures"].items() if there.issuperset(ids)}


def write_report(out: Path) -> Report:
    """Write figures, verdicts and page anew from the runs of a reproduction.

    Args:
        out: the output directory of `reproduce`.

    Raises:
        TwofoldError: `out` holds no reproduction, or a run of it is missing or damaged.
    """
    out = Path(out)
    record = _read_record(out / RECORD)
    scale = find_scale(record["scale"])
    asked = _asked(record)
    verdicts, figures = [], []
    for name in asked.figures:
        figure, ids = find_figure(name), record["figures"][name]
        try:
            table = load_table(out, ids)
        except TwofoldError as error:
            raise TwofoldError(f"{error} This computes it anew: {command_of(record, out, name)}") from error
        verdicts += figure.verdicts(table, scale)
        figures.append(_write_figure(figure, table, out, ids, command_of(record, out, name)))
    runs = load_runs(out, list(dict.fromkeys(name for ids in record["figures"].values() for name in ids)))
    write_whole(out / VERDICTS, to_json([verdict.to_dict() for verdict in verdicts]))
    page = render_page(
        scale=scale,
        data=list(dict.fromkeys(data for name in asked.figures for data in asked.data_of(name))),
        command=command_of(record, out),
        verdicts=verdicts,
        figures=figures,
        runs=runs,
    )
    write_whole(out / PAGE, page.encode(errors="backslashreplace"))
    return Report(verdicts, out / PAGE)


def _asked(record: dict[str, Any]) -> Reproduction:
    names = tuple(figure.name for figure in select_figures(tuple(record["figures"])))
    return Reproduction(names, record["scale"], None if record["data"] is None else tuple(record["data"]))


def command_of(record: dict[str, Any], out: Path | None = None, figure: str | None = None) -> str:
    """The command line that reproduces what a record holds, or one figure of it alone, from the same runs."""
    torchrun = ["torchrun", f"--nproc-per-node={record['ranks']}", "-m"] if record["ranks"] > 1 else []
    names = list(_asked(record).figures) if figure is None else [figure]
    named = names if names != figure_names() else []
    data = [] if record["data"] is None else ["--data", *record["data"]]
    place = [] if out is None else ["--out", str(out)]
    return shlex.join([*torchrun, "twofold", "reproduce", *named, "--scale", record["scale"], *data, *place])


def _write_figure(figure: Figure, table: pd.DataFrame, out: Path, ids: Sequence[str], command: str) -> FigureOnPage:
    numbers = figure.numbers(table)
    with style.applied():
        wide, narrow = figure.draw(table, 3), figure.draw(table, 1)
        svg, png = style.to_svg(wide), style.to_png(wide)
        narrow_svg = style.to_svg(narrow)
    csv = numbers.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    for ending, content in (("svg", svg), ("png", png), ("csv", csv)):
        write_whole(out / FIGURES / f"{figure.stem}.{ending}", content)
    return FigureOnPage(figure, numbers, svg.decode(), narrow_svg.decode(), csv, ids, command)


def _read_record(path: Path) -> dict[str, Any]:
    again = f"`twofold reproduce --out {path.parent}` makes one; finished runs are kept."
    if not path.exists():
        raise TwofoldError(f"{path.parent} holds no reproduction (no {path.name}). {again}")
    try:
        record = json.loads(path.read_text())
        shapes = {"scale": str, "data": list | None, "ranks": int, "code": str, "figures": dict}
        wrong = [name for name, kind in shapes.items() if not isinstance(record[name], kind)]
        lists = {"data": record["data"] or [], **record["figures"]}.items()
        wrong += [name for name, of in lists if not all(isinstance(item, str) for item in of)]
        if not wrong:
            wrong = [name for name, ids in record["figures"].items() if bool(ids) != bool(_asked(record).configs(name))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TwofoldError(f"{path} is damaged ({error!r}). {again}") from error
    if wrong:
        raise TwofoldError(f"{path} is damaged (at {', '.join(wrong)}). {again}")
    return record
