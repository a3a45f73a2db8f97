"""Tables of results: as Markdown, as CSV, and in docs/benchmarks.md."""

import csv
import datetime
import importlib.metadata
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peers import PEERS, installed

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Table:
    """Rows of one table, each a mapping from column to value; columns are those with a value in some row.

    Attributes:
        name: the CSV's name and the place in docs/benchmarks.md.
        rows: what it holds.
        notes: lines under it.
    """

    name: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row if self._has(column)))

    def _has(self, column: str) -> bool:
        return any(row.get(column) is not None for row in self.rows)

    def markdown(self) -> str:
        """The table, floats by two decimals or three digits."""
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(_text(row.get(column)) for column in self.columns) + " |" for row in self.rows]
        return "\n".join(lines + [""] * bool(self.notes) + [f"* {note}" for note in self.notes])

    def save(self) -> None:
        """Write results/<name>.csv."""
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in self.rows
            )

    def publish(self) -> None:
        """Save, and put the table between its marks in docs/benchmarks.md with how it was made under it."""
        self.save()
        begin, end = f"<!-- {self.name} -->", f"<!-- end of {self.name} -->"
        page = PAGE.read_text()
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"docs/benchmarks.md must contain {begin!r} and {end!r} once.")
        block = f"{begin}\n\n{self.markdown()}\n\n{provenance()}\n\n{end}"
        PAGE.write_text(re.sub(re.escape(begin) + ".*" + re.escape(end), lambda _: block, page, flags=re.DOTALL))


def show(table: Table) -> None:
    """Print a table."""
    print(table.markdown())


def provenance() -> str:
    """The day, the machine and the versions."""
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"{name} {importlib.metadata.version(PEERS[name].package)}" for name in installed()]
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{today}, one thread of {_processor()}; {', '.join(versions)}."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.1e}"
    return str(value)
