"""What a product costs, in gradients of the same model and batch. Run: python benchmarks/curvature.py

The limits count passes: with the forward pass recorded, H v is 6 forward passes, GN v 4 and all three 8, and a gradient
is 3; first layers need no gradient of their inputs, which moves each model's own limit.
"""

import torch
import torch.nn.functional as F

import twofold
from models import MODELS
from timing import interleaved

LIMITS = {  # H v, GN v, all three
    "mlp": (1.50, 1.17, 2.08),
    "wrn eval": (2.08, 1.33, 2.74),
    "wrn train": (2.08, 1.33, 2.74),
    "transformer": (2.00, 1.33, 2.67),
}


def measure(name: str) -> dict[str, float]:
    """Time a gradient, each product and all three on one model, a new vector each time."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    parameters = list(model.parameters())
    c = twofold.Curvature(model, F.cross_entropy, (x, y))
    vectors = [torch.randn(c.hessian.shape[0]) for _ in range(8)]
    turn = iter(range(10**9))

    def v() -> torch.Tensor:
        return vectors[next(turn) % len(vectors)]

    return interleaved(
        {
            "gradient": lambda: torch.autograd.grad(F.cross_entropy(model(x), y), parameters),
            "H v": lambda: c.hessian @ v(),
            "GN v": lambda: c.gauss_newton @ v(),
            "NME v": lambda: c.nme @ v(),
            "all three": lambda: c.products(v()),
        },
        base="gradient",
    )


if __name__ == "__main__":
    print(
        "| model | gradient, ms | H v (limit) | GN v (limit) | NME v | all three (limit) |\n|---|---|---|---|---|---|"
    )
    for name, (h, gn, three) in LIMITS.items():
        t = measure(name)
        print(
            f"| {name} | {t['ms']:.1f} | {t['H v']:.2f} ({h:.2f}) | {t['GN v']:.2f} ({gn:.2f}) | {t['NME v']:.2f} "
            f"| {t['all three']:.2f} ({three:.2f}) |",
            flush=True,
        )
