"""What two ranks measure of the two shards of a data set, and one process of the whole."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

import twofold
from models import Attention, conv_batchnorm, mlp
from ranks import raised
from twofold.activations import gaussian, second_derivative


def classes(model, features, sizes, loss_fn=F.cross_entropy):
    return model, loss_fn, [(torch.randn(n, *features), torch.randint(3, (n,))) for n in sizes]


def ignored():
    """One rank's shard has no term at all, and one batch of the other."""
    model, loss_fn, batches = classes(mlp(4, 5, 3), (4,), (6, 3, 2, 4), nn.CrossEntropyLoss())
    for k in (1, 2, 3):
        batches[k][1][:] = -100
    batches[0][1][:2] = -100
    return model, loss_fn, batches


def weighted():
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    return classes(mlp(4, 5, 3), (4,), (7, 2, 5), loss_fn)


def regression():
    def loss_fn(z, y):
        return torch.log(torch.cosh(z - y)).sum(1).mean()

    return mlp(4, 5, 3), loss_fn, [(torch.randn(n, 4), torch.randn(n, 3)) for n in (5, 1, 3)]


# The first two batches are the first rank's shard.
PROBLEMS = {
    "ragged": lambda: classes(mlp(4, 5, 3), (4,), (7, 3, 5, 1, 2)),
    "ignore_index": ignored,
    "class weights": weighted,
    "sum": lambda: classes(mlp(4, 5, 3), (4,), (7, 3, 5), nn.CrossEntropyLoss(reduction="sum")),
    "custom loss": regression,
    "BatchNorm train": lambda: classes(conv_batchnorm(), (1, 2, 2), (5, 3, 4)),
    "attention": lambda: classes(Attention(), (3, 4), (2, 1, 2)),
}


def problem(name):
    torch.manual_seed(0)
    return PROBLEMS[name]()


def shard(batches, rank):
    return batches[:2] if rank == 0 else batches[2:]


def measured(name, rank=None, group=None):
    """All there is to measure, of a shard or (rank=None) of the whole."""
    model, loss_fn, batches = problem(name)
    data = batches if rank is None else shard(batches, rank)
    c = twofold.Curvature(model, loss_fn, data, group=group)
    identity = torch.eye(c.hessian.shape[0])
    found = dict(zip(PARTS, c.products(identity, parts=PARTS), strict=True))
    found |= {"loss": torch.tensor(c.loss()), "gradient": c.gradient()}
    unkept = twofold.Curvature(model, loss_fn, data, memory=0, group=group)
    found["rebuilt"] = torch.stack([unkept.hessian @ v for v in identity[:3]])
    if name != "BatchNorm train":
        found["pieces"] = twofold.Hessian(model, loss_fn, data, microbatches=2, group=group) @ identity
    if name in ("attention", "ragged"):
        found |= estimated(c, model, loss_fn, data, rank, group)
    if name == "ragged":
        with second_derivative(gaussian(beta=2.0)):
            found["live"] = torch.tensor(twofold.live_fraction(model, data, tolerance=0.1, group=group))
    return found


PARTS = ("hessian", "gauss_newton", "nme", "activation_nme", "rest")


def estimated(c, model, loss_fn, data, rank, group):
    # Each rank comes with a generator of its own; the first one's counts.
    generator = partial(lambda: torch.Generator().manual_seed(3 + (rank or 0)))
    found = {"traces": estimates(c.traces(4, generator=generator()))}
    found["trace"] = estimates({0: twofold.trace(c.nme, 6, method="xtrace", generator=generator())})
    found["empirical Fisher"] = c.fisher("empirical") @ torch.eye(c.hessian.shape[0])
    found["sum"] = estimates({0: twofold.trace(c.hessian - 2 * c.nme, 4, generator=generator())})
    found["eigenvalues"] = twofold.eigsh(c.hessian, k=2, basis_size=6, generator=generator()).values
    found["density"] = twofold.spectral_density(c.nme, num_probes=2, steps=4, generator=generator()).nodes
    a = twofold.anatomy(model, loss_fn, data, num_matvecs=5, generator=generator(), group=group)
    found["anatomy"] = estimates({kind: part.trace for kind, part in a.kinds.items()})
    found["modules"] = estimates({name: part.frobenius for name, part in a.modules.items()})
    found["part"] = a["activation"] @ torch.ones(a.hessian.shape[0])
    report = twofold.measure(model, loss_fn, data, num_probes=2, num_eigenvalues=2, generator=generator(), group=group)
    found["report"] = estimates(report.traces)
    found["terms"] = torch.tensor([report.policy["num_batches"], report.policy["num_terms"], report.loss])
    fidelity = twofold.fidelity(model, loss_fn, data, (0.1, 0.5), group=group)
    found["fidelity"] = torch.tensor(list(fidelity.metrics().values()))
    record = twofold.track(model, loss_fn, data, num_probes=2, max_steps=3, group=group).measure(0)
    found["record"] = torch.tensor([value for name, value in record.items() if name.startswith("curvature/")])
    found["fidelity"] = torch.tensor(twofold.fidelity(model, loss_fn, data, rho=0.1, group=group).cosine["nme"])
    sharp = twofold.sharpness(
        model, loss_fn, data, num_matvecs=2, num_samples=2, ascent_steps=2, generator=generator(), group=group
    )
    found["sharpness"] = torch.tensor(
        [sharp.loss, sharp.worst_case.rise, sharp.adaptive_worst_case.rise, sharp.average.value, sharp.keskar]
    )
    found["top"] = c.eigsh(1).parts["nme"]
    return found


def estimates(named):
    return torch.tensor([[e.value, e.stderr] for e in named.values()]).nan_to_num(-1.0)


def everything(rank):
    """What each rank of two finds, and how it fails."""
    world = dist.group.WORLD
    found = {name: measured(name, rank, world) for name in PROBLEMS}
    found["alone"] = measured("ragged", rank)
    found["other group"] = measured("custom loss", rank, dist.new_group([0, 1]))
    return found, failures(rank, world)


def failures(rank, world):
    model, loss_fn, batches = problem("ragged")
    mine, second = shard(batches, rank), rank == 1
    hessian = partial(twofold.Hessian, model, loss_fn, group=world)
    found = {}
    broken = [(torch.full((2, 4), torch.nan), torch.zeros(2, dtype=torch.int64))]
    found["NaN"] = raised(lambda: hessian([*mine, *broken] if second else mine) @ torch.ones(43))
    found["empty"] = raised(lambda: hessian([] if second else mine))
    found["loss"] = raised(lambda: twofold.Hessian(model, 3 if second else loss_fn, mine, group=world))
    found["exception"] = raised(lambda: hessian([*mine, ("no", "batch")] if second else mine) @ torch.ones(43))
    found["vectors"] = raised(lambda: hessian(mine) @ torch.randn(43, generator=torch.Generator().manual_seed(rank)))
    found["generator"] = raised(
        lambda: twofold.trace(hessian(mine), 2, generator=torch.Generator() if second else None)
    )
    found["activations"] = raised(lambda: twofold.live_fraction(model, [] if second else mine, group=world))
    with torch.no_grad():
        model[0].weight.add_(0.1 * rank)
    found["parameters"] = raised(lambda: hessian(mine) @ torch.ones(43))
    with torch.no_grad():
        model[0].weight.sub_(0.1 * rank)
    ignored = [(x, torch.full_like(y, -100)) for x, y in mine]
    found["no term"] = raised(lambda: hessian(ignored) @ torch.ones(43))
    outsiders = dist.new_group([0])
    found["member"] = raised(lambda: twofold.Hessian(model, loss_fn, mine, group=outsiders) @ torch.ones(43))
    found["afterwards"] = hessian(mine) @ torch.ones(43)
    return found
