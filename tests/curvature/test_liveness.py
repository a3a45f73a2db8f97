import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from twofold import BetaGELU, NotFiniteError, TwofoldError, second_derivative
from twofold.curvature.liveness import live_fraction


class Fixed(nn.Module):
    """An activation at inputs that the test chooses."""

    def __init__(self, phi):
        super().__init__()
        self.phi = phi

    def forward(self, h):
        return self.phi(h)


def data(*values, dtype=torch.float64):
    h = torch.tensor(values, dtype=dtype)
    return (h, h)


H = data(-3.0, -1.5, -0.4, 0.0, 0.3, 1.0, 1.4142, 2.5, 40.0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("tolerance", [1e-300, 1e-6, 0.1])
def test_beta_gelu_against_its_formula(beta, tolerance):
    def phi2(h):
        return beta * math.exp(-0.5 * (beta * h) ** 2) / math.sqrt(2 * math.pi) * (2 - (beta * h) ** 2)

    expected = sum(abs(phi2(h)) > tolerance for h in H[0].tolist()) / len(H[0])
    assert live_fraction(Fixed(BetaGELU(beta)), H, tolerance=tolerance) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("phi", "expected"),
    [
        (nn.ReLU(), 0.0),
        (nn.ReLU(inplace=True), 0.0),
        (nn.LeakyReLU(0.2), 0.0),
        (nn.Hardtanh(), 0.0),
        (nn.PReLU(dtype=torch.float64), 0.0),
        (nn.ELU(), 3 / 9),  # exp(h) below 0, linear above
        (nn.ELU(inplace=True), 3 / 9),
        (nn.Softplus(), 8 / 9),  # torch takes over the line above 20
        (torch.tanh, 7 / 9),  # 0 at 0, and saturated at 40
        (lambda h: h.clone().relu_(), 0.0),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_other_activations(phi, expected):
    assert live_fraction(Fixed(phi), data(*H[0].tolist())) == pytest.approx(expected)


def test_all_calls_and_batches_count_by_their_entries():
    model = nn.Sequential(nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    batches = [(torch.randn(n, 2).double(), torch.zeros(n)) for n in (5, 2)]
    assert live_fraction(model, batches) == pytest.approx(6 / 9)
    assert live_fraction(model, batches[0]) == pytest.approx(6 / 9)


class Sinusoidal(nn.Module):
    """Encodings of positions, and sin as an activation at 0 and elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        places = torch.arange(4.0, dtype=x.dtype)
        return self.last(torch.sin(self.first(x)) + places.sin() + torch.cos(places))


def test_sines_count_where_parameters_move_their_inputs():
    model = Sinusoidal().double()
    with torch.no_grad():
        model.first.weight[:3] = 0
        model.first.bias[:3] = 0
    assert live_fraction(model, (torch.randn(5, 2).double(), torch.zeros(5))) == pytest.approx(1 / 4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_activations_in_checkpointed_segments_count(use_reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for part in self:
                x = checkpoint(part, x, use_reentrant=use_reentrant)
            return x

    parts = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.GELU()]
    plain = nn.Sequential(nn.Sequential(*parts[:2]), nn.Sequential(*parts[2:])).double()
    batch = (torch.randn(5, 4).double(), torch.zeros(5))
    assert live_fraction(Checkpointed(*plain), batch) == live_fraction(plain, batch) == pytest.approx(3 / 9)


def test_stand_ins_count():
    model = nn.Sequential(nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    batch = (torch.randn(5, 2).double(), torch.zeros(5))
    with second_derivative(0):
        assert live_fraction(model, batch) == 0.0
    with second_derivative(1.0, of="relu"):
        assert live_fraction(model, batch) == 1.0


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        assert 0 < live_fraction(model, (torch.randn(5, 2, generator=torch.Generator()), torch.zeros(5))) <= 1
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert live_fraction(model, (torch.randn(1, 2), torch.zeros(1)), mode="eval") > 0  # train mode refuses one example
    assert model.training


def test_other_forms_of_data():
    def forward(model, batch):
        return model(batch["x"]), batch["y"]

    assert live_fraction(Fixed(nn.GELU()), {"x": H[0], "y": H[1]}, forward=forward, tolerance=0.1) > 0
    with pytest.raises(TwofoldError, match="batch"):
        live_fraction(Fixed(nn.GELU()), H[0])


def test_faults():
    with pytest.raises(TwofoldError, match="No activation"):
        live_fraction(nn.Linear(2, 2), (torch.randn(3, 2), torch.zeros(3)))
    for tolerance in (-1.0, math.nan, "0", True):
        with pytest.raises(TwofoldError, match="tolerance"):
            live_fraction(Fixed(nn.GELU()), H, tolerance=tolerance)
    with pytest.raises(TwofoldError, match=r"nn\.Module"):
        live_fraction(torch.tanh, H)


def test_activations_that_are_not_finite_are_neither_alive_nor_dead():
    x = torch.randn(6, 3)
    x[2, 1] = torch.nan
    with pytest.raises(NotFiniteError, match="gelu'' is NaN at 4 of 24"):
        live_fraction(nn.Sequential(nn.Linear(3, 4), nn.GELU()), (x, torch.zeros(6)))
