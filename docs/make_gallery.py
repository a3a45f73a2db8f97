"""Make the pictures of docs/gallery.md anew, by its own programs. Run: python docs/make_gallery.py"""

import os
import re
from pathlib import Path

import matplotlib as mpl

DOCS = Path(__file__).parent

if __name__ == "__main__":
    os.chdir(DOCS / "gallery")
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # the same files whenever they are made
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "gallery.md").read_text(), re.DOTALL):
        settings = {"svg.hashsalt": "twofold", "svg.fonttype": "path", "font.size": 8, "axes.titlesize": 9}
        with mpl.rc_context(settings | {"axes.spines.top": False, "axes.spines.right": False}):
            exec(compile(block, "gallery", "exec"), {})
            mpl.pyplot.close("all")
