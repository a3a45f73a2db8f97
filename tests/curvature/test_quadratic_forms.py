import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import CASES, classification, mlp
from references import dense
from twofold import Curvature
from twofold.errors import TwofoldError, TwofoldWarning

PARTS = ("hessian", "gauss_newton", "nme", "activation_nme", "rest")

pytestmark = pytest.mark.usefixtures("float64")


def vectors_for(c, k=2):
    return torch.randn(c.hessian.shape[0], k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::twofold.errors.TwofoldWarning")
@pytest.mark.parametrize("name", CASES)
def test_forms_are_those_of_the_dense_matrices_and_of_the_products_on_every_model(name):
    case = CASES[name]()
    c = Curvature(case.model, case.loss_fn, case.batches, forward=case.forward)
    v = vectors_for(c)
    halves, every = c.quadratic_forms(v), c.quadratic_forms(v, PARTS)
    assert c.path == "jets"
    reference = dense(case.model, case.loss_fn, case.batches, case.counts, forward=case.forward)
    scale = reference.hessian.norm() * v.square().sum(0).max()
    for part in halves:
        expected = torch.einsum("ik,ij,jk->k", v, getattr(reference, part), v)
        assert (halves[part] - expected).abs().max() < 1e-9 * scale
        assert (every[part] - expected).abs().max() < 1e-9 * scale
    for part, product in zip(PARTS, c.products(v, PARTS), strict=True):
        assert (every[part] - (v * product).sum(0)).abs().max() < 1e-9 * scale


class Unknown(nn.Module):
    """torch.cumprod, which jets do not know."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).cumprod(1))


class Straight(torch.autograd.Function):
    """Its own second derivative is not that of what it computes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x


class Custom(nn.Sequential):
    def forward(self, x):
        return self[1](Straight.apply(self[0](x)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Unknown, "cumprod"), (lambda: Custom(nn.Linear(4, 3), nn.Linear(3, 3)), "an operation that torch's overrides")],
    ids=["unknown operation", "custom function"],
)
def test_an_operation_that_jets_do_not_know_is_left_to_the_recorded_graph(model, reason):
    case = classification(model(), sizes=(7, 3))
    c = Curvature(case.model, case.loss_fn, case.batches)
    v = vectors_for(c)
    forms = c.quadratic_forms(v, PARTS)
    assert c.path.startswith("recorded graph")
    assert reason in c.path
    for part, product in zip(PARTS, c.products(v, PARTS), strict=True):
        torch.testing.assert_close(forms[part], (v * product).sum(0))
    assert c.traces(4)["hessian"].value == pytest.approx(
        sum(sum(e.value for e in of.values()) for of in [c.traces(4, by_block=True)["hessian"]])
    )


def test_traces_by_jets_are_those_of_the_products():
    case = CASES["conv BatchNorm train"]()
    c = Curvature(case.model, case.loss_fn, case.batches)
    traces, blocks = c.traces(5, parts=PARTS), c.traces(5, parts=PARTS, by_block=True)
    for part in PARTS:
        assert traces[part].value == pytest.approx(sum(e.value for e in blocks[part].values()), rel=1e-9, abs=1e-12)
        assert traces[part].num_matvecs == 5


def test_dropout_masks_are_those_of_the_products_in_every_batch():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))
    case = classification(model, sizes=(4, 4, 2))
    by_jets_first, by_products_first = (Curvature(case.model, case.loss_fn, case.batches, memory=0) for _ in range(2))
    v = vectors_for(by_jets_first, 1)
    (product,) = by_products_first.products(v, parts=("hessian",))
    for c in (by_jets_first, by_products_first):
        torch.testing.assert_close(c.quadratic_forms(v)["hessian"], (v * product).sum(0))
        torch.testing.assert_close(c.products(v, parts=("hessian",))[0], product)


def test_a_changed_model_gives_changed_forms():
    case = CASES["mlp"]()
    c = Curvature(case.model, case.loss_fn, case.batches)
    v = vectors_for(c)
    before = c.quadratic_forms(v)["hessian"]
    with torch.no_grad():
        case.model[0].weight.mul_(1.5)
    after = c.quadratic_forms(v)["hessian"]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, (v * c.products(v)[0]).sum(0))


def test_forms_leave_no_trace():
    case = CASES["conv BatchNorm train"]()
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    attributes = [set(p.__dict__) for p in case.model.parameters()]
    random = torch.get_rng_state()
    c = Curvature(case.model, case.loss_fn, case.batches)
    c.quadratic_forms(vectors_for(c), PARTS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.model.state_dict().items())
    assert [set(p.__dict__) for p in case.model.parameters()] == attributes
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_some_parameters_only_and_forms_in_eval_mode():
    case = CASES["conv BatchNorm train"]()
    c = Curvature(case.model, case.loss_fn, case.batches, params="*.weight", mode="eval")
    v = vectors_for(c)
    torch.testing.assert_close(c.quadratic_forms(v)["nme"], (v * c.products(v)[2]).sum(0))
    assert c.path == "jets"
    assert case.model.training


def test_a_fused_kernel_is_named_where_its_activations_are_missed():
    case = CASES["LSTM"]()
    c = Curvature(case.model, case.loss_fn, case.batches)
    with pytest.warns(TwofoldWarning, match="lstm"):
        forms = c.quadratic_forms(vectors_for(c), ("activation_nme",))
    assert torch.equal(forms["activation_nme"], torch.zeros(2))


def test_what_is_no_number_is_refused_and_nan_losses_are_named():
    case = CASES["mlp"]()
    c = Curvature(case.model, case.loss_fn, case.batches)
    with pytest.raises(TwofoldError, match="shape"):
        c.quadratic_forms(torch.randn(3))
    with pytest.raises(TwofoldError, match="parts"):
        c.quadratic_forms(vectors_for(c), ("fisher",))
    bad = Curvature(mlp(4, 3), F.cross_entropy, (torch.full((2, 4), float("nan")), torch.tensor([0, 1])))
    with pytest.raises(TwofoldError, match="nan"):
        bad.quadratic_forms(vectors_for(bad))
