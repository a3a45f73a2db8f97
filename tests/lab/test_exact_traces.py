import pytest
import torch
from torch import nn

from twofold import Curvature
from twofold.errors import TwofoldError
from twofold.lab.config import ACTIVATIONS, ModelConfig
from twofold.lab.exact_traces import ExactTracePenalty, exact_traces
from twofold.lab.models import build


def net(activation="gelu", width=5, depth=3, **options):
    return build(ModelConfig(width=width, depth=depth, activation=activation, **options), (4,), 3, seed=1).double()


def batch():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (7,), generator=generator)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 3])
def test_traces_are_those_of_the_dense_matrices(activation, depth):
    model, (x, y) = net(activation, depth=depth), batch()
    curvature = Curvature(model, nn.CrossEntropyLoss(), (x, y))
    found = exact_traces(model, x, y)
    assert found.loss.item() == pytest.approx(curvature.loss(), rel=1e-12)
    assert found.gauss_newton.item() == pytest.approx(curvature.gauss_newton.to_dense().trace().item(), rel=1e-9)
    assert found.nme.item() == pytest.approx(curvature.nme.to_dense().trace().item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_the_penalty_descends_loss_plus_strength_times_trace(matrix):
    model, (x, y), strength, step = net(), batch(), 0.3, 1e-5

    def objective():
        found = exact_traces(model, x, y)
        trace = found.gauss_newton + (found.nme if matrix == "hessian" else 0)
        return (found.loss + strength * trace).item()

    loss = ExactTracePenalty(strength, matrix).backward(model, nn.CrossEntropyLoss(), (x, y))
    assert loss.item() == pytest.approx(exact_traces(model, x, y).loss.item())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    slope = sum((p.grad * v).sum().item() for p, v in zip(model.parameters(), direction, strict=True))
    values = []
    for sign in (1, -2):  # from theta to theta + h v, and from there to theta - h v
        with torch.no_grad():
            for p, v in zip(model.parameters(), direction, strict=True):
                p.add_(sign * step * v)
        values.append(objective())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize(
    "model", [net(norm="layer"), nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.GELU())], ids=str
)
def test_other_models_are_refused(model):
    with pytest.raises(TwofoldError, match="linear layers"):
        exact_traces(model.double(), *batch())


def test_other_matrices_are_refused():
    with pytest.raises(TwofoldError, match="'nme'"):
        ExactTracePenalty(0.1, "nme")
