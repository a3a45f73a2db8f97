"""The examples that the documentation shows run as they are."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ["lightning_sam.py", "huggingface_sam.py"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    out = capsys.readouterr().out
    assert "nme/trace" in out or "tr NME" in out


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_documentation_shows_it(name):
    assert f"{{literalinclude}} ../examples/{name}" in (ROOT / "docs/integrations.md").read_text()
