"""What a training step with each regularizer costs, in plain steps of the same model.

Run: python benchmarks/steps.py [model]

A step is zero_grad, the gradient and SGD's own step. "compiled" is the time with torch.compile(model), which passes of
first derivatives use. The limit counts passes (a gradient is 3 forward passes); "asked"
is what a step may cost, on mlp / wrn train / transformer.
"""

import sys
from collections.abc import Callable

import torch

import twofold
from curvature import LOSS
from memory import peak
from models import MODELS
from results import Table, show
from timing import interleaved

MODES = ("mlp", "wrn train", "transformer")
Asked = tuple[float, float, float]

# method: (how it is made, the limit in gradients, what is asked of it)
METHODS: dict[str, tuple[Callable[[], twofold.Regularizer], float, Asked | None]] = {
    "SAM": (twofold.SAM, 2, (2.2, 2.1, 2.5)),
    "GradientPenalty": (twofold.GradientPenalty, 3, (3.0, 3.8, 3.9)),
    "GaussNewtonTrace": (lambda: twofold.GaussNewtonTrace(strength=1e-4), 3, (2.7, 3.8, 3.8)),
    "HessianTrace": (lambda: twofold.HessianTrace(strength=1e-6), 4.33, (3.5, 6.3, 6.3)),
    "HessianTrace, difference": (lambda: twofold.HessianTrace(strength=1e-6, method="difference"), 3, None),
    "WeightNoise": (lambda: twofold.WeightNoise(sigma=1e-3), 1, None),
    "LookSAM(5)": (lambda: twofold.LookSAM(interval=5), 1.2, (1.35, 1.35, 1.35)),
}
FIRST_ORDER = ("SAM", "HessianTrace, difference", "WeightNoise", "LookSAM(5)")
STEPS = 5
"""Steps that are timed at once: an interval of LookSAM."""


def rows(name: str) -> list[dict[str, float | str | None]]:
    """Time and peak memory of every method on one model."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    compiled = torch.compile(model)

    def plain(called: torch.nn.Module = model) -> None:
        optimizer.zero_grad()
        LOSS(called(x), y).backward()
        optimizer.step()

    def step(regularizer: twofold.Regularizer, called: torch.nn.Module = model) -> None:
        optimizer.zero_grad()
        regularizer.backward(called, LOSS, (x, y))
        optimizer.step()

    made = {method: make() for method, (make, _, _) in METHODS.items()}
    variants: dict[str, Callable[[], object]] = {"plain": lambda: [plain() for _ in range(STEPS)]}
    variants["plain, compiled"] = lambda: [plain(compiled) for _ in range(STEPS)]
    for method, regularizer in made.items():
        variants[method] = lambda regularizer=regularizer: [step(regularizer) for _ in range(STEPS)]
        if method in FIRST_ORDER:
            variants[f"{method}, compiled"] = lambda regularizer=regularizer: [
                step(regularizer, compiled) for _ in range(STEPS)
            ]
    times = interleaved(variants, base="plain", rounds=5, warm_up=1, seconds=20)
    base = peak(plain)
    found: list[dict[str, float | str | None]] = [
        {"model": name, "method": "plain step, ms and MiB", "time": times["ms"] / STEPS, "memory": base / 2**20},
        {"model": name, "method": "plain step", "time": 1.0, "compiled": times["plain, compiled"]},
    ]
    for method, (_, limit, asked) in METHODS.items():
        found.append(
            {
                "model": name,
                "method": method,
                "time": times[method],
                "compiled": times.get(f"{method}, compiled"),
                "asked": None if asked is None else asked[MODES.index(name)],
                "limit": float(limit),
                "memory": peak(lambda method=method: step(made[method])) / base,
            }
        )
    return found


def table(names: list[str]) -> Table:
    """Steps of every model."""
    notes = [
        "Peak memory is what a step allocates above what stands before it: weights, momentum, gradients of the step "
        "before, and with methods that perturb weights the room for a copy of them, which stays from step to step."
    ]
    return Table("steps", [row for name in names for row in rows(name)], notes)


if __name__ == "__main__":
    show(table(sys.argv[1:] or list(MODES)))
