"""The script that puts a reproduction into the docs."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
VERDICT = {
    "finding": "||NME|| falls",
    "figure": "share",
    "rule": "before, after",
    "effect": 12.345,
    "low": 10.0,
    "high": -3.21,
    "verdict": "shows",
    "seeds": 10,
    "diverged": 0,
    "scale": "cpu",
    "data": "mnist1d",
}
UNKNOWN = {**VERDICT, "figure": "1", "verdict": "undecided", "effect": None, "low": None, "high": None}


@pytest.fixture
def published(tmp_path):
    spec = importlib.util.spec_from_file_location("publish_reproduction", DOCS / "publish_reproduction.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found, docs = tmp_path / "found", tmp_path / "docs"
    (found / "figures").mkdir(parents=True)
    docs.mkdir()
    for name in ("1", "share"):
        for ending in ("csv", "svg", "png"):
            (found / "figures" / f"figure-{name}.{ending}").write_text(name)
    record = {"scale": "cpu", "data": ["mnist1d"], "ranks": 1, "code": "x"}
    record["figures"] = {"1": ["a", "b"], "share": ["b", "c"]}
    (found / "reproduction.json").write_text(json.dumps(record))
    (found / "verdicts.json").write_text(json.dumps([UNKNOWN, VERDICT]))
    (docs / "reproduction.md").write_text((DOCS / "reproduction.md").read_text())
    script.publish(found, docs)
    script.publish(found, docs)  # what is there is replaced
    return docs


def test_every_verdict_is_in_the_table_of_its_figure(published):
    page, committed = (docs.joinpath("reproduction.md").read_text() for docs in (published, DOCS))
    before, rest = page.split("<!-- cpu verdicts -->\n")
    table, after = rest.split("<!-- end of cpu verdicts -->")
    assert committed.startswith(before)
    assert committed.endswith(after)
    assert "2 verdicts from 3 runs: 1 shows, 0 does not show, 0 opposite, 1 undecided" in table
    assert "(`twofold reproduce 1 share --scale cpu --data mnist1d`)" in table
    assert "| 1 |  |  |  | 1 |\n| share | 1 |  |  |  |\n" in table
    first, second = table.split("### Beyond the paper, share")
    assert "* The paper has no such figure." in second
    assert "| **undecided** | – | 10 | 0 |" in first
    assert r"| \|\|NME\|\| falls | mnist1d | **shows** | +12.3 [+10.0, -3.2] | 10 | 0 |" in second
    assert "(reproduction/figure-share.csv)" in second


def test_numbers_are_copied(published):
    names = sorted(path.name for path in (published / "reproduction").iterdir())
    assert names == ["figure-1.csv", "figure-1.svg", "figure-share.csv", "figure-share.svg", "verdicts.csv"]
    with (published / "reproduction" / "verdicts.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["effect"] == ""
    assert second["finding"] == VERDICT["finding"]
    assert float(second["effect"]) == VERDICT["effect"]
