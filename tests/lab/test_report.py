import json
import os
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lab.synthetic import SPLITS, noise, table_of
from twofold.errors import TwofoldError
from twofold.lab import figures as figures_package
from twofold.lab.config import DataConfig, ModelConfig, RunConfig
from twofold.lab.figures import find_figure, style
from twofold.lab.figures.scales import SCALES, find_scale
from twofold.lab.report import plan, reproduce, write_report
from twofold.lab.report.page import FigureOnPage, inline_svg, readable_cells, render_page
from twofold.lab.runs import Run

FIGURE = find_figure(1)
SCALE = find_scale("smoke")
HIT = "document.body.append('HI'+'T')"
HOSTILE = {
    "tags": f'"><script>{HIT}</script><img src=x onerror="{HIT}"><svg onload="{HIT}">',
    "quotes": f"' onmouseover='{HIT}' x=\" onfocus=\"{HIT}\" autofocus ` &quot;",
    "ends": f"]]></pre></style></title></script></select><script>{HIT}</script><!--",
    "template": "{{ 7 * 7 }}{% raw %}{# #}",
    "unicode": "\u202e\u0000\ud800 \udcff \U0001f600 <b>\x1b[31m",
    "long": "<x>" + "x" * 100_000,
}
TINY = RunConfig(
    data=DataConfig(num_train=60, num_validation=30, num_test=40, label_noise=0.3),
    model=ModelConfig(width=4, depth=1),
    epochs=1,
    batch_size=30,
    max_steps=2,
)


class Page(HTMLParser):
    """Elements, ids and links of a page, and whether its tags balance."""

    VOID = ("meta", "link", "br", "img", "path", "use", "rect", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.count, self.ids, self.references, self.links, self.open = Counter(), [], [], [], []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.count[tag] += 1
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        target = values.get("href") or values.get("src") or ""
        (self.references if target.startswith("#") else self.links).append(target)
        self.references += [
            "#" + name for name in re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in values.values()))
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def on_page():
    return table_and_figure()


def table_and_figure():
    table = table_of(FIGURE, SCALE, lambda config, split: 60 + noise(config))
    with style.applied():
        svgs = [style.to_svg(FIGURE.draw(table, columns)).decode() for columns in (3, 1)]
    return table, FigureOnPage(FIGURE, FIGURE.numbers(table), *svgs, b"a,b\n1,2\n")


def render(on_page, tmp_path, **changes):
    table, figure = on_page
    runs = [
        Run(
            row["id"],
            config,
            row["status"],
            pd.DataFrame(),
            {f"{s}/accuracy": 0.5 for s in SPLITS},
            tmp_path / row["id"],
        )
        for config, (_, row) in zip(FIGURE.runs(SCALE, "mnist1d"), table.iterrows(), strict=True)
    ]
    arguments = {
        "scale": SCALE,
        "data": ["mnist1d"],
        "command": "twofold reproduce --scale smoke",
        "verdicts": FIGURE.verdicts(table, SCALE),
        "figures": [figure],
        "runs": runs,
    } | changes
    return render_page(**arguments)


def test_page_is_whole_and_stands_alone(on_page, tmp_path):
    html = render(on_page, tmp_path)
    page = Page(html)
    assert page.open == []
    assert "://" not in html
    for link in page.links:
        assert not link or link.startswith(("data:", "figures/figure-1.", "runs/"))
    assert page.count["svg"] >= 2
    assert len(page.ids) == len(set(page.ids))
    assert {name.removeprefix("#") for name in page.references} <= set(page.ids)
    assert "<img" not in html


def test_page_says_all_of_it(on_page, tmp_path):
    html = render(on_page, tmp_path)
    page = Page(html)
    text = " ".join(page.text.split())
    for verdict in FIGURE.verdicts(on_page[0], SCALE):
        assert verdict.finding in text
        assert verdict.rule in text
    for part in (FIGURE.caption, FIGURE.rule, *FIGURE.differs, "twofold reproduce --scale smoke"):
        assert part in text
    assert text.index("undecided") < text.index(FIGURE.caption)
    assert page.count["table"] == 3
    assert page.count["caption"] == 3
    assert html.count('role="img" aria-label="') == 2
    assert "data:text/csv;base64,YSxiCjEsMgo=" in html
    assert 'name="viewport"' in html
    assert "@media print" in html
    assert "prefers-color-scheme: dark" in html


def hostile_page(on_page, tmp_path, text):
    """A page on which everything that is no code of ours is this text."""
    table, figure = on_page
    verdict = replace(FIGURE.verdicts(table, SCALE)[0], finding=text, rule=text, data=text)
    named = SimpleNamespace(label=lambda: text, to_dict=lambda: {"data": {text: text}, "seed": text})
    named.data = named.regularizer = SimpleNamespace(name=text)
    run = Run(text, named, "failed", pd.DataFrame(), {}, tmp_path, text)
    (tmp_path / "environment.json").write_text(json.dumps({text: text, "started": text}))
    numbers = figure.numbers.assign(data=text, **{text: text})
    return render(
        on_page,
        tmp_path,
        data=[text],
        command=text,
        verdicts=[verdict],
        figures=[
            replace(
                figure,
                numbers=numbers,
                runs=[text],
                command=text,
                figure=replace(FIGURE, title=text, caption=text, differs=(text,)),
            )
        ],
        runs=[run],
    )


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_stays_text(on_page, tmp_path, kind):
    page, expected = (Page(hostile_page(on_page, tmp_path, text)) for text in (HOSTILE[kind], "harmless"))
    assert page.open == []
    assert page.count == expected.count
    assert page.count["script"] == 1
    assert page.text.count(HOSTILE[kind]) == expected.text.count("harmless") > 10


def test_failed_runs_are_told(on_page, tmp_path):
    config = FIGURE.runs(SCALE, "mnist1d")[0]
    runs = [Run("a", config, "failed", pd.DataFrame(), {}, tmp_path, "RuntimeError: out of memory")]
    text = Page(render(on_page, tmp_path, runs=runs)).text
    assert "1 runs failed" in text
    assert "out of memory" in text


def test_missing_effects_have_no_strip(on_page, tmp_path):
    verdict = replace(FIGURE.verdicts(on_page[0], SCALE)[0], effect=float("nan"), low=float("nan"), high=float("nan"))
    html = render(on_page, tmp_path, verdicts=[verdict])
    assert 'class="strip' not in html
    assert "nan" not in Page(html).text.lower()


def test_inline_svg_takes_the_pages_colour_and_its_own_ids(on_page):
    svg = str(inline_svg(on_page[1].svg, "p"))
    assert svg.startswith("<svg ")
    assert style.INK not in svg
    assert "currentColor" in svg
    assert all(name.startswith("p-") for name in re.findall(r'\bid="([^"]+)', svg))
    assert all(
        name.startswith("p-") for name in re.findall(r'href="#([^"]+)|url\(#([^)]+)', svg) for name in name if name
    )


def test_readable_cells():
    numbers = pd.DataFrame({"rho": [0.05], "seeds": [3], "x": [-1.5], "x_low": [-2.0], "x_high": [float("nan")]})
    assert readable_cells(numbers) == (["rho", "seeds", "x"], [["0.05", "3", "−1.50 [−2.00, –]"]])


# reproductions


@pytest.fixture
def tiny(monkeypatch):
    """The smoke scale with runs of two steps."""
    monkeypatch.setitem(SCALES, "smoke", replace(SCALE, recipes={"mnist1d": lambda: TINY}, seeds=(100,)))


def files_of(out):
    return {path.name: path.read_bytes() for path in [*sorted((out / "figures").iterdir()), out / "verdicts.json"]}


def test_reproduction_from_end_to_end_twice(tiny, tmp_path):
    asked = plan(("1",), "smoke")
    report, runs = reproduce(asked, tmp_path, workers=1)
    assert (len(runs.finished), runs.reused, runs.failed) == (10, 0, {})
    first = files_of(tmp_path)
    assert sorted(first) == ["figure-1.csv", "figure-1.png", "figure-1.svg", "verdicts.json"]
    verdicts = json.loads(first["verdicts.json"])
    fields = {"finding", "figure", "rule", "effect", "low", "high", "verdict", "seeds", "diverged", "scale", "data"}
    assert all(set(verdict) == fields for verdict in verdicts)
    assert [verdict["finding"] for verdict in verdicts] == [verdict.finding for verdict in report.verdicts]
    html = report.page.read_text()
    assert all(f'href="runs/{name}/"' in html for name in runs.finished)

    # half of the runs and all of the report are lost, as after a kill
    for name in runs.finished[::2]:
        (tmp_path / "runs" / name / "status.json").unlink()
    (tmp_path / "verdicts.json").unlink()
    (tmp_path / "report.html").unlink()
    (tmp_path / "figures" / "figure-1.svg").write_text("half")
    _, again = reproduce(asked, tmp_path, workers=1)
    assert again.reused == 5
    assert files_of(tmp_path) == first
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []

    html = report.page.read_text()
    report.page.unlink()
    rebuilt = write_report(tmp_path)
    assert rebuilt.verdicts == report.verdicts
    assert rebuilt.page.read_text() == html
    assert files_of(tmp_path) == first


def test_the_name_of_a_directory_is_no_code_and_need_be_no_text(tiny, tmp_path):
    out = tmp_path / os.fsdecode(b"\xff<script>\"']]>&amp;")
    asked = plan(("1",), "smoke")
    report, _ = reproduce(asked, out, workers=1)
    for _ in range(2):
        page = Page(report.page.read_text())
        assert page.open == []
        assert page.count["script"] == 1
        assert page.text.count("<script>\"'") >= 1
        report = write_report(out)


def test_other_runs_in_the_directory_change_nothing(tiny, tmp_path, monkeypatch):
    asked = plan(("1",), "smoke")
    reproduce(asked, tmp_path, workers=1)
    first = files_of(tmp_path)
    other = replace(TINY, max_steps=1)
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], recipes={"mnist1d": lambda: other}))
    reproduce(asked, tmp_path, workers=1)
    assert files_of(tmp_path) != first
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], recipes={"mnist1d": lambda: TINY}))
    _, runs = reproduce(asked, tmp_path, workers=1)
    assert runs.reused == 10
    assert files_of(tmp_path) == first


def test_figures_of_several_commands_share_a_page(tiny, tmp_path):
    def reproduced(*figures, data=None):
        report, _ = reproduce(plan(figures, "smoke", data), tmp_path, workers=1)
        told = [verdict.to_dict() for verdict in report.verdicts]
        assert told == json.loads((tmp_path / "verdicts.json").read_text())
        commands = re.findall(r"<code>(twofold .*?)</code>", report.page.read_text())
        return list(dict.fromkeys(verdict.figure for verdict in report.verdicts)), commands

    place = f"--scale smoke --out {tmp_path}"
    assert reproduced("10") == (["10"], [f"twofold reproduce 10 {place}"] * 2)
    assert reproduced("7") == (["7", "10"], [f"twofold reproduce {names} {place}" for names in ("7", "10", "7 10")])
    place = place.replace("--out", "--data mnist1d --out")  # asked for otherwise: a page of its own
    assert reproduced("10", data="mnist1d") == (["10"], [f"twofold reproduce 10 {place}"] * 2)
    assert reproduced("7", data="mnist1d")[0] == ["7", "10"]
    for run in (tmp_path / "runs").iterdir():
        (run / "status.json").unlink()
    assert reproduced("7", data="mnist1d")[0] == ["7"]


def test_plans_refuse_before_anything_runs(monkeypatch):
    with pytest.raises(TwofoldError, match="no figure '99'"):
        plan((99,))
    with pytest.raises(TwofoldError, match="no scale 'huge'"):
        plan((), "huge")
    with pytest.raises(TwofoldError, match="does not run 'imagenet'"):
        plan((), "quick", "imagenet")
    with pytest.raises(TwofoldError, match="does not run 'nonsense'"):
        plan(("7",), "quick", "nonsense")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TwofoldError, match="CUDA"):
        plan((), "paper")
    for scale in ("smoke", "quick", "cpu"):
        assert list(plan(scale=scale).figures) == figures_package.figure_names()
    cpu = plan((), "cpu")
    for name, data in {"1": {"mnist1d", "fashion-mnist"}, "conv": {"mnist1d"}}.items():
        assert {config.data.name for config in cpu.configs(name)} == data
    named = plan(("conv",), "cpu", "fashion-mnist")
    assert {config.data.name for config in named.configs("conv")} == {"fashion-mnist"}


def test_refused_output_or_data_starts_nothing(tiny, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(TwofoldError, match="cannot be written"):
        reproduce(plan((), "smoke"), file / "out", workers=1)
    with pytest.raises(TwofoldError, match="workers"):
        reproduce(plan((), "smoke"), tmp_path / "out", workers=0)
    assert not (tmp_path / "out" / "runs").exists() or list((tmp_path / "out" / "runs").iterdir()) == []


def test_report_of_what_is_no_reproduction(tmp_path):
    with pytest.raises(TwofoldError, match="holds no reproduction"):
        write_report(tmp_path)
    record = tmp_path / "reproduction.json"
    whole = {"scale": "smoke", "data": None, "ranks": 1, "code": "x", "figures": {"7": []}}
    of_svhn = {"data": ["svhn"], "figures": {"1": ["0123"]}}
    for change in ({"scale": 1}, {"scale": "huge"}, {"data": [1]}, of_svhn, {"figures": []}, {"code": None}):
        record.write_text(json.dumps({**whole, **change}))
        with pytest.raises(TwofoldError, match="damaged"):
            write_report(tmp_path)
    for text in ("{", "[]", '{"scale": "smoke"}'):
        record.write_text(text)
        with pytest.raises(TwofoldError, match="damaged"):
            write_report(tmp_path)
    for ids in ([5], [[7]], 5, None, []):
        record.write_text(json.dumps({**whole, "figures": {"1": ids}}))
        with pytest.raises(TwofoldError, match="damaged"):
            write_report(tmp_path)
    record.write_text("[" * 100_000)
    with pytest.raises(TwofoldError, match="damaged"):
        write_report(tmp_path)
    record.write_text(json.dumps({**whole, "figures": {"1": ["0123"]}}))
    with pytest.raises(TwofoldError, match=r"0123.*twofold reproduce 1 --scale smoke --out"):
        write_report(tmp_path)
