"""What two ranks make of the two halves of a batch, and one process of the whole batch."""

import copy
from contextlib import ExitStack
from unittest import mock

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

from ranks import raised
from regularizers.rows import ROWS, Problem, flat
from twofold.curvature import losses
from twofold.regularizers import SAM, FriendlySAM, SharpnessAware, WeightNoise
from twofold.regularizers.passes import ModelPasses, Passes

STRENGTH, STEPS = 0.03, 3
HESSIAN = ModelPasses._hessian


def batches():
    torch.manual_seed(1)
    return [(torch.randn(8, 3), torch.randint(3, (8,))) for _ in range(STEPS)]


def half(batch, rank):
    return batch if rank is None else tuple(tensor[4 * rank : 4 * rank + 4] for tensor in batch)


class same_noise(ExitStack):
    """Weights get the same noise (ascent="global"), or noise by batch; terms get labels by their outputs."""

    def __init__(self, ascent):
        super().__init__()

        def noise_generator(passes, *, of_terms=False):
            batch = getattr(passes, "_batch", None)
            seed = 7 if ascent == "global" or batch is None else int(1e6 * batch[0][0, 0].abs())
            return torch.Generator().manual_seed(seed)

        def multinomial(rows, count, generator=None):
            return (1e4 * rows[:, :1]).long() % rows.shape[1]

        self.enter_context(mock.patch.object(Passes, "noise_generator", noise_generator))
        self.enter_context(mock.patch.object(torch, "multinomial", multinomial))
        self.enter_context(mock.patch.object(losses, "_normal_like", lambda z, _: torch.sin(10 * z.detach())))


def hessian_of(batch):
    """Let the Hessian be that of the whole batch, also where a piece of it is asked for one."""

    def of_the_whole(passes):
        whole = copy.copy(passes)
        whole._batch = batch
        return HESSIAN(whole)

    return mock.patch.object(ModelPasses, "_hessian", of_the_whole)


def trained(name, ascent, rank=None, group=None, *, steps=STEPS, wrap=None, start=None):
    """Weights after a few steps, the regularizer and the optimiser."""
    torch.manual_seed(0)
    problem, row = Problem(), ROWS[name]
    options = {"group": group, "ascent": ascent} if rank is not None else {"microbatches": 1 + (ascent == "local")}
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
    regularizer = row.make(STRENGTH, **options).attach(optimizer)
    model, first = problem.model if wrap is None else wrap(problem.model), 0
    if start is not None:
        first = start["step"]
        problem.model.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
        regularizer.load_state_dict(start["regularizer"])
    with same_noise(ascent) as patched:
        for batch in batches()[first:steps]:
            if rank is None:
                patched.enter_context(hessian_of(batch))
            optimizer.zero_grad()
            regularizer.backward(model, F.cross_entropy, half(batch, rank))
            optimizer.step()
    state = {
        "model": problem.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "regularizer": regularizer.state_dict(),
        "step": steps,
    }
    return torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()]), copy.deepcopy(state)


def by_closure(name, rank=None, group=None, *, steps=STEPS, start=None):
    """Weights after a few steps of SharpnessAware, and the state to go on from."""
    torch.manual_seed(0)
    problem, first = Problem(), 0
    regularizer = ROWS[name].make(STRENGTH, group=group)
    optimizer = SharpnessAware(torch.optim.SGD(problem.model.named_parameters(), lr=0.1, momentum=0.9), regularizer)
    if start is not None:
        first = start["step"]
        problem.model.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
    with same_noise("global"):
        for batch in batches()[first:steps]:
            x, y = half(batch, rank)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(problem.model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    state = {"model": problem.model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}
    return flat_weights(problem.model), copy.deepcopy(state)


def everything(rank):
    world = dist.group.WORLD
    found = {(name, ascent): trained(name, ascent, rank, world)[0] for name in ROWS for ascent in ("global", "local")}
    ddp = nn.parallel.DistributedDataParallel
    found["DDP"] = trained("SAM", "global", rank, wrap=ddp)[0]
    found["closures"] = {name: by_closure(name, rank, world)[0] for name, row in ROWS.items() if row.closure}
    found |= {f.__name__: f(rank, world) for f in CHECKS}
    return found


def states(rank, world):
    """What two ranks have after a step, by method and ascent, and behind SharpnessAware."""
    found = {(name, a): trained(name, a, rank, world, steps=1)[1] for name in ROWS for a in ("global", "local")}
    return found | {name: by_closure(name, rank, world, steps=1)[1] for name, row in ROWS.items() if row.closure}


def resumed(rank, world):
    """Weights of two ranks that go on from what one process had after a step."""
    found = {}
    for name, row in ROWS.items():
        for ascent in ("global", "local"):
            found[name, ascent] = trained(name, ascent, rank, world, start=trained(name, ascent, steps=1)[1])[0]
        if row.closure:
            found[name] = by_closure(name, rank, world, start=by_closure(name, steps=1)[1])[0]
    return found


def resumed_with_own_noise(rank, world):
    """Weights of ranks that draw anew: after a step of one process, and (with its state) after two steps together."""
    found = {}
    for name, row in ROWS.items():
        for ascent in ("global", "local"):
            torch.manual_seed(0)
            problem = Problem()
            alone = row.make(STRENGTH, generator=torch.Generator().manual_seed(3))
            several = row.make(STRENGTH, generator=torch.Generator().manual_seed(rank), ascent=ascent, group=world)
            optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
            alone.attach(optimizer).backward(problem.model, F.cross_entropy, batches()[0])
            optimizer.step()
            several.load_state_dict(alone.state_dict())
            several.attach(optimizer)
            for batch in batches()[1:]:
                optimizer.zero_grad()
                several.backward(problem.model, F.cross_entropy, half(batch, rank))
                optimizer.step()
            found[name, ascent] = flat_weights(problem.model), several.state_dict()
    return found


class Branched(nn.Module):
    """Has a part that only large inputs reach, statistics, and a parameter that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.large, self.unused = (
            nn.Linear(3, 3),
            nn.BatchNorm1d(3),
            nn.Linear(3, 3),
            nn.Linear(3, 3),
        )

    def forward(self, x):
        h = self.norm(torch.tanh(self.body(x)))
        return self.large(h) if x.abs().max() > 50 else h


def branch_of_one_rank(rank, world):
    """The gradient of each parameter, None where no rank reaches it."""
    torch.manual_seed(0)
    model, (x, y) = Branched(), half(batches()[0], rank)
    x = x.clone()
    if rank == 1:
        x[0, 0] = 100.0
    SAM(rho=0.05, group=world).backward(model, F.cross_entropy, (x, y))
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def as_ddp_trains(rank, world):
    """Differences of weights and buffers between a DistributedDataParallel loop and this one, with accumulation."""
    differences = []
    for regularizer in (SAM(rho=0.0), FriendlySAM(rho=0.0), WeightNoise(sigma=0.0)):
        torch.manual_seed(0)
        plain = Branched()
        plain.unused = nn.Identity()
        plain.large = nn.Identity()
        ours = copy.deepcopy(plain)
        models = [nn.parallel.DistributedDataParallel(model) for model in (plain, ours)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
        regularizer.attach(optimizers[1])
        for first, second in ((0, 1), (1, 2)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for k, which in enumerate((first, second)):
                x, y = half(batches()[which], rank)
                with models[0].no_sync() if k == 0 else ExitStack():
                    (F.cross_entropy(models[0](x), y) / 2).backward()
                regularizer.backward(models[1], F.cross_entropy, (x, y), weight=0.5)
            for optimizer in optimizers:
                optimizer.step()
        # The other ranks' statistics are the first one's as soon as the next pass begins.
        kept = plain.state_dict() if rank == 0 else dict(plain.named_parameters())
        pairs = [(tensor, ours.state_dict()[name]) for name, tensor in kept.items()]
        differences.append(max((a - b).abs().max().item() for a, b in pairs))
        (F.cross_entropy(models[1](x), y)).backward()  # its reducer still works
    return differences


def mean_over_ranks(rank, world):
    """Ranks with batches of 2 and 6 count alike; of micro-batches, those without a term do not count."""
    torch.manual_seed(0)
    problem, (x, y) = Problem(), batches()[0]
    mine = slice(0, 2) if rank == 0 else slice(2, 8)
    SAM(rho=0.0, group=world).backward(problem.model, F.cross_entropy, (x[mine], y[mine]))
    ragged = flat(problem.model)
    problem.model.zero_grad()
    y = y.clone()
    y[2:4] = -100
    SAM(rho=0.05, group=world, microbatches=2).backward(problem.model, F.cross_entropy, half((x, y), rank))
    return ragged, flat(problem.model)


def one_rank_is_not_finite(rank, world):
    found = {}
    for name, row in ROWS.items():
        for ascent in ("global", "local"):
            torch.manual_seed(0)
            problem, batch = Problem(), half(batches()[0], rank)
            if rank == 1:
                batch[0][0, 0] = float("nan")
            regularizer = row.make(STRENGTH, group=world, ascent=ascent)
            regularizer.backward(problem.model, F.cross_entropy, batch)
            found[name, ascent] = (regularizer.skipped, all(p.grad is None for p in problem.model.parameters()))
    scaler = torch.amp.GradScaler(device="cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    before = flat_weights(problem.model)
    SAM(group=world).backward(problem.model, F.cross_entropy, batch, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    found["scaler"] = (scaler.get_scale(), torch.equal(before, flat_weights(problem.model)))
    return found


def flat_weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Failing(nn.Module):
    def __init__(self, fail_at):
        super().__init__()
        self.inner, self.calls, self.fail_at = nn.Linear(3, 3), Calls(), fail_at

    def forward(self, x):
        self.calls.number += 1
        if self.calls.number == self.fail_at:
            raise RuntimeError("on purpose")
        return self.inner(x)


class Calls:
    """No container that a later pass would put back."""

    number = 0


def errors(rank, world):
    found, batch = {}, half(batches()[0], rank)
    for ascent in ("global", "local"):
        for fail_at in (1, 2):
            model = Failing(fail_at if rank == 1 else None)
            weights = flat_weights(model)
            regularizer = SAM(group=world, ascent=ascent)
            text = raised(lambda m=model, r=regularizer: r.backward(m, F.cross_entropy, batch))
            found[ascent, fail_at] = text, torch.equal(weights, flat_weights(model)), model.inner.weight.grad is None
    short = batch if rank == 0 else tuple(tensor[:1] for tensor in batch)
    found["split"] = raised(lambda: SAM(group=world, microbatches=2).backward(Problem().model, F.cross_entropy, short))
    optimizer = SharpnessAware(torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1), SAM(group=world))
    found["closure"] = raised(lambda: optimizer.step((lambda: None) if rank == 1 else closure_of(optimizer, batch)))
    copied = copy.deepcopy(optimizer)
    found["copied"] = copied.reg.group is world
    return found


def closure_of(optimizer, batch):
    model = nn.Linear(3, 3)
    model.weight, model.bias = optimizer.param_groups[0]["params"]

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def own_noise(rank, world):
    """Ranks that are seeded alike: one noise for all with ascent="global", one each with "local"."""
    found = {}
    for ascent in ("global", "local"):
        model, (x, y) = nn.Linear(3, 1, bias=False), batches()[0]
        seen = []

        def forward(m, batch, seen=seen):
            seen.append(m.weight.detach().clone())
            return m(batch[0]), batch[1].unsqueeze(1).double()

        generator = torch.Generator().manual_seed(5 if ascent == "local" else 5 + rank)
        torch.manual_seed(0)
        regularizer = WeightNoise(sigma=1.0, group=world, ascent=ascent, generator=generator)
        nn.init.zeros_(model.weight)
        regularizer.backward(model, F.mse_loss, (x, y), forward=forward)
        found[ascent] = seen[0]
    return found


CHECKS = [states, resumed, resumed_with_own_noise]
CHECKS += [branch_of_one_rank, as_ddp_trains, mean_over_ranks, one_rank_is_not_finite, errors, own_noise]
