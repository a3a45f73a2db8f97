"""What holds for every regularizer; a new one is a new row in rows.py."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import CASES
from references import relative
from regularizers.rows import ROWS, Problem, attached, flat, update
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.regularizers import SAM, EigenSAM, GradientPenalty, SharpnessAware

every = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
with_closure = pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.closure], ids=[name for name, row in ROWS.items() if row.closure]
)
STRENGTH = 0.03


def backward(problem, regularizer, **options):
    problem.model.zero_grad()
    loss = regularizer.backward(problem.model, problem.loss_fn, problem.batch, **options)
    return loss, update(problem.model, regularizer)


def seeded(f):
    """Run f from the same random state each time, and leave the state as it was."""
    state = torch.get_rng_state()
    try:
        return f()
    finally:
        torch.set_rng_state(state)


@every
def test_agrees_with_the_formula(row):
    problem = Problem()
    expected = seeded(lambda: row.reference(problem, STRENGTH, torch.ones_like(problem.theta)))
    _, found = backward(problem, row.make(STRENGTH))
    correction = expected - problem.gradient()
    assert relative(found - problem.gradient(), correction) < row.tolerance


@every
def test_tends_to_the_known_direction(row):
    """(update(h) - g) / h^order at small h against the same of the formula, extrapolated."""
    problem = Problem()
    ones, g = torch.ones_like(problem.theta), problem.gradient()

    def slope(h):
        return seeded(lambda: (row.reference(problem, h, ones) - g) / h**row.order)

    limit, h = 2 * slope(1e-4) - slope(2e-4), 1e-5
    if row.order == 2:
        limit, h = (4 * slope(1e-3) - slope(2e-3)) / 3, 1e-3
    _, found = backward(problem, row.make(h))
    assert limit.norm() > 1e-3
    assert relative((found - g) / h**row.order, limit) < 1e-3


@every
@pytest.mark.parametrize("case", ["mlp", "conv BatchNorm train", "LayerNorm and attention", "LSTM", "tied", "sum"])
def test_strength_zero_is_the_plain_gradient_bit_for_bit(row, case):
    case = CASES[case]()
    plain = copy.deepcopy(case.model)
    outputs = plain(case.batches[0][0])
    loss = case.loss_fn(outputs, case.batches[0][1])
    loss.backward()
    after = torch.get_rng_state()
    found = row.make(0.0).backward(case.model, case.loss_fn, case.batches[0])
    assert torch.equal(found, loss.detach())
    assert torch.equal(torch.get_rng_state(), after)
    for one, other in zip(case.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(case.model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


@every
def test_params_restrict_what_is_perturbed(row):
    problem = Problem()
    mask = problem.mask(["0.weight", "2.bias"])
    expected = seeded(lambda: row.reference(problem, STRENGTH, mask))
    _, found = backward(problem, row.make(STRENGTH, params=["0.w*", "2.bias"]))
    assert relative(found - problem.gradient(), expected - problem.gradient()) < row.tolerance


@every
def test_the_loss_is_the_clean_one_and_the_graph_is_gone(row, request):
    problem = Problem()
    loss, outputs = row.make(STRENGTH).backward(
        problem.model, problem.loss_fn, problem.batch, weight=0.5, return_outputs=True
    )
    assert not loss.requires_grad
    assert not outputs.requires_grad
    if "WeightNoise" not in request.node.name:
        torch.testing.assert_close(loss, problem.loss(problem.theta))
        torch.testing.assert_close(outputs, problem.outputs(problem.theta))


@every
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_the_backward_of_its_loss_adds_the_same_gradient(row, scaled):
    problem, other = Problem(), Problem()
    other.model.load_state_dict(problem.model.state_dict())
    other.batch = problem.batch
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    by_backward = attached(row.make(STRENGTH), problem.model)
    by_loss = attached(row.make(STRENGTH), other.model)
    for parameter in (*problem.model.parameters(), *other.model.parameters()):
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    for _ in range(2):
        expected = by_backward.backward(
            problem.model, problem.loss_fn, problem.batch, weight=0.25, scaler=scaler, return_outputs=True
        )
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    for _ in range(2):
        loss, outputs = by_loss.loss(other.model, other.loss_fn, other.batch, scaler=scaler, return_outputs=True)
        (scaler.scale(loss / 4) if scaled else loss / 4).backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(loss, expected[0])
    assert torch.equal(outputs, expected[1])
    assert torch.equal(flat(other.model), flat(problem.model))
    arrived = by_backward.memory.arrived or []
    assert all(torch.equal(a, b) for a, b in zip(by_loss.memory.arrived or [], arrived, strict=True))
    assert by_loss.memory.weight == by_backward.memory.weight
    with pytest.raises(TwofoldError, match="once only"):
        loss.backward()


@every
def test_the_loss_of_a_gradient_that_is_not_finite_hands_nothing_on(row):
    problem = Problem()
    problem.batch[0][0, 0] = float("nan")
    regularizer = row.make(STRENGTH)
    problem.model[0].bias.grad = torch.ones(4).double()
    with pytest.warns(TwofoldWarning, match="not finite"):
        loss = regularizer.loss(problem.model, problem.loss_fn, problem.batch)
    loss.backward()
    assert regularizer.skipped == 1
    assert problem.model[0].weight.grad is None
    assert torch.equal(problem.model[0].bias.grad, torch.ones(4).double())


@every
def test_gradients_accumulate_and_microbatches_are_their_mean(row):
    problem = Problem()
    x, y = problem.batch
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]

    def by_calls():
        problem.model.zero_grad()
        regularizer = attached(row.make(STRENGTH), problem.model)
        losses = [
            regularizer.backward(problem.model, problem.loss_fn, half, weight=0.5, return_outputs=True)[0]
            for half in halves
        ]
        return sum(losses) / 2, update(problem.model, regularizer)

    loss, expected = seeded(by_calls)
    problem.model.zero_grad()
    regularizer = attached(row.make(STRENGTH, microbatches=2), problem.model)
    found_loss, outputs = regularizer.backward(problem.model, problem.loss_fn, problem.batch, return_outputs=True)
    assert relative(update(problem.model, regularizer), expected) < 1e-12
    torch.testing.assert_close(found_loss, loss)
    assert outputs.shape == (6, 3)


@every
def test_uneven_microbatches_are_weighted_by_the_loss(row):
    weights = torch.tensor([1.0, 2.0, 0.5]).double()
    problem = Problem(loss_fn=nn.CrossEntropyLoss(weight=weights))
    x, y = problem.batch = (torch.randn(5, 3).double(), torch.tensor([0, 1, -100, 2, 2]))
    parts, total, state = [(x[:3], y[:3]), (x[3:], y[3:])], 4.0, torch.get_rng_state()
    regularizer, expected = attached(row.make(STRENGTH), problem.model), 0.0
    for part, weight in zip(parts, (3.0, 1.0), strict=True):
        problem.model.zero_grad()
        regularizer.backward(problem.model, problem.loss_fn, part)
        expected = expected + weight / total * update(problem.model, regularizer)
    torch.set_rng_state(state)
    _, found = backward(problem, row.make(STRENGTH, microbatches=2))
    assert relative(found, expected) < 1e-12


@every
def test_microbatches_of_a_summed_loss_are_summed(row):
    problem = Problem(loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    x, y = problem.batch
    regularizer, expected, state = attached(row.make(STRENGTH), problem.model), 0.0, torch.get_rng_state()
    for part in ((x[:3], y[:3]), (x[3:], y[3:])):
        expected = expected + backward(Problem(problem.model, problem.loss_fn, part), regularizer)[1]
    torch.set_rng_state(state)
    _, found = backward(problem, row.make(STRENGTH, microbatches=2))
    assert relative(found, expected) < 1e-12


class Log:
    """What a model saw; no container that a later pass would put back."""

    def __init__(self):
        self.items = []


class Partial(nn.Module):
    """A frozen, a tied, an unused parameter, dropout and BatchNorm."""

    def __init__(self, p=0.0):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.b.weight = self.a.weight
        self.frozen, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.drop = nn.Dropout(p)
        self.log = Log()

    def forward(self, x):
        h = self.norm(torch.tanh(self.a(x)))
        self.log.items.append(torch.rand(()).item())
        return self.frozen(self.drop(F.gelu(self.b(h))))


@every
def test_frozen_tied_and_unused_parameters(row):
    model = Partial().double()
    problem = Problem(model)
    row.make(STRENGTH).backward(model, problem.loss_fn, problem.batch)
    assert all(p.grad is None for p in [*model.frozen.parameters(), *model.unused.parameters()])
    assert all(p.grad is not None for p in [model.a.weight, model.a.bias, model.b.bias, *model.norm.parameters()])
    storages = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    assert len(storages) == len(set(storages))


@every
def test_running_statistics_move_once_and_masks_are_shared(row):
    model = Partial(p=0.5).double()
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 3).double(), torch.randint(3, (8,))

    def draw_and_run():
        if row.draws:
            torch.randint(2**62, ())
        plain(x)
        return torch.get_rng_state()

    after = seeded(draw_and_run)
    row.make(1e-6).backward(model, F.cross_entropy, (x, y))
    assert torch.equal(torch.get_rng_state(), after)
    assert len(model.log.items) == row.passes
    assert len(set(model.log.items)) == 1
    assert model.norm.num_batches_tracked == 1
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Restless(nn.Linear):
    """Draws more in each pass than in the one before."""

    def forward(self, x):
        self.log.items.append(torch.rand(len(self.log.items) + 1))
        return super().forward(x)


@every
def test_the_random_state_is_that_after_one_forward_pass_whatever_later_ones_draw(row):
    model = Restless(3, 3).double()
    model.log = Log()
    regularizer = row.make(STRENGTH)

    def draw():
        if row.draws:
            torch.randint(2**62, ())
        torch.rand(1)
        return torch.get_rng_state()

    batch = (torch.randn(6, 3).double(), torch.randint(3, (6,)))
    after = seeded(draw)
    regularizer.backward(model, F.cross_entropy, batch)
    assert len(model.log.items) == row.passes
    assert torch.equal(torch.get_rng_state(), after)


@every
def test_noise_differs_from_step_to_step_and_resumes(row):
    problem = Problem()
    generator = torch.Generator().manual_seed(5)
    regularizer = row.make(STRENGTH, generator=generator)
    before = torch.get_rng_state()
    _, first = backward(problem, regularizer)
    state = pickle.loads(pickle.dumps(regularizer.state_dict()))
    _, second = backward(problem, regularizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second) != (row.draws or row.remembers)
    resumed = row.make(STRENGTH, generator=torch.Generator())
    resumed.load_state_dict(state)
    _, again = backward(problem, resumed)
    assert torch.equal(again, second)
    for other in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert repr(other) == repr(regularizer)


class Failing(nn.Module):
    """Raises in the n-th forward or backward pass, after it has moved everything that can be moved.

    A hook on a tensor stops jets, so that HessianTrace begins anew and meets it in its next pass.
    """

    def __init__(self, fail_at, where):
        super().__init__()
        self.inner, self.norm, self.log = nn.Linear(3, 3), nn.BatchNorm1d(3), Log()
        self.fail_at, self.where = fail_at, where

    def forward(self, x):
        self.log.items.append(x)
        h = F.gelu(self.norm(F.dropout(self.inner(x), 0.5)))
        if len(self.log.items) >= self.fail_at:
            self.extra = h
            self.eval()
            if self.where == "forward":
                raise RuntimeError("on purpose")
            h.register_hook(self.fail)
        return h

    @staticmethod
    def fail(gradient):
        raise RuntimeError("on purpose")


@every
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_any_pass_leaves_everything_as_it_was(row, where):
    batch = (torch.randn(6, 3).double(), torch.randint(3, (6,)))
    for fail_at in range(1, row.passes + 1):
        model = Failing(fail_at, where).double()
        model.inner.weight.grad = torch.ones(3, 3).double()
        generator = torch.Generator().manual_seed(1)
        before = copy.deepcopy(model.state_dict())
        random, own = torch.get_rng_state(), generator.get_state()
        with pytest.raises(RuntimeError, match="on purpose"):
            row.make(0.1, generator=generator).backward(model, F.cross_entropy, batch)
        assert len(model.log.items) >= fail_at
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(generator.get_state(), own)
        assert model.training
        assert model.norm.training
        assert not hasattr(model, "extra")
        assert torch.equal(model.inner.weight.grad, torch.ones(3, 3).double())
        assert model.inner.bias.grad is None


@every
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_not_handed_on(row, bad):
    problem = Problem()
    regularizer = row.make(STRENGTH)
    problem.batch[0][0, 0] = bad
    problem.model[0].bias.grad = torch.ones(4).double()
    with pytest.warns(TwofoldWarning, match="not finite"):
        regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    assert regularizer.skipped == 2
    assert torch.equal(problem.model[0].bias.grad, torch.ones(4).double())
    assert problem.model[0].weight.grad is None
    assert torch.isfinite(problem.theta).all()


@every
def test_a_gradient_of_zero_stays_zero(row):
    problem = Problem(loss_fn=F.mse_loss)
    problem.batch = (problem.batch[0], problem.model(problem.batch[0]).detach())
    _, found = backward(problem, row.make(STRENGTH))
    assert torch.isfinite(found).all()
    if not row.draws:
        assert found.norm() == 0


@every
def test_with_a_scaler_the_scaled_gradient_is_left(row):
    problem = Problem()
    expected = seeded(lambda: backward(problem, row.make(STRENGTH))[1])
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    regularizer = row.make(STRENGTH)
    backward(problem, regularizer, scaler=scaler)
    found = update(problem.model, regularizer, scale=1024)
    assert relative(found, expected) < (1e-12 if row.tolerance < 1e-6 else 1e-6)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    assert relative(update(problem.model, regularizer), expected) < 1e-6
    scaler.step(optimizer)
    scaler.update()
    problem.batch[0][0, 0] = float("inf")
    before = copy.deepcopy(problem.model.state_dict())
    problem.model.zero_grad()
    row.make(STRENGTH).backward(problem.model, problem.loss_fn, problem.batch, scaler=scaler)
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(problem.model.state_dict().values(), before.values(), strict=True))


@every
def test_autocast_does_not_hide_the_perturbation(row):
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    batch = (torch.randn(64, 16), torch.randint(4, (64,)))
    problem = Problem(model, batch=batch)
    problem.model.zero_grad()
    g = problem.gradient()
    strength = 0.5
    if not row.half_precision:
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TwofoldError, match="half precision"):
            backward(problem, row.make(strength))
        return
    expected = seeded(lambda: backward(problem, row.make(strength))[1]) - g
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch[0])
        _, plain = backward(problem, row.make(0.0))
        model(batch[0])
        _, found = seeded(lambda: backward(problem, row.make(strength)))
    assert F.cosine_similarity(found - plain, expected, dim=0) > 0.85


@every
def test_autocast_at_strength_zero_is_the_plain_gradient_bit_for_bit(row):
    case = CASES["tied"]()
    inputs, targets = case.batches[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss_fn(case.model(inputs), targets)
    loss.backward()
    expected = flat(case.model)
    case.model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row.make(0.0).backward(case.model, case.loss_fn, (inputs, targets))
    assert torch.equal(flat(case.model), expected)


@every
def test_compiled_wrappers_make_no_difference(row):
    problem = Problem()
    expected = seeded(lambda: backward(problem, row.make(STRENGTH))[1])
    wrapped = torch.compile(problem.model, backend="eager")
    problem.model.zero_grad()
    regularizer = row.make(STRENGTH)
    regularizer.backward(wrapped, problem.loss_fn, problem.batch)
    assert torch.equal(update(problem.model, regularizer), expected)


@pytest.mark.parametrize(
    ("make", "compiled_passes"),
    [
        (lambda: SAM(rho=0.1), 2),
        (lambda: GradientPenalty(rho=0.1, method="finite_difference"), 2),
        (lambda: GradientPenalty(rho=0.1), 0),
        (lambda: EigenSAM(rho=0.1), 0),
    ],
    ids=["SAM", "finite difference", "exact penalty", "EigenSAM"],
)
def test_passes_of_first_derivatives_run_compiled_with_the_masks_of_the_first(make, compiled_passes):
    passes = []

    def counting(graph, inputs):
        def run(*inputs):
            passes.append(1)
            return graph(*inputs)

        return run

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    other = copy.deepcopy(model)
    batch = (torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))
    torch.manual_seed(1)
    make().backward(model, nn.CrossEntropyLoss(), batch)
    torch.manual_seed(1)
    make().backward(torch.compile(other, backend=counting), nn.CrossEntropyLoss(), batch)
    assert len(passes) == compiled_passes
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-12)
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)


@with_closure
def test_a_closure_gives_the_same_step_with_groups_scheduler_and_hooks(row):
    problem, other = Problem(), Problem()
    other.model.load_state_dict(problem.model.state_dict())
    x, y = problem.batch

    def groups(model):
        first, last = model[0].named_parameters(), model[2].named_parameters("last")
        return [{"params": first, "lr": 0.2}, {"params": last, "weight_decay": 0.1}]

    plain = torch.optim.SGD(groups(problem.model), lr=0.1, momentum=0.9)
    wrapped = SharpnessAware(torch.optim.SGD(groups(other.model), lr=0.1, momentum=0.9), row.make(STRENGTH))
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (plain, wrapped)]
    seen = []
    wrapped.register_step_post_hook(lambda *_: seen.append("wrapped"))
    wrapped.base.register_step_post_hook(lambda *_: seen.append("base"))

    def closure():
        wrapped.zero_grad()
        loss = F.cross_entropy(other.model(x), y)
        loss.backward()
        return loss

    regularizer = row.make(STRENGTH).attach(plain)
    for _ in range(3):
        state = torch.get_rng_state()
        loss, _ = backward(problem, regularizer)
        plain.step()
        schedules[0].step()
        torch.set_rng_state(state)
        assert torch.equal(wrapped.step(closure), loss)
        schedules[1].step()
    assert seen == ["base", "wrapped"] * 3
    assert wrapped.param_groups[0]["lr"] == pytest.approx(0.2 / 8)
    for a, b in zip(problem.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@with_closure
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_a_closure_leaves_everything_as_it_was(row, where):
    x, y = torch.randn(6, 3).double(), torch.randint(3, (6,))
    for fail_at in range(1, row.passes + 1):
        model = Failing(fail_at, where).double()
        model.eval = lambda: None
        optimizer = SharpnessAware(torch.optim.SGD(model.named_parameters(), lr=0.1), row.make(0.1))
        model.inner.weight.grad = torch.ones(3, 3).double()

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        with pytest.raises(RuntimeError, match="on purpose"):
            optimizer.step(closure)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(model.inner.weight.grad, torch.ones(3, 3).double())
        assert model.inner.bias.grad is None


@with_closure
def test_a_closure_moves_running_statistics_once(row):
    model = Partial(p=0.5).double()
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 3).double(), torch.randint(3, (8,))
    optimizer = SharpnessAware(torch.optim.SGD(model.named_parameters(), lr=0.0), row.make(1e-6))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    plain(x)
    assert len(model.log.items) == row.passes
    assert len(set(model.log.items)) == 1
    assert model.norm.num_batches_tracked == 1
    for one, other in zip(model.norm.buffers(), plain.norm.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if not row.closure], ids=[n for n, row in ROWS.items() if not row.closure]
)
def test_what_needs_the_outputs_is_refused_from_a_closure(row):
    problem = Problem()
    optimizer = SharpnessAware(torch.optim.SGD(problem.model.parameters(), lr=0.1), row.make(STRENGTH))
    with pytest.raises(TwofoldError, match=r"reg\.backward"):
        optimizer.step(lambda: None)


@every
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "0.1", True, None])
def test_a_strength_that_makes_no_sense_is_refused_with_its_value(row, bad):
    with pytest.raises(TwofoldError, match=str(bad)):
        row.make(bad)
