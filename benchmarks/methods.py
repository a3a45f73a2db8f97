"""Every method end to end, at its default or its documented starting strength. Run: python benchmarks/methods.py

Two settings: Fashion-MNIST with noisy labels on an MLP (SGD) and MNIST-1D with noisy labels on a tiny transformer
(AdamW). Writes the table of docs/benchmarks.md and benchmarks/results/methods.csv.
"""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from memory import MIB, peak
from results import Table
from twofold.lab.building import build_backward, build_optimizer, build_regularizer
from twofold.lab.config import RegularizerConfig, RunConfig, fashion_mnist, transformer
from twofold.lab.data import load
from twofold.lab.models import build
from twofold.lab.training import train

SEEDS = range(100, 103)
SETTINGS = {"Fashion-MNIST, MLP": fashion_mnist, "MNIST-1D, transformer": transformer}
METHODS = {
    "none": RegularizerConfig(),
    "SAM": RegularizerConfig("sam", 0.05),
    "USAM": RegularizerConfig("usam", 0.05),
    "ASAM": RegularizerConfig("asam", 0.5),
    "WSAM": RegularizerConfig("wsam", 0.05),
    "EigenSAM": RegularizerConfig("eigen_sam", 0.05),
    "GSAM": RegularizerConfig("gsam", 0.05),
    "FriendlySAM": RegularizerConfig("friendly_sam", 0.1),
    "LookSAM": RegularizerConfig("look_sam", 0.1),
    "GradientPenalty": RegularizerConfig("gradient_penalty", 0.1),
    "GradientPenalty, Gauss-Newton": RegularizerConfig("gradient_penalty", 0.1, {"curvature": "gauss_newton"}),
    "GradientPenalty, finite difference": RegularizerConfig("gradient_penalty", 0.1, {"method": "finite_difference"}),
    "WeightNoise": RegularizerConfig("weight_noise", 0.01),
    "HessianTrace": RegularizerConfig("hessian_trace", 1e-4),
    "GaussNewtonTrace": RegularizerConfig("gauss_newton_trace", 1e-3),
}


def step_memory(config: RunConfig) -> float:
    """Peak bytes of one forward and backward pass of the method, above what is held before."""
    data = load(config.data)
    model = build(config.model, data.input_shape, data.num_classes, seed=0)
    regularizer = build_regularizer(config.regularizer)
    if regularizer is not None:
        regularizer.attach(build_optimizer(config.optimizer, model))
    backward = build_backward(config.regularizer, regularizer)
    batch = tuple(tensor[: config.batch_size] for tensor in data.train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    backward(model, F.cross_entropy, batch)  # whatever is allocated only once
    return peak(lambda: backward(model, F.cross_entropy, batch))


def measure(base: RunConfig, seeds: range) -> Iterator[dict[str, object]]:
    """Train every method on every seed; one row a method."""
    train(replace(base, max_steps=1))  # data are read and kernels loaded
    plain: list[float] = []
    for name, regularizer in METHODS.items():
        seconds, rows = [], []
        for seed in seeds:
            config = replace(base, regularizer=regularizer, seed=seed)
            start = time.process_time()
            rows.append(train(config).iloc[-1])
            seconds.append(time.process_time() - start)
        plain = plain or seconds
        test = [100 * float(row["test/accuracy"]) for row in rows]
        yield {
            "method": f"{name}, {regularizer.strength:g}" if regularizer.strength else name,
            "test accuracy, %": f"{statistics.mean(test):.1f} ± {statistics.stdev(test):.1f}",
            "train accuracy, %": f"{100 * statistics.mean(float(row['train/accuracy']) for row in rows):.1f}",
            "diverged": sum(not math.isfinite(row["train/loss"]) for row in rows),
            "seconds": statistics.mean(seconds),
            "time": sum(seconds) / sum(plain),
            "peak of a step, MiB": step_memory(replace(base, regularizer=regularizer)) / MIB,
        }


if __name__ == "__main__":
    rows = []
    for setting, recipe in SETTINGS.items():
        for row in measure(recipe(), SEEDS):
            rows.append({"setting": setting, **row})
            print(rows[-1], flush=True)
    Table("methods", rows).publish()
