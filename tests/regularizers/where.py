"""Which method runs where: every method in every setting, held against its own plain step.

`python tests/regularizers/where.py` writes what it finds into docs/methods.md, tests/integrations/where.py the columns
of the frameworks; test_where.py in both places holds the page to it.
"""

import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- made by tests/regularizers/where.py -->", "<!-- end -->"


class Net(nn.Module):
    def __init__(self, segments=False):
        super().__init__()
        self.a, self.b, self.segments = nn.Linear(16, 32), nn.Linear(32, 4), segments

    def body(self, x):
        return F.gelu(self.a(x))

    def forward(self, x):
        return self.b(checkpoint(self.body, x, use_reentrant=False) if self.segments else self.body(x))


class Trial:
    """One method on one model and batch, from the same start each time."""

    def __init__(self, row, strength=0.2, dtype=torch.float64, **net):
        torch.manual_seed(0)
        self.model = Net(**net).to(dtype)
        self.batch = (torch.randn(64, 16, dtype=dtype), torch.randint(4, (64,)))
        self.generator = torch.Generator()
        self.reg = row.make(strength, generator=self.generator)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.before = flat(self.model.parameters())
        self.reg.attach(self.optimizer)

    def backward(self, model=None, **options):
        """Noise is drawn alike in each call."""
        self.generator.manual_seed(1)
        self.reg.backward(self.model if model is None else model, F.cross_entropy, self.batch, **options)

    def moved(self):
        """What a step of plain SGD with a rate of 1 changes."""
        self.optimizer.step()
        return self.before - flat(self.model.parameters())


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def plain(row, **options):
    trial = Trial(row, **options)
    trial.backward()
    return trial.moved()


def same(found, expected):
    assert (found - expected).norm() < 1e-6 * expected.norm()


def points_alike(row, found):
    """In half precision: what the method adds to the gradient points where it does in full precision."""
    expected = plain(row, dtype=torch.float32)
    gradient = plain(row, strength=0.0, dtype=torch.float32)
    assert F.cosine_similarity(found - gradient, expected - gradient, dim=0) > 0.8


def bf16(row):
    trial = Trial(row, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trial.backward()
    points_alike(row, trial.moved())


def fp16(row):
    trial = Trial(row, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", dtype=torch.float16):
        trial.backward(scaler=scaler)
    scaler.step(trial.optimizer)
    points_alike(row, trial.before - flat(trial.model.parameters()))


def accumulation(row):
    trial = Trial(row)
    for _ in range(4):
        trial.backward(weight=0.25)
    same(trial.moved(), plain(row))


def with_checkpoint(row):
    same(plain(row, segments=True), plain(row))


def compiled(row):
    trial = Trial(row)
    trial.backward(torch.compile(trial.model, backend="eager"))
    same(trial.moved(), plain(row))


def closure(row):
    from twofold import SharpnessAware

    trial = Trial(row)
    optimizer = SharpnessAware(trial.optimizer, trial.reg)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(trial.model(trial.batch[0]), trial.batch[1])
        loss.backward()
        return loss

    trial.optimizer.param_groups[0]["param_names"] = [name for name, _ in trial.model.named_parameters()]
    trial.generator.manual_seed(1)
    optimizer.step(closure)
    same(trial.before - flat(trial.model.parameters()), plain(row))


def ddp(row):
    """In two processes, each with half of the batch and a DistributedDataParallel model."""
    rank = torch.distributed.get_rank()
    trial = Trial(row)
    x, y = trial.batch
    trial.batch = (x.chunk(2)[rank], y.chunk(2)[rank])
    trial.backward(nn.parallel.DistributedDataParallel(trial.model))
    found = trial.moved()
    if DRAWS_FOR_TERMS in repr(trial.reg):
        assert (found - plain(row, strength=0.0)).norm() > 1e-3
        for other in (found.clone(), found.clone()):
            torch.distributed.broadcast(other, 0)
            same(found, other)
    else:
        same(found, plain(row))


DRAWS_FOR_TERMS = "estimator='labels'"


def ddp_column(rank):
    """{method: cell} as this process finds it."""
    from regularizers.rows import ROWS

    return {name: cell(ddp, row) for name, row in ROWS.items()}


SETTINGS = {
    "bf16 autocast": bf16,
    "fp16 GradScaler": fp16,
    "accumulation": accumulation,
    "checkpoint": with_checkpoint,
    "compile": compiled,
    "closure": closure,
}


def cell(setting, row):
    """yes: it runs, and does what the method says; no: it is refused by name. Anything else is a fault, and raises."""
    from twofold import TwofoldError

    try:
        setting(row)
    except TwofoldError:
        return "no"
    return "yes"


def read():
    """{method: {setting: cell}} of the committed page."""
    _, lines, _ = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", PAGE.read_text())
    rows = [[one.strip(" `") for one in line.strip(" |").split("|")] for line in lines.strip().splitlines()]
    if not rows:
        return {}
    return {name: dict(zip(rows[0][1:], cells, strict=True)) for name, *cells in rows[2:]}


def write(settings, columns=None):
    """Fill these settings' columns, and those that are known; others stay as they are."""
    from regularizers.rows import ROWS

    known, columns = read(), columns or {}
    table = {
        name: known.get(name, {})
        | {setting: cell(run, row) for setting, run in settings.items()}
        | {setting: column[name] for setting, column in columns.items()}
        for name, row in ROWS.items()
    }
    names = list(dict.fromkeys(setting for cells in table.values() for setting in cells))
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells.get(n, "") for n in names) + " |" for name, cells in table.items()]
    before, _, after = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", PAGE.read_text())
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from ranks import on_ranks
    from regularizers import where

    write(SETTINGS, {"DDP": on_ranks(where.ddp_column)[0]})
