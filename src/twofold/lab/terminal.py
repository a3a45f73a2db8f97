"""What a terminal shows: tables, and how far something has come."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from twofold.lab.ranks import is_first

if TYPE_CHECKING:
    from twofold.lab.costs import Cost
    from twofold.lab.figures.verdicts import Verdict

_SECONDS_BETWEEN_LINES = 10
_COLOURS = {"shows": "green", "does not show": "bright_black", "opposite": "red", "undecided": "yellow"}


@contextmanager
def sweep_progress() -> Iterator[Callable[[int, int, float | None], None]]:
    """What tells a sweep's progress: a bar on a terminal, else a line now and then; nothing where another rank does."""
    if not is_first():
        yield lambda done, total, left: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines_of_progress()
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, left: bar.update(task, completed=done, total=total, description=_time_left(left))


def _lines_of_progress() -> Callable[[int, int, float | None], None]:
    last = -float(_SECONDS_BETWEEN_LINES)

    def tell(done: int, total: int, left: float | None) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{done}/{total} runs {_time_left(left)}".rstrip(), file=sys.stderr, flush=True)

    return tell


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """What tells how far a measurement has come: a bar on a terminal, else a line for each stage."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda stage, fraction: bar.update(task, completed=fraction, description=f"{stage:<11}")
        return
    last = ""

    def tell(stage: str, _: float) -> None:
        nonlocal last
        if stage != last:
            last = stage
            print(f"measuring: {stage}", file=sys.stderr, flush=True)

    yield tell


def _time_left(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    return f"about {minutes} min {seconds:02d} s left" if minutes else f"about {seconds} s left"


def table(title: str, columns: Sequence[str]) -> Table:
    """A table without rules between its rows."""
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def verdict_table(verdicts: "Sequence[Verdict]") -> Table:
    """One row for each finding and data set."""
    found = table("Effects in points (percent) with 95 % intervals, positive as the finding claims", ("finding",))
    found.padding = (0, 1, 1, 0)
    found.add_column("verdict", no_wrap=True)
    for name in ("effect", "seeds", "div."):
        found.add_column(name, justify="right", no_wrap=True)
    for v in verdicts:
        verdict = f"[{_COLOURS[v.verdict]}]{v.verdict}[/]"
        effect = f"{v.effect:+.1f} [{v.low:+.1f}, {v.high:+.1f}]".replace("+nan", "–")
        found.add_row(escape(f"{v.finding}, {v.data}"), verdict, escape(effect), str(v.seeds), str(v.diverged))
    return found


def cost_table(costs: "Sequence[Cost]") -> Table:
    """One row for each figure and data set, and all together last."""
    total = costs[-1]
    found = table("Runs, and what those not there yet take; what figures share counts once in all", ("figure", "data"))
    time_unit, factor = ("hours", 1) if total.hours >= 1 else ("minutes", 60)
    for name in ("runs", "there", f"{total.unit}-{time_unit}"):
        found.add_column(name, justify="right", no_wrap=True)
    if total.budget is not None:
        found.add_column("at most", justify="right", no_wrap=True)
    for row in costs:
        if row is total:
            found.add_section()
        budget = [] if row.budget is None else [_few_digits(factor * row.budget)]
        name = "all" if row is total else row.figure
        found.add_row(name, row.data, str(row.runs), str(row.there), _few_digits(factor * row.hours), *budget)
    return found


def _few_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
