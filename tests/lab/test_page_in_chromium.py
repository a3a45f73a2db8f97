"""The page in a real browser: what it shows, that its filters work, and that it stays silent."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from lab.synthetic import noise, table_of
from lab.test_report import HOSTILE, hostile_page, table_and_figure
from twofold.lab.figures import find_figure, style
from twofold.lab.figures.scales import find_scale
from twofold.lab.report.page import FigureOnPage, render_page
from twofold.lab.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--enable-logging=stderr", "--virtual-time-budget=5000"),
]
SCALE = find_scale("quick")
DATA = ("mnist1d", "fashion-mnist")
LOOK = """
<script>
const boxes = selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()).map(e => {
  const box = e.getBoundingClientRect();
  return [e.closest("section").id, box.width, box.height];
});
const found = {
  figures: boxes(".drawing svg"),
  tips: [...document.querySelectorAll(".wide .tip title")].map(e => e.textContent),
  verdicts: [...document.querySelectorAll(".verdicts tbody tr")].filter(e => !e.hidden).map(e => e.dataset.data),
  runs: [...document.querySelectorAll("#runs tbody tr")].filter(e => !e.hidden).map(e => e.dataset.method),
  told: document.querySelector(".filter output").value,
  page: getComputedStyle(document.body).backgroundColor,
  overflow: document.documentElement.scrollWidth - innerWidth,
};
document.title = "FOUND" + JSON.stringify(found) + "END";
</script>
"""


@pytest.fixture(scope="module", autouse=True)
def browser():
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "chromium was not found: apt-get install chromium"
        pytest.skip("chromium was not found: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with three figures over two data sets."""
    figures, verdicts, runs = [], [], {}
    for name in ("1", "2", "4"):
        figure = find_figure(name)
        table = table_of(figure, SCALE, lambda config, split: 70 + noise(config), data=DATA)
        with style.applied():
            svgs = [style.to_svg(figure.draw(table, columns)).decode() for columns in (3, 1)]
        configs = [config for data in DATA for config in figure.runs(SCALE, data)]
        ids = [f"{name}-{i}" for i in range(len(configs))]
        runs |= {
            i: Run(i, c, "finished", table.iloc[:0], {}, Path("runs"), "") for i, c in zip(ids, configs, strict=True)
        }
        figures.append(FigureOnPage(figure, figure.numbers(table), *svgs, b"a,b\n", ids, f"twofold reproduce {name}"))
        verdicts += figure.verdicts(table, SCALE)
    html = render_page(
        scale=SCALE,
        data=DATA,
        command="twofold reproduce",
        verdicts=verdicts,
        figures=figures,
        runs=list(runs.values()),
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html.replace("</body>", LOOK + "</body>"))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def look(page: Path, fragment: str = "", *options: str) -> dict:
    """What a browser sees on the page; fails where it says anything on its console."""
    done = run(*options, "--dump-dom", f"file://{page}{fragment}")
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said
    return json.loads(re.search("FOUND(.*?)END", done.stdout, re.DOTALL).group(1).replace("&amp;", "&"))


def test_every_figure_is_visible_and_its_points_tell_their_values(page):
    found = look(page, "", "--window-size=1280,900")
    assert [name for name, _, _ in found["figures"]] == ["figure-1", "figure-2", "figure-4"]
    assert all(width > 600 and height > 150 for _, width, height in found["figures"])
    assert found["overflow"] <= 0
    assert any(re.fullmatch(r"GELU SAM, rho 0.1: [-\d.e]+ \[.*\], 3 seeds", tip) for tip in found["tips"])
    assert set(DATA) <= set(found["verdicts"])
    assert found["told"] == ""


def test_narrow_screens_get_one_drawing_each_and_no_sideways_scrolling(page):
    found = look(page, "", "--window-size=500,900")
    assert len(found["figures"]) == 3
    assert all(width <= 500 for _, width, _ in found["figures"])
    assert found["overflow"] <= 0


def test_filters_leave_what_was_asked_for(page):
    everything = look(page)
    of_data = look(page, "#data=fashion-mnist")
    assert set(of_data["verdicts"]) == {"fashion-mnist"}
    shown, total = len(of_data["verdicts"]), len(everything["verdicts"])
    assert of_data["told"] == f"{shown} of {total} verdicts"
    of_method = look(page, "#method=sam")
    assert {name for name, _, _ in of_method["figures"]} == {"figure-1", "figure-2"}  # figure 4 has no SAM
    assert set(of_method["runs"]) == {"sam"}
    assert look(page, "#data=moon&method=sun") == everything  # a filter that names nothing here filters nothing


def test_light_and_dark(page):
    light, dark = look(page)["page"], look(page, "", "--blink-settings=preferredColorScheme=0")["page"]
    assert light == "rgb(255, 255, 255)"
    assert dark == "rgb(20, 23, 27)"


@pytest.mark.parametrize("kind", ["tags", "quotes", "ends", "long"])
def test_hostile_text_does_nothing(tmp_path, kind):
    page = tmp_path / "report.html"
    html = hostile_page(table_and_figure(), tmp_path, HOSTILE[kind])
    page.write_text(html.replace("</body>", LOOK + "</body>"))
    found = look(page, "", "--window-size=1280,900")  # says nothing on the console
    assert [name for name, _, _ in found["figures"]] == ["figure-1"]
    assert found["overflow"] <= 0
    assert "HIT" not in run("--dump-dom", f"file://{page}").stdout


def test_a_screenshot_is_kept(page):
    """CI keeps the pictures that this leaves in $TWOFOLD_SCREENSHOTS."""
    place = Path(os.environ.get("TWOFOLD_SCREENSHOTS") or page.parent)
    place.mkdir(parents=True, exist_ok=True)
    for name, options in {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}.items():
        picture = place / f"report-{name}.png"
        run(*options, "--window-size=1280,4000", f"--screenshot={picture}", f"file://{page}")
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size > 50_000
