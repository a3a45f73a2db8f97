"""sharpness: exact on quadratic losses, invariant where it must be, and read-only."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import CASES
from twofold import TwofoldError, TwofoldWarning

pytestmark = pytest.mark.usefixtures("float64")

MEASURES = [
    "lambda_max",
    "traces",
    "adaptive_traces",
    "worst_case",
    "adaptive_worst_case",
    "average",
    "adaptive_average",
    "keskar",
]


class Quadratic:
    """Least squares: L(theta + e) - L(theta) = g'e + e'He/2 in closed form."""

    def __init__(self, inputs=4, at_minimum=False):
        self.model = nn.Linear(inputs, 1)
        x = torch.randn(12, inputs) * torch.linspace(0.3, 2, inputs)
        self.batch = (x, self.model(x).detach() if at_minimum else torch.randn(12, 1))
        c = twofold.Curvature(self.model, F.mse_loss, self.batch)
        self.H, self.g, self.loss = c.hessian.to_dense(), c.gradient(), c.loss()
        self.theta = torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def rise(self, e):
        return (self.g @ e + e @ self.H @ e / 2).item()

    def highest_in_ball(self, rho, scale):
        """The solution e = (m I - H)^-1 g on the sphere, m >= lambda_max, of the scaled problem, by bisection on m."""
        H, g = scale[:, None] * self.H * scale, scale * self.g
        values, vectors = torch.linalg.eigh(H)
        if g.norm() < 1e-12:
            return rho**2 * values[-1].item() / 2
        b = vectors.T @ g
        low, high = values[-1].item(), values[-1].item() + g.norm().item() / rho
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (b / (middle - values)).norm() > rho else (low, middle)
        return self.rise(scale * (vectors @ (b / (high - values))))

    def highest_in_box(self, rho, scale):
        """A convex function is highest in a corner."""
        corners = itertools.product((-rho, rho), repeat=len(scale))
        return max(self.rise(scale * torch.tensor(corner)) for corner in corners)

    def measure(self, **options):
        return twofold.sharpness(self.model, F.mse_loss, self.batch, **options)


@pytest.mark.parametrize("at_minimum", [False, True])
def test_exact_on_a_quadratic(at_minimum):
    q = Quadratic(at_minimum=at_minimum)
    D, ones = q.theta.abs(), torch.ones_like(q.theta)
    found = q.measure(rho=0.3, adaptive_rho=0.7, sigma=0.2, adaptive_sigma=0.3, num_samples=300, ascent_steps=60)
    assert found.loss == pytest.approx(q.loss)
    assert found.gradient_norm == pytest.approx(q.g.norm().item(), abs=1e-12)
    assert found.worst_case.rise == pytest.approx(q.highest_in_ball(0.3, ones), rel=1e-5)
    assert found.adaptive_worst_case.rise == pytest.approx(q.highest_in_ball(0.7, D), rel=1e-4)
    keskar = 100 * q.highest_in_box(1e-3, D + 1) / (1 + q.loss)
    assert (0.5 if at_minimum else 1 - 1e-9) * keskar <= found.keskar <= keskar * (1 + 1e-9)
    for part in ("hessian", "gauss_newton"):
        assert found.lambda_max[part].values.item() == pytest.approx(torch.linalg.eigvalsh(q.H)[-1].item())
        assert abs(found.traces[part].value - q.H.trace().item()) < 4 * found.traces[part].stderr
        exact = (D.square() * q.H.diagonal()).sum().item()
        assert abs(found.adaptive_traces[part].value - exact) < 4 * found.adaptive_traces[part].stderr
    assert found.traces["nme"].value == found.adaptive_traces["nme"].value == 0
    for estimate, scale in ((found.average, 0.2 * ones), (found.adaptive_average, 0.3 * D)):
        exact = (scale.square() * q.H.diagonal()).sum().item() / 2
        assert abs(estimate.value - exact) < 4 * estimate.stderr
        assert estimate.stderr < exact / 5
        assert estimate.num_matvecs == 600


def test_one_step_is_that_of_sam_and_asam():
    q = Quadratic()
    D = q.theta.abs()
    found = q.measure(rho=0.2, adaptive_rho=0.4, measures=("worst_case", "adaptive_worst_case"))
    assert found.worst_case.one_step == pytest.approx(q.rise(0.2 * q.g / q.g.norm()))
    assert found.adaptive_worst_case.one_step == pytest.approx(q.rise(0.4 * D * D * q.g / (D * q.g).norm()))
    box = q.measure(rho=0.2, measures="worst_case", p=math.inf).worst_case
    assert box.one_step == pytest.approx(q.rise(0.2 * q.g.sign()))


@pytest.mark.parametrize("seed", range(5))
def test_worst_cases_in_a_box_are_corners(seed):
    torch.manual_seed(seed)
    q = Quadratic()
    found = q.measure(rho=1e-2, adaptive_rho=5e-3, p=math.inf, measures=("worst_case", "adaptive_worst_case"))
    D = q.theta.abs()
    assert found.worst_case.rise == pytest.approx(q.highest_in_box(1e-2, torch.ones_like(D)), rel=1e-9)
    assert found.adaptive_worst_case.rise == pytest.approx(q.highest_in_box(5e-3, D), rel=1e-9)


def test_the_worst_case_is_at_least_one_step_and_in_the_ball():
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    norms = []
    for rho in (1e-3, 0.1, 1.0, 10.0):
        found = twofold.sharpness(case.model, case.loss_fn, case.batches, rho=rho, measures="worst_case").worst_case
        assert found.rise >= max(found.one_step, 0)
        assert found.num_gradients <= 21
        norms.append(found.rise)
    assert norms == sorted(norms)
    assert norms[0] == pytest.approx(1e-3 * c.gradient().norm().item(), rel=1e-2)


def test_averages_are_calibrated():
    q = Quadratic()
    exact = 0.5**2 * q.H.trace().item() / 2
    scores = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        found = q.measure(sigma=0.5, num_samples=12, measures="average", generator=generator).average
        scores.append((found.value - exact) / found.stderr)
    scores = torch.tensor(scores)
    assert 0.5 < scores.var().item() < 2
    assert abs(scores.mean().item()) < 0.5


def test_adaptive_measures_do_not_see_how_layers_share_their_scale():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    batch = (torch.randn(20, 4), torch.randint(3, (20,)))

    def measured():
        return twofold.sharpness(model, F.cross_entropy, batch)

    before = measured()
    with torch.no_grad():
        model[0].weight.mul_(4.0)
        model[2].weight.div_(4.0)
    after = measured()
    assert after.adaptive_worst_case.rise == pytest.approx(before.adaptive_worst_case.rise)
    assert after.adaptive_average.value == pytest.approx(before.adaptive_average.value)
    assert after.adaptive_traces["hessian"].value == pytest.approx(before.adaptive_traces["hessian"].value)
    assert after.worst_case.rise != pytest.approx(before.worst_case.rise, rel=0.1)
    assert after.traces["hessian"].value != pytest.approx(before.traces["hessian"].value, rel=0.1)


def leaves(values):
    for value in values.values():
        yield from leaves(value) if isinstance(value, dict) else [float(value)]


def test_batches_are_averaged_exactly_and_parameters_are_chosen():
    case = CASES["ragged"]()
    x, y = (torch.cat(parts) for parts in zip(*case.batches, strict=True))
    parts = twofold.sharpness(case.model, case.loss_fn, case.batches, params="0.*")
    whole = twofold.sharpness(case.model, case.loss_fn, (x, y), params="0.*")
    numbers, others = ([*leaves(found.to_dict())] for found in (whole, parts))
    assert len(numbers) > 20
    assert numbers == pytest.approx(others, rel=1e-6, abs=1e-9)
    size = case.model[0].weight.numel() + case.model[0].bias.numel()
    assert parts.lambda_max["hessian"].vectors.shape == (size, 1)


class Stumbling(nn.Module):
    """BatchNorm and dropout in train mode, and an error at a chosen pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
        self.passes, self.stop = 0, math.inf

    def forward(self, x):
        self.passes += 1
        if self.passes > self.stop:
            raise ValueError("stumbled")
        return self.body(x)


@pytest.mark.parametrize("stop", [math.inf, 1, 4, 30])
def test_the_model_is_left_as_it_was(stop):
    model, batch = Stumbling(), (torch.randn(9, 3), torch.randint(2, (9,)))
    model.body[0].weight.grad = torch.ones(5, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    counter = {"passes": 0}

    def forward(module, batch):
        counter["passes"] += 1
        if counter["passes"] > stop:
            raise ValueError("stumbled")
        return module(batch[0]), batch[1]

    options = {"forward": forward, "num_matvecs": 4, "num_samples": 4, "ascent_steps": 4}
    if stop == math.inf:
        first, second = (twofold.sharpness(model, F.cross_entropy, batch, **options) for _ in range(2))
        assert first.to_dict() == second.to_dict()
    else:
        with pytest.raises(ValueError, match="stumbled"):
            twofold.sharpness(model, F.cross_entropy, batch, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.body[0].weight.grad, torch.ones(5, 3))
    assert model.body[4].weight.grad is None
    assert model.training
    assert model.passes == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_not_asked_for_is_none():
    q = Quadratic()
    for name in MEASURES:
        found = q.measure(measures=name, num_matvecs=2, num_samples=2, ascent_steps=2)
        assert [other for other in MEASURES if getattr(found, other) is not None] == [name]


def test_it_reads_well():
    text = str(Quadratic().measure())
    assert text.splitlines()[0].startswith("Sharpness at loss")
    for words in ("lambda_max H ", "lambda_max GN ", "tr NME ", "worst case, ||e||_2 <= 0.05", "adaptive average", "%"):
        assert words in text
    assert "||e||_inf" in str(Quadratic().measure(p=math.inf, measures="worst_case"))
    result = json.loads(json.dumps(Quadratic().measure().to_dict()))
    assert result["worst_case"]["rise"] > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"measures": ("flatness",)}, "measures"),
        ({"measures": ()}, "measures"),
        ({"rho": 0.0}, "rho"),
        ({"adaptive_rho": -1.0}, "adaptive_rho"),
        ({"sigma": math.nan}, "sigma"),
        ({"adaptive_sigma": math.inf}, "adaptive_sigma"),
        ({"epsilon": True}, "epsilon"),
        ({"p": 1}, "p must"),
        ({"ascent_steps": 0}, "ascent_steps"),
        ({"num_matvecs": 0}, "num_matvecs"),
        ({"num_samples": 1.5}, "num_samples"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(TwofoldError, match=match):
        Quadratic().measure(**options)


def test_a_loss_that_overflows_near_by_is_infinitely_sharp():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)

    def loss_fn(z, y):
        return torch.exp(700 * z).mean()

    found = twofold.sharpness(model, loss_fn, (torch.ones(2, 1), torch.zeros(2)), rho=1.0, measures="worst_case")
    assert found.worst_case.rise == math.inf


@pytest.mark.filterwarnings("error::twofold.TwofoldWarning")
def test_float32_is_enough_for_plain_models():
    torch.set_default_dtype(torch.float32)
    case = CASES["mlp"]()
    found = twofold.sharpness(case.model, case.loss_fn, case.batches)
    assert found.lambda_max["hessian"].converged
    assert issubclass(TwofoldWarning, UserWarning)


HALVES = [torch.float16, torch.bfloat16]


class Narrow(nn.Linear):
    """Parameters in full precision, outputs in half."""

    def forward(self, x):
        return super().forward(x).bfloat16()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("measure", MEASURES)
def test_half_precision_is_refused_for_differences_and_kept_in_products(measure, dtype):
    model, x, y = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(16, 4), torch.arange(16) % 3
    half, options = copy.deepcopy(model).to(dtype), {"measures": measure, "num_matvecs": 4}
    if measure not in ("lambda_max", "traces", "adaptive_traces"):
        with pytest.raises(TwofoldError, match=rf"{measure} cannot be measured .*half precision, here {dtype}"):
            twofold.sharpness(half, F.cross_entropy, (x.to(dtype), y), **options)
        return
    found = twofold.sharpness(half, F.cross_entropy, (x.to(dtype), y), **options).to_dict()[measure]
    exact = twofold.sharpness(half.double(), F.cross_entropy, (x.to(dtype).double(), y), **options).to_dict()[measure]
    scale = max(abs(of["value"]) for of in exact.values())
    for matrix, of in exact.items():
        assert found[matrix]["value"] == pytest.approx(of["value"], abs=10 * torch.finfo(dtype).eps * scale)


def test_half_precision_of_the_outputs_alone_is_refused():
    with pytest.raises(TwofoldError, match="half precision"):
        twofold.sharpness(Narrow(4, 3), F.cross_entropy, (torch.randn(8, 4), torch.arange(8) % 3), measures="keskar")
