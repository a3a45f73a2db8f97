"""Every example that a reader can copy runs: docstrings, and the Python blocks of the README and the docs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import twofold

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"twofold.integrations.lightning", "twofold.integrations.transformers"}  # run by make test-integrations
MODULES = [name for _, name, _ in pkgutil.walk_packages(twofold.__path__, "twofold.") if name not in ELSEWHERE]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    f"{page.stem.lower()}-{i}": block
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, "twofold": twofold}
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, globs=module.__dict__ | names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        result = runner.run(test)
        assert result.failed == 0, f"{test.name} has an example that does not do what it says"


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_pages(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[name], name, "exec"), {})


def test_the_gallery_shows_what_its_programs_make():
    page = (ROOT / "docs" / "gallery.md").read_text()
    made = re.findall(r"savefig\(\"(.*?)\"", page)
    assert re.findall(r"\]\(gallery/(.*?)\)", page) == made
    assert sorted(path.name for path in (ROOT / "docs" / "gallery").iterdir()) == sorted(made)


def test_the_readme_has_examples():
    assert sum(name.startswith("readme") for name in BLOCKS) >= 3


def test_the_api_page_lists_every_public_name():
    listed = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(twofold.__all__)
