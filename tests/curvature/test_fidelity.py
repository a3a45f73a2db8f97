"""rho C g^ against SAM's correction: dense references, the limit rho -> 0, phi'' by context, and no trace left."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from curvature.test_no_trace import Moody, fingerprint, same
from models import CASES, classification, mlp
from references import dense
from twofold import TwofoldError, fidelity

pytestmark = pytest.mark.usefixtures("float64")


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradient(case, step=None):
    """Of the whole set, at moved weights, by plain autograd on a copy."""
    model = copy.deepcopy(case.model)
    weights = list(model.parameters())
    if step is not None:
        with torch.no_grad():
            for weight, move in zip(weights, step.split([w.numel() for w in weights]), strict=True):
                weight.add_(move.view_as(weight))
    losses = []
    for batch in case.batches:
        z, y = case.forward(model, batch) if case.forward else (model(batch[0]), batch[1])
        losses.append(case.loss_fn(z, y))
    counts = torch.tensor(case.counts or [1.0] * len(losses))
    total = (torch.stack(losses) * counts).sum() / (counts.sum() if case.counts else 1.0)
    return flat(torch.autograd.grad(total, weights, materialize_grads=True))


def measured(prediction, correction):
    cosine = prediction @ correction / (prediction.norm() * correction.norm())
    return cosine.item(), ((prediction - correction).norm() / correction.norm()).item()


@pytest.mark.parametrize(
    "name", ["mlp", "ragged", "sum", "conv BatchNorm eval", "conv BatchNorm train", "LayerNorm and attention", "tied"]
)
def test_agrees_with_dense_matrices(name):
    case = CASES[name]()
    matrices = dense(case.model, case.loss_fn, case.batches, case.counts, forward=case.forward)
    g = gradient(case)
    data = case.batches if len(case.batches) > 1 else case.batches[0]
    found = fidelity(case.model, case.loss_fn, data, (0.2, 0.01), forward=case.forward)
    assert found.gradient_norm == pytest.approx(g.norm().item(), rel=1e-9)
    for i, rho in enumerate(found.rhos):
        correction = gradient(case, rho * g / g.norm()) - g
        assert found.correction_norms[i] == pytest.approx(correction.norm().item(), rel=1e-7)
        for matrix in ("hessian", "gauss_newton", "nme"):
            expected = measured(rho * getattr(matrices, matrix) @ g / g.norm(), correction)
            came = (found.cosine[matrix][i], found.relative_error[matrix][i])
            assert came == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_error_of_the_hessian_vanishes_with_rho_and_no_other_does():
    model, batch = mlp(4, 8, 8, 3), (torch.randn(16, 4), torch.randint(3, (16,)))
    found = fidelity(model, F.cross_entropy, batch, (4e-3, 2e-3, 1e-3))
    errors = found.relative_error["hessian"]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)
    assert all(min(found.relative_error[name]) > 20 * errors[0] for name in found.cosine if name != "hessian")


def test_on_a_quadratic_loss_the_hessian_is_exact_at_any_rho():
    found = fidelity(nn.Linear(4, 3), F.mse_loss, (torch.randn(16, 4), torch.randn(16, 3)), (0.1, 10.0))
    for name in ("hessian", "gauss_newton", "hessian_without_activation_nme"):
        assert max(found.relative_error[name]) < 1e-12
        assert min(found.cosine[name]) == pytest.approx(1)
    assert all(map(math.isnan, found.cosine["nme"]))
    assert found.relative_error["nme"] == (1.0, 1.0)


def test_phi2_of_zero_is_gauss_newton_and_the_rest():
    model, batch = mlp(4, 8, 8, 3), (torch.randn(16, 4), torch.randint(3, (16,)))
    c = twofold.Curvature(model, F.cross_entropy, batch)
    g = c.gradient()
    gn, rest = c.products(g / g.norm(), parts=("gauss_newton", "rest"))
    case = classification(model)
    case.batches = [batch]
    found = fidelity(model, F.cross_entropy, batch, 0.05)
    expected = measured(0.05 * (gn + rest), gradient(case, 0.05 * g / g.norm()) - g)
    name = "hessian_without_activation_nme"
    assert (found.cosine[name][0], found.relative_error[name][0]) == pytest.approx(expected, rel=1e-6)


class SoftReLU(torch.autograd.Function):
    """ReLU whose slope is differentiated as an error function: phi'' = n(x)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        smooth = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return u * (smooth + ((x > 0).to(x) - smooth).detach())


class Soft(nn.Module):
    def forward(self, x):
        return SoftReLU.apply(x)


def test_a_synthetic_phi2_changes_the_prediction_and_not_the_correction():
    model, batch = mlp(4, 8, 3, act=nn.ReLU), (torch.randn(16, 4), torch.randint(3, (16,)))
    synthetic = twofold.second_derivative(twofold.gaussian(beta=1), of="relu")
    found = fidelity(
        model, F.cross_entropy, batch, 0.05, curvatures={"as it is": "hessian", "synthetic": synthetic, "GN": "rest"}
    )
    plain = fidelity(model, F.cross_entropy, batch, 0.05, curvatures="hessian")
    assert found.correction_norms == plain.correction_norms
    assert found.cosine["as it is"] == pytest.approx(plain.cosine["hessian"])
    soft = copy.deepcopy(model)
    soft[1] = Soft()
    expected = fidelity(soft, F.cross_entropy, batch, 0.05, curvatures=["hessian"])
    assert found.cosine["synthetic"][0] == pytest.approx(expected.cosine["hessian"][0])
    assert found.relative_error["synthetic"][0] == pytest.approx(expected.relative_error["hessian"][0])
    assert found.cosine["synthetic"] != found.cosine["as it is"]
    with twofold.second_derivative(twofold.gaussian(beta=1), of="relu"):
        around = fidelity(model, F.cross_entropy, batch, 0.05, curvatures=["hessian"])
    assert around.cosine["hessian"] == pytest.approx(found.cosine["synthetic"])


def test_all_passes_see_the_same_dropout_masks():
    model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 3)).train()
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
    assert fidelity(model, F.cross_entropy, batches, 1e-4).relative_error["hessian"][0] < 1e-3


def test_chosen_parameters_alone_are_moved():
    model, batch = mlp(4, 8, 3), (torch.randn(16, 4), torch.randint(3, (16,)))
    found = fidelity(model, F.cross_entropy, batch, 0.1, params="2.*")
    c = twofold.Curvature(model, F.cross_entropy, batch, params="2.*")
    assert found.gradient_norm == pytest.approx(c.gradient().norm().item())
    assert found.cosine["hessian"] == pytest.approx(found.cosine["gauss_newton"])  # linear in the last layer
    assert math.isnan(found.cosine["nme"][0])


def test_pieces_of_a_batch_add_up():
    model, batch = mlp(4, 8, 3), (torch.randn(16, 4), torch.randint(3, (16,)))
    whole = fidelity(model, F.cross_entropy, batch, 0.1)
    pieces = fidelity(model, F.cross_entropy, batch, 0.1, microbatches=3)
    assert pieces.metrics() == pytest.approx(whole.metrics())


@pytest.mark.parametrize("mode", [None, "train", "eval"])
def test_it_leaves_no_trace(mode):
    case = classification(Moody(), (1, 2, 2))
    case.model.body[0].weight.requires_grad_(False)
    case.model.body[3].bias.grad = torch.ones(2)
    before = fingerprint(case.model)
    fidelity(case.model, case.loss_fn, case.batches[0], (0.1, 0.2), mode=mode)
    assert same(before, fingerprint(case.model))


def test_what_is_not_there_to_predict_is_nan():
    model, x = mlp(4, 6, 3), torch.randn(8, 4)
    at_rest = fidelity(model, F.mse_loss, (x, model(x).detach()), 0.1)
    assert at_rest.gradient_norm == 0
    assert math.isnan(at_rest.cosine["hessian"][0])
    overflown = fidelity(model, F.mse_loss, (x, torch.randn(8, 3)), 1e300)
    assert math.isnan(overflown.relative_error["hessian"][0])


def test_the_result_prints_and_goes_to_json_and_loggers():
    model, batch = mlp(4, 8, 3), (torch.randn(16, 4), torch.randint(3, (16,)))
    one, two = fidelity(model, F.cross_entropy, batch, 0.1), fidelity(model, F.cross_entropy, batch, [0.1, 0.2])
    assert one.metrics()["fidelity/gauss_newton/cosine"] == one.cosine["gauss_newton"][0]
    assert two.metrics()["fidelity/nme/relative_error/rho=0.2"] == two.relative_error["nme"][1]
    assert len(two.metrics()) == 16
    text = str(two)
    assert all(name in text for name in two.cosine)
    assert f"{two.cosine['gauss_newton'][1]:.3f}" in text
    assert json.loads(json.dumps(two.to_dict()))["cosine"]["nme"] == list(two.cosine["nme"])


@pytest.mark.parametrize("rho", [0, -0.1, float("nan"), float("inf"), "0.1", True, None, [], [0.1, 0]])
def test_a_rho_that_makes_no_sense_is_refused(rho):
    with pytest.raises(TwofoldError, match="rho must be a positive"):
        fidelity(mlp(4, 3), F.cross_entropy, (torch.randn(2, 4), torch.randint(3, (2,))), rho)


@pytest.mark.parametrize("curvatures", ["fisher", {"mine": 0}, [], {"h": "Hessian"}])
def test_a_curvature_that_is_not_known_is_refused(curvatures):
    with pytest.raises(TwofoldError, match="curvatures"):
        fidelity(mlp(4, 3), F.cross_entropy, (torch.randn(2, 4), torch.randint(3, (2,))), 0.1, curvatures=curvatures)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_refused(dtype):
    batch = (torch.randn(8, 4, dtype=dtype), torch.arange(8) % 3)
    with pytest.raises(TwofoldError, match=r"fidelity cannot be measured.*half precision"):
        fidelity(mlp(4, 6, 3).to(dtype), F.cross_entropy, batch, 0.1)
