"""Every operator against dense brute force, on every family of models; a new operator or model is one row."""

import numpy as np
import pytest
import torch
from torch import nn

import twofold
from models import CASES, classification, mlp
from references import dense, relative
from twofold import TwofoldError

OPERATORS = {"hessian": twofold.Hessian, "gauss_newton": twofold.GaussNewton, "nme": twofold.NME}

pytestmark = pytest.mark.usefixtures("float64")


def options(case):
    return {"forward": case.forward} if case.forward else {}


def data(case):
    return case.batches if len(case.batches) > 1 else case.batches[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", CASES)
def test_operators_equal_dense_brute_force(name):
    case = CASES[name]()
    reference = dense(case.model, case.loss_fn, case.batches, case.counts, forward=case.forward)
    c = twofold.Curvature(case.model, case.loss_fn, data(case), **options(case))
    identity = torch.eye(c.hessian.shape[0])
    together = dict(zip(OPERATORS, c.products(identity), strict=True))
    for part, operator in OPERATORS.items():
        expected = getattr(reference, part)
        # A half that vanishes (a linear model's NME) is compared with the scale of the whole.
        scale = expected.norm() if expected.norm() > 1e-12 * reference.hessian.norm() else reference.hessian.norm()
        alone = operator(case.model, case.loss_fn, data(case), **options(case)).to_dense()
        for found in (alone, together[part]):
            assert (found - expected).norm() <= 1e-9 * scale, part
            assert (found - found.T).norm() <= 1e-12 * scale, f"{part} is not symmetric"
        names = list(c.layout.shapes)
        for chosen in (names[::2], names[-1:]):
            block = getattr(c, part).block(chosen).to_dense()
            index = places(c, chosen)
            assert (block - expected[index][:, index]).norm() <= 1e-9 * scale, (part, chosen)


def in_single_precision(value):
    """The same nest of tensors, models and mappings with float32 in the place of float64."""
    if isinstance(value, dict):
        return {key: in_single_precision(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(in_single_precision, value))
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", CASES)
def test_float32_agrees_with_float64(name):
    case = CASES[name]()
    c = twofold.Curvature(case.model, case.loss_fn, data(case), **options(case))
    v = torch.randn(c.hessian.shape[0])
    exact = c.products(v)
    case.model.float()
    if isinstance(case.loss_fn, nn.Module):
        case.loss_fn.float()
    batches = in_single_precision(case.batches)
    c = twofold.Curvature(case.model, case.loss_fn, batches if len(batches) > 1 else batches[0], **options(case))
    for a, b in zip(c.products(v.float()), exact, strict=True):
        scale = b.norm() if b.norm() > 1e-12 * exact[0].norm() else exact[0].norm()
        assert (a.double() - b).norm() < 1e-4 * scale


def test_products_come_back_in_the_kind_that_went_in():
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches[0])
    v = torch.randn(c.hessian.shape[0], 3)
    columns = c.nme @ v
    assert columns.shape == v.shape
    torch.testing.assert_close(columns[:, 1], c.nme @ v[:, 1])
    named = c.nme @ c.layout.as_dict(v[:, 1])
    assert {n: p.shape for n, p in named.items()} == {n: p.shape for n, p in case.model.named_parameters()}
    torch.testing.assert_close(c.layout.from_dict(named), columns[:, 1])
    nme, gauss_newton = c.products(v[:, 0], parts=("nme", "gauss_newton"))
    torch.testing.assert_close(nme, columns[:, 0])
    torch.testing.assert_close(gauss_newton, c.gauss_newton @ v[:, 0])


def test_sums_and_multiples():
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches[0])
    expected = 2 * c.gauss_newton.to_dense() - c.nme.to_dense()
    combined = 2 * c.gauss_newton - c.nme
    torch.testing.assert_close(combined.to_dense(), expected)
    torch.testing.assert_close(combined.T @ torch.ones(combined.shape[0]), expected.sum(1))
    for two in (2, np.float32(2), torch.tensor(2.0)):
        for multiple in (two * c.hessian, c.hessian * two, c.hessian / (1 / two)):
            torch.testing.assert_close(multiple.to_dense(), 2 * c.hessian.to_dense())
    other = twofold.Hessian(case.model, case.loss_fn, case.batches[0], params="0.weight")
    with pytest.raises(TwofoldError, match="different parameters"):
        c.hessian + other


def test_scipy_sees_the_same_matrix():
    case = CASES["mlp"]()
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    scipy_operator, dense_matrix = hessian.to_scipy(), hessian.to_dense().numpy()
    v = np.random.default_rng(0).standard_normal((hessian.shape[0], 2))
    np.testing.assert_allclose(scipy_operator @ v, dense_matrix @ v, atol=1e-12)
    np.testing.assert_allclose(scipy_operator.rmatvec(v[:, 0]), dense_matrix @ v[:, 0], atol=1e-12)
    with pytest.raises(TwofoldError, match="complex"):
        scipy_operator @ (1j * v)


def test_scipy_takes_operators_of_bfloat16():
    case = classification(mlp(4, 5, 3).bfloat16())
    x, y = case.batches[0]
    hessian = twofold.Hessian(case.model, case.loss_fn, (x.bfloat16(), y))
    product = hessian.to_scipy() @ np.ones(43)
    assert product.dtype == np.float32
    np.testing.assert_array_equal(product, (hessian @ torch.ones(43, dtype=torch.bfloat16)).float().numpy())


def test_vectors_may_come_from_the_left():
    case = CASES["mlp"]()
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    v = torch.randn(2, hessian.shape[0])
    torch.testing.assert_close(v @ hessian, v @ hessian.to_dense())
    torch.testing.assert_close(v[0] @ hessian, v[0] @ hessian.to_dense())
    with pytest.raises(TwofoldError, match="from_numpy"):
        v.numpy() @ hessian


@pytest.mark.parametrize("params", ["0.weight", ["0.*", "4.bias"], "*.bias"])
def test_subsets_are_blocks_of_the_whole(params):
    model = mlp(4, 5, 4, 3)
    case = classification(model)
    part = twofold.Curvature(model, case.loss_fn, case.batches[0], params=params)
    whole = twofold.Curvature(model, case.loss_fn, case.batches[0])
    index = places(whole, part.layout.shapes)
    for name in OPERATORS:
        block = getattr(whole, name).to_dense()[index][:, index]
        torch.testing.assert_close(getattr(part, name).to_dense(), block)


def places(c, names):
    """Where the entries of the named parameters lie in a vector."""
    parts = c.layout.as_dict(torch.arange(c.layout.size))
    return torch.cat([part.reshape(-1) for name, part in parts.items() if name in names])


def test_frozen_parameters_are_left_out_unless_named():
    case = CASES["mlp"]()
    case.model[0].weight.requires_grad_(False)
    c = twofold.Curvature(case.model, case.loss_fn, case.batches[0])
    assert "0.weight" not in c.layout.shapes
    named = twofold.Hessian(case.model, case.loss_fn, case.batches[0], params="0.weight")
    assert named.shape == (20, 20)
    reference = dense(case.model, case.loss_fn, case.batches, case.counts, params={"0.weight"})
    assert relative(named.to_dense(), reference.hessian) < 1e-12
    assert not case.model[0].weight.requires_grad


def test_a_tied_parameter_has_either_name():
    case = CASES["tied"]()
    first = twofold.Hessian(case.model, case.loss_fn, case.batches[0], params="embed.weight")
    second = twofold.Hessian(case.model, case.loss_fn, case.batches[0], params="head.weight")
    assert torch.equal(first.to_dense(), second.to_dense())


def test_an_unused_parameter_has_zero_rows():
    model = mlp(4, 5, 3)
    model.register_parameter("unused", nn.Parameter(torch.randn(2)))
    case = classification(model)
    H = twofold.Hessian(model, case.loss_fn, case.batches[0]).to_dense()
    assert not H[:2].any()
    assert not H[:, :2].any()
    assert H[2:, 2:].norm() > 0


def test_several_output_tensors_are_differentiated_together():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.spread = mlp(4, 5, 5), nn.Linear(5, 1), nn.Linear(5, 1)

        def forward(self, x):
            h = self.body(x)
            return {"mean": self.mean(h), "log_var": self.spread(h), "kind": "gaussian"}

    def loss_fn(z, y):
        return (0.5 * (z["mean"] - y) ** 2 * torch.exp(-z["log_var"]) + 0.5 * z["log_var"]).mean()

    model, x, y = TwoHeads(), torch.randn(6, 4), torch.randn(6, 1)

    def stacked(m, batch):
        z = m(batch[0])
        return torch.cat([z["mean"], z["log_var"]], 1), batch[1]

    reference = dense(
        model, lambda z, t: loss_fn({"mean": z[:, :1], "log_var": z[:, 1:]}, t), [(x, y)], [6.0], forward=stacked
    )
    c = twofold.Curvature(model, loss_fn, (x, y))
    assert relative(c.hessian.to_dense(), reference.hessian) < 1e-12
    assert relative(c.gauss_newton.to_dense(), reference.gauss_newton) < 1e-12
    assert relative(c.nme.to_dense(), reference.nme) < 1e-12


def test_a_loss_may_work_in_place():
    model, batch = mlp(4, 5, 3), (torch.randn(6, 4), torch.randn(6, 3))
    c = twofold.Curvature(model, lambda z, y: (z - y).pow(4).sum(1).mean(), batch)
    overwriting = twofold.Curvature(model, lambda z, y: z.sub_(y).pow(4).sum(1).mean(), batch)
    for expected, found in zip(c.products(torch.ones(43)), overwriting.products(torch.ones(43)), strict=True):
        torch.testing.assert_close(found, expected)


def test_loss_and_gradient_are_those_of_the_whole_set():
    case = CASES["ragged"]()
    x, y = (torch.cat(t) for t in zip(*case.batches, strict=True))
    value = case.loss_fn(case.model(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(case.model.parameters()))])
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    assert c.loss() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(c.gradient(), gradient)


def test_memory_changes_no_result():
    case = CASES["ragged"]()
    v = torch.randn(43)
    kept = twofold.Curvature(case.model, case.loss_fn, case.batches)
    for memory in (0, 2000):
        rebuilt = twofold.Curvature(case.model, case.loss_fn, case.batches, memory=memory)
        for _ in range(2):
            for a, b in zip(rebuilt.products(v), kept.products(v), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("vector", "text"),
    [
        (torch.ones(7), r"shape \(7,\); expected \[43\]"),
        (torch.ones(43, 1, 1), "shape"),
        (torch.full((43,), float("nan")), "NaN"),
        (torch.ones(43, dtype=torch.long), "int64"),
        ({"0.weight": torch.ones(5, 4)}, "missing"),
        ([1.0] * 43, "expected a tensor"),
        (np.ones(43), r"from_numpy.*to_scipy"),
    ],
)
def test_bad_vectors_are_refused(vector, text):
    case = classification(mlp(4, 5, 3))
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    for multiply in (hessian.__matmul__, hessian.matvec, hessian.__rmatmul__):
        with pytest.raises(TwofoldError, match=text):
            multiply(vector)


def test_a_vector_that_would_lose_precision_is_refused():
    case = classification(mlp(4, 5, 3).float())
    x, y = case.batches[0]
    hessian = twofold.Hessian(case.model, case.loss_fn, (x.float(), y))
    with pytest.raises(TwofoldError, match="float64"):
        hessian @ torch.ones(43, dtype=torch.float64)
