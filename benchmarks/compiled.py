"""Many batches of one shape visited once: all three products by compiled programs. Run: python benchmarks/compiled.py

Times are in gradients of one batch; "pays after" says from how many batches on compiling has paid for itself.
"""

import sys
import time

import torch

from curvature import LOSS, Setting
from models import MODELS
from results import Table, show
from timing import interleaved
from twofold import Curvature


def row(name: str) -> dict[str, object]:
    """One model's costs of recording and of the program, and what compiling took."""
    setting = Setting(name)
    batch = setting.batch
    plain = Curvature(setting.model, LOSS, [batch, batch], memory=0)
    compiled = Curvature(setting.model, LOSS, [batch, batch], compile=True)
    start = time.process_time()
    compiled.products(setting.vector())
    seconds = time.process_time() - start
    times = interleaved(
        {
            "gradient": setting.gradient,
            "recorded": lambda: plain.products(setting.vector()),
            "compiled": lambda: compiled.products(setting.vector()),
        },
        base="gradient",
    )
    saved = (times["recorded"] - times["compiled"]) / 2
    return {
        "model": name,
        "recorded, a batch": times["recorded"] / 2,
        "compiled, a batch": times["compiled"] / 2,
        "seconds to compile": seconds,
        "pays after": round(1000 * seconds / (saved * times["ms"])) if saved > 0 else None,
    }


def table(names: list[str]) -> Table:
    """The named models."""
    return Table("compiled", [row(name) for name in names])


if __name__ == "__main__":
    torch.set_num_threads(1)
    show(table(sys.argv[1:] or list(MODELS)))
