"""P^-1/2 A P^-1/2 with P from optimisers: the P is what their own steps divide by."""

import pytest
import torch
from torch import nn

import twofold
from models import classification, mlp
from references import relative
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")

OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"betas": (0.0, 0.99)}),
    "Adam amsgrad": (torch.optim.Adam, {"betas": (0.0, 0.6), "amsgrad": True, "eps": 0.1}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.0, 0.99), "weight_decay": 0.0, "eps": 1e-3}),
    "Adam fused": (torch.optim.Adam, {"betas": (0.0, 0.9), "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.7}),
    "RMSprop centered": (torch.optim.RMSprop, {"alpha": 0.7, "centered": True, "eps": 0.05}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.2}),
    "Adamax": (torch.optim.Adamax, {"betas": (0.0, 0.9)}),
}
LR = 1e-3


def stepped(case, optimizer, steps=3):
    """Take steps; return the last gradient and the step that it made, each [P]."""
    parameters = list(case.model.parameters())
    for batch in (case.batches * steps)[:steps]:
        optimizer.zero_grad()
        case.loss_fn(case.model(batch[0]), batch[1]).backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    return gradient, torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])


@pytest.fixture
def case():
    return classification(mlp(4, 5, 3), sizes=(5, 5))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_preconditioner_is_what_the_step_divides_by(case, name):
    make, options = OPTIMIZERS[name]
    optimizer = make(case.model.parameters(), lr=LR, **options)
    # Without momentum a step is -lr g / P.
    gradient, step = stepped(case, optimizer)
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches)
    preconditioned = hessian.preconditioned(optimizer)
    torch.testing.assert_close(preconditioned.inverse_root**2, -step / (LR * gradient), rtol=1e-6, atol=0)
    root = preconditioned.inverse_root
    assert relative(preconditioned.to_dense(), root[:, None] * hessian.to_dense() * root) < 1e-12


def test_nadam_divides_as_adam_does(case):
    adam = torch.optim.Adam(case.model.parameters(), lr=0.0)
    nadam = torch.optim.NAdam(case.model.parameters(), lr=0.0)
    stepped(case, adam), stepped(case, nadam)
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches)
    torch.testing.assert_close(hessian.preconditioned(nadam).inverse_root, hessian.preconditioned(adam).inverse_root)


def test_every_operator_takes_every_form_of_diagonal(case):
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    P = torch.rand(43) + 0.1
    root = P.rsqrt()
    for operator in (c.nme, 2 * c.gauss_newton + c.nme, c.fisher(), c.hessian.preconditioned(P), c.hessian.block("*")):
        expected = root[:, None] * operator.to_dense() * root
        assert relative(operator.preconditioned(P).to_dense(), expected) < 1e-12
        assert relative(operator.preconditioned(c.layout.as_dict(P)).to_dense(), expected) < 1e-12
        assert relative(operator.preconditioned(P).block("2.*").to_dense(), expected[25:, 25:]) < 1e-12
    values = torch.linalg.eigvals(c.hessian.to_dense() / P[:, None]).real
    assert twofold.eigsh(c.hessian.preconditioned(P), k=1).values.item() == pytest.approx(values.max().item())


def test_an_optimizer_of_a_part_serves_its_block(case):
    optimizer = torch.optim.Adam(case.model[2].parameters())
    stepped(case, optimizer)
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    block = (c.hessian + c.nme).block("2.*")
    assert block.preconditioned(optimizer).shape == (18, 18)
    with pytest.raises(TwofoldError, match=r"does not hold the parameter '0\.weight'"):
        c.hessian.preconditioned(optimizer)


def test_a_sharpness_aware_optimizer_is_seen_through(case):
    base = torch.optim.AdamW(case.model.parameters())
    stepped(case, base)
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches)
    wrapped = twofold.SharpnessAware(base, twofold.SAM(rho=0.05))
    assert torch.equal(hessian.preconditioned(wrapped).inverse_root, hessian.preconditioned(base).inverse_root)


def test_the_preconditioner_is_that_of_the_moment(case):
    optimizer = torch.optim.Adam(case.model.parameters())
    stepped(case, optimizer)
    preconditioned = twofold.Hessian(case.model, case.loss_fn, case.batches).preconditioned(optimizer)
    before = preconditioned.inverse_root.clone()
    stepped(case, optimizer)
    assert torch.equal(preconditioned.inverse_root, before)


@pytest.mark.parametrize(
    ("by", "text"),
    [
        (lambda model: torch.optim.Adam(model.parameters()), "taken no step"),
        (lambda model: torch.optim.Adagrad(model.parameters()), "taken no step"),
        (lambda model: torch.optim.SGD(model.parameters()), "SGD has no diagonal preconditioner.*Adam, AdamW"),
        (lambda model: torch.optim.Adam(mlp(4, 5, 3).parameters()), "does not hold the parameter '0.weight'"),
        (lambda model: torch.zeros(43), "positive entries; a smallest entry of 0.0 came"),
        (lambda model: torch.ones(43, 2), "2 vectors came"),
        (lambda model: torch.ones(42), r"expected \[43\]"),
        (lambda model: 3.0, "float"),
    ],
    ids=["no step", "no step of Adagrad", "SGD", "another model", "zero", "two vectors", "shape", "number"],
)
def test_other_preconditioners_are_refused(case, by, text):
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches)
    with pytest.raises(TwofoldError, match=text):
        hessian.preconditioned(by(case.model))


def test_an_optimizer_with_another_state_is_refused(case):
    class Other(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["second"] = state.pop("exp_avg_sq")

    optimizer = Other(case.model.parameters())
    stepped(case, optimizer, 1)
    with pytest.raises(TwofoldError, match="keeps no 'exp_avg_sq'"):
        twofold.Hessian(case.model, case.loss_fn, case.batches).preconditioned(optimizer)


def test_a_parameter_without_a_gradient_is_named(case):
    case.model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    optimizer = torch.optim.Adam(case.model.parameters())
    case.loss_fn(case.model(case.batches[0][0]), case.batches[0][1]).backward()
    optimizer.step()
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches)
    with pytest.raises(TwofoldError, match="no state for 'unused'"):
        hessian.preconditioned(optimizer)
    assert hessian.block(["0.*", "2.*"]).preconditioned(optimizer).shape == (43, 43)
