"""Put the verdicts and numbers of a reproduction into docs/reproduction.md and docs/reproduction/.

Run: python docs/publish_reproduction.py DIR, with what `twofold reproduce --scale cpu --out DIR` left.
"""

import csv
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twofold.lab.figures import find_figure
from twofold.lab.report.reproduction import command_of

DOCS = Path(__file__).parent
KINDS = ("shows", "does not show", "opposite", "undecided")
BEGIN, END = "<!-- cpu verdicts -->", "<!-- end of cpu verdicts -->"


def publish(directory: Path, docs: Path = DOCS) -> None:
    """Fill the place between the markers of docs/reproduction.md, and copy every figure and its numbers."""
    record, verdicts = (json.loads((directory / name).read_text()) for name in ("reproduction.json", "verdicts.json"))
    place = docs / "reproduction"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in record["figures"]:
        for ending in ("csv", "svg"):
            shutil.copy(directory / "figures" / f"{find_figure(name).stem}.{ending}", place)
    with (place / "verdicts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(verdicts[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(verdicts)
    page = docs / "reproduction.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + "\n" + "\n".join(lines(record, verdicts)) + "\n" + END + rest.split(END)[1])


def lines(record: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: how many findings show, the command, and a table for each figure."""
    counts = Counter(verdict["verdict"] for verdict in verdicts)
    runs = len({name for of_figure in record["figures"].values() for name in of_figure})
    yield f"{len(verdicts)} verdicts from {runs} runs: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    yield f"(`{command_of(record)}`)."
    yield "Effects are in points of accuracy or in percent, positive as the finding claims, with 95 % intervals; rules"
    yield "and all numbers are in [verdicts.csv](reproduction/verdicts.csv)."
    yield ""
    yield "| figure | " + " | ".join(KINDS) + " |"
    yield "|---" * (1 + len(KINDS)) + "|"
    for name in record["figures"]:
        of_figure = Counter(verdict["verdict"] for verdict in verdicts if verdict["figure"] == name)
        yield "| " + " | ".join([name, *(str(of_figure[kind] or "") for kind in KINDS)]) + " |"
    for name in record["figures"]:
        figure = find_figure(name)
        yield ""
        yield f"### {figure.heading}: {figure.title}"
        yield ""
        yield f"![{figure.title}](reproduction/{figure.stem}.svg)"
        yield ""
        yield f"{figure.caption} Numbers: [{figure.stem}.csv](reproduction/{figure.stem}.csv)."
        yield ""
        yield "What differs from the paper:"
        yield ""
        yield from (f"* {sentence}" for sentence in figure.differs)
        yield ""
        yield "| finding | data | verdict | effect | seeds | diverged |"
        yield "|---|---|---|---|---|---|"
        for verdict in verdicts:
            if verdict["figure"] == name:
                yield _row(verdict)


def _row(verdict: Mapping[str, Any]) -> str:
    effect, low, high = (verdict[name] for name in ("effect", "low", "high"))
    known = "–" if effect is None else f"{effect:+.1f}"
    interval = "" if low is None else f" [{low:+.1f}, {high:+.1f}]"
    finding = verdict["finding"].replace("|", "\\|")
    cells = (finding, verdict["data"], f"**{verdict['verdict']}**", known + interval)
    return "| " + " | ".join([*cells, str(verdict["seeds"]), str(verdict["diverged"])]) + " |"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    publish(Path(sys.argv[1]))
