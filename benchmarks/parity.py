"""Do the sharpness methods move the weights as pytorch-optimizer's do? Run: python benchmarks/parity.py

Six steps of SGD with momentum in float64 on a small net, ours against theirs, as ||difference|| / ||movement||. Where
the two must agree they do, to the float32 in which theirs takes a norm. Where they do not, the row says what theirs
computes, and the row below it leaves that out and agrees.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twofold

SGD = {"lr": 0.1, "momentum": 0.9}
AGREES = 1e-6
STEPS = 6

Model = nn.Module
Batch = tuple[Tensor, Tensor]


def net(bias: bool = True) -> Model:
    """Three linear layers."""
    layers = nn.Linear(6, 12, bias), nn.GELU(), nn.Linear(12, 12, bias), nn.Tanh(), nn.Linear(12, 4, bias)
    return nn.Sequential(*layers).double()


def one_tensor() -> Model:
    """A linear model."""
    return nn.Linear(6, 4, bias=False).double()


def model_and_batches(build: Callable[[], Model]) -> tuple[Model, list[Batch]]:
    """The same model each time, and a batch for each step."""
    torch.manual_seed(0)
    model = build()
    return model, [(torch.randn(16, 6).double(), torch.randint(4, (16,))) for _ in range(STEPS)]


def movement(step: Callable[[Model], Callable[[Batch], None]], build: Callable[[], Model]) -> Tensor:
    """The way the weights go in six steps, as one vector."""
    model, batches = model_and_batches(build)
    start = nn.utils.parameters_to_vector(copy.deepcopy(model).parameters())
    take = step(model)
    for batch in batches:
        take(batch)
    return nn.utils.parameters_to_vector(model.parameters()).detach() - start.detach()


def ours(regularizer: twofold.Regularizer) -> Callable[[Model], Callable[[Batch], None]]:
    """Steps of a regularizer in a plain loop."""

    def build(model: Model) -> Callable[[Batch], None]:
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        regularizer.attach(optimizer)

        def take(batch: Batch) -> None:
            optimizer.zero_grad()
            regularizer.backward(model, F.cross_entropy, batch)
            optimizer.step()

        return take

    return build


def theirs(build_optimizer: Callable[[Model], torch.optim.Optimizer], first: bool) -> Callable:
    """Steps of a peer; `first`: it expects the clean gradient before `step(closure)`."""

    def build(model: Model) -> Callable[[Batch], None]:
        optimizer = build_optimizer(model)

        def take(batch: Batch) -> None:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch[0]), batch[1])
                loss.backward()
                return loss

            if hasattr(optimizer, "set_closure"):
                optimizer.set_closure(F.cross_entropy, *batch)
                optimizer.step()
                return
            if first:
                closure()
            optimizer.step(closure)

        return take

    return build


class _Constant:
    """A schedule of rho that stands still."""

    def step(self) -> float:
        return 0.05


@dataclass(frozen=True)
class Row:
    """One comparison; `note` says what theirs does otherwise, and is empty where both must agree."""

    method: str
    ours: twofold.Regularizer
    theirs: Callable
    model: Callable[[], Model] = net
    note: str = ""

    def difference(self) -> float:
        """||ours - theirs|| / ||ours|| after six steps."""
        a, b = movement(ours(self.ours), self.model), movement(self.theirs, self.model)
        return (torch.linalg.norm(a - b) / torch.linalg.norm(a)).item()


def rows() -> list[Row]:
    """Every method that both have."""
    import pytorch_optimizer as peer

    sgd = torch.optim.SGD

    def plain(cls: type, **options) -> Callable:
        return theirs(lambda model: cls(model.parameters(), sgd, **options, **SGD), first=True)

    def weighted(decouple: bool) -> Callable:
        def build(model: Model) -> torch.optim.Optimizer:
            return peer.WSAM(model, model.parameters(), sgd, rho=0.05, gamma=0.9, decouple=decouple, **SGD)

        return theirs(build, first=False)

    def surrogate_gap(model: Model) -> torch.optim.Optimizer:
        return peer.GSAM(model.parameters(), sgd(model.parameters(), **SGD), model, _Constant(), alpha=0.4)

    def adaptive(eta: float) -> dict:
        return {"ours": twofold.ASAM(rho=0.5, eta=eta), "theirs": plain(peer.SAM, rho=0.5, adaptive=True)}

    def look() -> dict:
        return {
            "ours": twofold.LookSAM(rho=0.1, alpha=0.7, interval=5),
            "theirs": plain(peer.LookSAM, rho=0.1, alpha=0.7, k=5),
        }

    return [
        Row("SAM", twofold.SAM(rho=0.05), plain(peer.SAM, rho=0.05)),
        Row("WSAM, coupled", twofold.WSAM(rho=0.05, gamma=0.9, decoupled=False), weighted(False)),
        Row("WSAM, decoupled", twofold.WSAM(rho=0.05, gamma=0.9, decoupled=True), weighted(True)),
        Row("GSAM", twofold.GSAM(rho=0.05, alpha=0.4), theirs(surrogate_gap, first=False)),
        Row("FriendlySAM", twofold.FriendlySAM(rho=0.1), plain(peer.FriendlySAM, rho=0.1)),
        Row(
            "ASAM",
            **adaptive(eta=0.01),
            note="has no eta, and scales biases by their own size; the published code has T = 1 for them",
        ),
        Row("ASAM, no biases, eta 1e-12", **adaptive(eta=1e-12), model=lambda: net(bias=False)),
        Row("LookSAM", **look(), note="takes norms and projections tensor by tensor; the paper those of all weights"),
        Row("LookSAM, one tensor", **look(), model=one_tensor),
    ]


if __name__ == "__main__":
    print(f"| method | difference of the movement | pytorch-optimizer {version('pytorch-optimizer')} |\n|---|---|---|")
    wrong = []
    for row in rows():
        difference = row.difference()
        print(f"| {row.method} | {difference:.1e} | {row.note or 'agrees'} |")
        if (difference < AGREES) == bool(row.note):
            wrong.append(row.method)
    if wrong:
        raise SystemExit(f"Not as expected: {', '.join(wrong)}.")
