"""What measuring curvature costs, in gradients of the same model and batch. Run: python benchmarks/curvature.py [model]

Where the other libraries are installed (`make bench`), they are timed in the same rounds. The limits count passes: with
the forward pass recorded, H v is 6 forward passes, GN v 4 and all three 8, and a gradient is 3; first layers need no
gradient of their inputs, which moves each model's own limit.
"""

import itertools
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import twofold
from models import MODELS
from peers import Batches, helped, installed, lanczos_by_scipy, without_statistics
from results import Table, show
from timing import interleaved

LIMITS = {  # H v, GN v, all three
    "mlp": (1.50, 1.17, 2.08),
    "wrn eval": (2.08, 1.33, 2.74),
    "wrn train": (2.08, 1.33, 2.74),
    "transformer": (2.00, 1.33, 2.67),
}
TOLERANCE = 1e-3
"""How far a product in float32 may be from ours before it counts as another matrix's."""
LOSS = nn.CrossEntropyLoss()
PROBES, STEPS, NUM_BATCHES = 2, 50, 8

Row = dict[str, Any]
Variants = dict[str, Callable[[], object]]


class Setting:
    """One of the models with its data, what each library makes of them, and vectors."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model, x, y = MODELS[name]()
        self.batch = (x, y)
        self.batches: Batches = [(x.roll(i, 0), y) for i in range(NUM_BATCHES)]
        self.parameters = list(self.model.parameters())
        self.size = sum(parameter.numel() for parameter in self.parameters)
        vectors = [torch.randn(self.size) for _ in range(8)]
        self._vectors = itertools.cycle(vectors)
        self.peers = installed()
        self.attention = helped if name == "transformer" else nullcontext
        self.helped_model = without_statistics(self.model)

    def vector(self) -> Tensor:
        """Another vector each time."""
        return next(self._vectors)

    def gradient(self) -> object:
        """What everything is measured in."""
        x, y = self.batch
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # as usual, also where others need help
            return torch.autograd.grad(LOSS(self.model(x), y), self.parameters)

    def curvature(self, batches: Any, memory: int | None = None) -> twofold.Curvature:
        """Ours, with nothing recorded yet."""
        return twofold.Curvature(self.model, LOSS, batches, memory=memory)

    def operators(self, batches: Batches) -> dict[str, tuple[Any, Any]]:
        """H and GN of every other library; GN is None where it has none."""
        found = {}
        for name, peer in self.peers.items():
            with self.attention():
                hessian = peer.hessian(self.helped_model, LOSS, batches)
                gauss_newton = peer.gauss_newton and peer.gauss_newton(self.helped_model, LOSS, batches)
            found[name] = (hessian, gauss_newton)
        return found

    def timed(
        self, variants: Variants, *, rounds: int, seconds: float, warm_up: int = 1, gradients: int = 1
    ) -> dict[str, float]:
        """Times of all variants in gradients; `gradients` are taken at once where a round holds much more."""
        base: Variants = {"gradient": lambda: [self.gradient() for _ in range(gradients)]}
        times = interleaved(base | variants, base="gradient", rounds=rounds, warm_up=warm_up, seconds=seconds)
        return {name: time * gradients for name, time in times.items()}


def products(setting: Setting) -> list[Row]:
    """H v, GN v, NME v and all three on one batch that is visited again and again."""
    c = setting.curvature(setting.batch)
    variants: Variants = {
        "H v": lambda: c.hessian @ setting.vector(),
        "GN v": lambda: c.gauss_newton @ setting.vector(),
        "NME v": lambda: c.nme @ setting.vector(),
        "all three": lambda: c.products(setting.vector()),
    }
    operators = setting.operators([setting.batch])
    for name, pair in operators.items():
        for what, operator in zip(("H v", "GN v"), pair, strict=True):
            if operator is not None:
                variants[f"{name} {what}"] = lambda operator=operator: operator @ setting.vector()
    with setting.attention():
        times = setting.timed(variants, rounds=5, seconds=8)
    h, gn, three = LIMITS[setting.name]
    rows = [{"measure": "gradient, ms", "twofold": times["ms"]}]
    for measure, limit in (("H v", h), ("GN v", gn), ("NME v", h), ("all three", three)):
        row: Row = {"measure": measure, "limit": limit, "twofold": times[measure]}
        for name in operators:
            # What has no NME gets it as the difference of the two others.
            parts = (measure,) if measure in ("H v", "GN v") else ("H v", "GN v")
            if all(f"{name} {part}" in times for part in parts):
                row[name] = sum(times[f"{name} {part}"] for part in parts)
        rows.append(row)
    wrong = [name for name, (hessian, _) in operators.items() if not _right(setting, c, hessian)]
    rows[1]["not the Hessian"] = ", ".join(wrong) or None
    return rows


def _right(setting: Setting, c: twofold.Curvature, hessian: Any) -> bool:
    v = setting.vector()
    ours = c.hessian @ v
    with setting.attention():
        error = (hessian @ v).detach() - ours
    return bool(error.norm() <= TOLERANCE * ours.norm())


def traces(setting: Setting) -> list[Row]:
    """The traces of H, GN and NME, a probe; of H and GN one after the other where there is no more."""
    c = setting.curvature(setting.batch)
    variants: Variants = {"twofold": lambda: c.traces(PROBES)}
    for name, pair in setting.operators([setting.batch]).items():
        if None not in pair:
            variants[name] = lambda pair=pair, name=name: [setting.peers[name].trace(part, PROBES) for part in pair]
    with setting.attention():
        times = setting.timed(variants, rounds=3, seconds=3, gradients=2)
    return [{"measure": "all traces, a probe"} | _each(times, variants, PROBES)]


def lanczos(setting: Setting) -> list[Row]:
    """Lanczos steps with H from nothing, a step: ours returns ten eigenpairs with their residuals."""

    def ours() -> twofold.Eigenpairs:
        c = setting.curvature(setting.batch)
        return twofold.eigsh(c.hessian, 10, which="LM", tol=0, basis_size=STEPS, max_matvecs=STEPS)

    def theirs(name: str) -> Tensor:
        peer = setting.peers[name]
        return peer.lanczos(peer.hessian(setting.helped_model, LOSS, [setting.batch]), STEPS)

    def scipy() -> None:
        lanczos_by_scipy(setting.peers["curvlinops"].hessian(setting.helped_model, LOSS, [setting.batch]), STEPS)

    variants: Variants = {"twofold": ours} | {name: lambda name=name: theirs(name) for name in setting.peers}
    if "curvlinops" in setting.peers:
        variants["curvlinops in SciPy"] = scipy
    with setting.attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore", twofold.TwofoldWarning)
        assert ours().num_matvecs == STEPS
        times = setting.timed(variants, rounds=1, seconds=8, warm_up=0, gradients=10)
    limit = LIMITS[setting.name][0]
    return [{"measure": f"{STEPS} Lanczos steps, a step", "limit": limit} | _each(times, variants, STEPS)]


def many_batches(setting: Setting) -> list[Row]:
    """H v and GN v of a set of batches that is visited once, a batch; ours gives NME v with them."""
    variants: Variants = {"twofold": lambda: setting.curvature(setting.batches, memory=0).products(setting.vector())}
    for name, peer in setting.peers.items():
        if peer.gauss_newton:
            h, gn = setting.operators(setting.batches)[name]
            variants[name] = lambda h=h, gn=gn: (h @ setting.vector(), gn @ setting.vector())
    with setting.attention():
        times = setting.timed(variants, rounds=2, seconds=5, warm_up=0, gradients=4)
    limit = 1 + LIMITS[setting.name][2]
    return [{"measure": f"{NUM_BATCHES} batches once, a batch", "limit": limit} | _each(times, variants, NUM_BATCHES)]


def _each(times: dict[str, float], variants: Variants, count: int) -> Row:
    return {name: times[name] / count for name in variants}


def arranged(model: str, row: Row) -> Row:
    """A row with its columns in the order of the table."""
    columns = ["model", "measure", "twofold", "limit", *installed()]
    return dict.fromkeys(columns) | {"model": model} | row


def table(names: list[str]) -> Table:
    """Every measure on the named models; under it, where another library is cheaper."""
    rows: list[Row] = []
    for name in names:
        setting = Setting(name)
        for measure in (products, traces, lanczos, many_batches):
            found = [arranged(name, row) for row in measure(setting)]
            print(Table("", found).markdown(), flush=True)
            rows += found
    return Table("curvature", rows, others_win(rows))


def others_win(rows: list[Row]) -> list[str]:
    """A line for each figure in which another library has less than ours."""
    return [
        f"{peer} wins: {row['measure']} of {row['model']}, {row[peer]:.2f} against {row['twofold']:.2f}."
        for row in rows
        for peer in installed()
        if row[peer] is not None and row[peer] < row["twofold"]
    ]


def speedups(costs: Table) -> Table:
    """How many times as much as ours each library takes: the least and the most over the models."""
    rows = []
    for measure in dict.fromkeys(row["measure"] for row in costs.rows):
        row = {"measure": measure}
        for peer in installed():
            ratios = [r[peer] / r["twofold"] for r in costs.rows if r["measure"] == measure and r[peer]]
            if ratios:
                row[peer] = f"{min(ratios):.2f} to {max(ratios):.2f}"
        if len(row) > 1:
            rows.append(row)
    return Table("speedups", rows)


if __name__ == "__main__":
    costs = table(sys.argv[1:] or list(MODELS))
    show(costs)
    if installed():
        show(speedups(costs))
