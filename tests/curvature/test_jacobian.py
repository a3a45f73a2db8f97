"""J and J' against dense brute force, on every family of models."""

import numpy as np
import pytest
import torch
from torch import nn

import twofold
from models import CASES, classification, mlp
from references import as_function, jacobian_of, relative
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", CASES)
def test_jacobian_equals_dense_brute_force(name):
    case = CASES[name]()
    options = {"forward": case.forward} if case.forward else {}
    theta, outputs = as_function(case.model, **options)
    expected = torch.cat([jacobian_of(outputs, theta, batch) for batch in case.batches])
    data = case.batches if len(case.batches) > 1 else case.batches[0]
    jacobian = twofold.Jacobian(case.model, case.loss_fn, data, **options)
    assert jacobian.shape == expected.shape
    v, u = torch.randn(expected.shape[1], 2), torch.randn(expected.shape[0], 2)
    assert relative(jacobian.to_dense(), expected) < 1e-9
    assert relative(jacobian @ v, expected @ v) < 1e-9
    assert relative(jacobian.T @ u, expected.T @ u) < 1e-9


@pytest.fixture
def case():
    return classification(mlp(4, 5, 3), sizes=(7, 3))


def test_products_come_in_every_form(case):
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    jacobian, dense = c.jacobian, c.jacobian.to_dense()
    v, u = torch.randn(43), torch.randn(30)
    for product in (jacobian @ v, jacobian.matvec(v), jacobian @ c.layout.as_dict(v), v @ jacobian.T):
        torch.testing.assert_close(product, dense @ v)
    for product in (jacobian.T @ u, jacobian.rmatvec(u), u @ jacobian, jacobian.T.T.rmatmat(u[:, None])[:, 0]):
        torch.testing.assert_close(product, dense.T @ u)
    named = c.layout.as_dict(jacobian.T @ u)
    assert {name: part.shape for name, part in named.items()} == c.layout.shapes
    torch.testing.assert_close(jacobian.T.to_dense(), dense.T)


@pytest.mark.parametrize("widths", [(4, 5, 3), (1, 1, 3)], ids=["wide", "tall"])
def test_dense_goes_by_the_shorter_side(widths):
    case = classification(mlp(*widths), (widths[0],), sizes=(7, 3))
    jacobian = twofold.Jacobian(case.model, case.loss_fn, case.batches)
    columns = torch.stack([jacobian @ e for e in torch.eye(jacobian.shape[1])], 1)
    for chunk in (1, 64):
        torch.testing.assert_close(jacobian.to_dense(chunk=chunk), columns)


def test_gauss_newton_is_made_of_it(case):
    c = twofold.Curvature(case.model, nn.MSELoss(), [(x, torch.randn(len(x), 3)) for x, _ in case.batches])
    v = torch.randn(43)
    torch.testing.assert_close(c.gauss_newton @ v, c.jacobian.T @ (c.jacobian @ v) * 2 / 30)


def test_outputs_of_ignored_batches_and_of_several_tensors_count():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return {"a": self.a(x), "label": 3, "b": self.b(x)}

    model, x = TwoHeads(), torch.randn(6, 4)
    jacobian = twofold.Jacobian(
        model, lambda z, _: z["a"].sum(1).mean(), [(x[:4], None), (x[4:], None)], weight=lambda z, _: len(z["a"]) == 4
    )
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    # The model is linear in its parameters, so that J v is the model at v.
    heads = [torch.func.functional_call(model, v, (rows,)) for rows in (x[:4], x[4:])]
    expected = torch.cat([head[name].flatten() for head in heads for name in ("a", "b")])
    assert jacobian.shape == (len(expected), 22)
    torch.testing.assert_close(jacobian @ v, expected.detach())


def test_memory_changes_no_result(case):
    kept = twofold.Jacobian(case.model, case.loss_fn, case.batches)
    rebuilt = twofold.Jacobian(case.model, case.loss_fn, case.batches, memory=0, params="*.weight")
    u = torch.randn(30)
    named, fewer = kept.layout.as_dict(kept.T @ u), rebuilt.layout.as_dict(rebuilt.T @ u)
    assert list(fewer) == ["0.weight", "2.weight"]
    for name, part in fewer.items():
        torch.testing.assert_close(part, named[name])


def test_microbatches_change_no_result(case):
    whole = twofold.Jacobian(case.model, case.loss_fn, case.batches)
    pieces = twofold.Jacobian(case.model, case.loss_fn, case.batches, microbatches=3)
    assert relative(pieces.to_dense(), whole.to_dense()) < 1e-12


def test_scipy_sees_the_same_matrix(case):
    jacobian = twofold.Jacobian(case.model, case.loss_fn, case.batches)
    operator, dense = jacobian.to_scipy(), jacobian.to_dense().numpy()
    v, u = np.ones((43, 2)), np.ones(30)
    np.testing.assert_allclose(operator @ v, dense @ v, atol=1e-12)
    np.testing.assert_allclose(operator.rmatvec(u), dense.T @ u, atol=1e-12)
    np.testing.assert_allclose(operator.T @ u, dense.T @ u, atol=1e-12)


@pytest.mark.parametrize(
    ("u", "text"),
    [
        (torch.ones(43), r"u has shape \(43,\); expected \[30\]"),
        (torch.full((30,), torch.inf), "u has entries that are NaN or infinite"),
        (torch.ones(30, dtype=torch.long), "u is torch.int64"),
        (np.ones(30), "from_numpy"),
    ],
    ids=["shape", "infinite", "integers", "array"],
)
def test_bad_vectors_are_refused(case, u, text):
    jacobian = twofold.Jacobian(case.model, case.loss_fn, case.batches)
    with pytest.raises(TwofoldError, match=text):
        jacobian.T @ u
    with pytest.raises(TwofoldError, match="expected"):
        jacobian @ torch.ones(30)
