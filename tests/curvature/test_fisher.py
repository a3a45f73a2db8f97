"""Fisher matrices against sums over terms that are written out, and against GN in expectation."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import CASES, Case, classification, mlp
from references import as_function, jacobian_of, relative
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")

WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def empirical(case, terms, weights):
    """sum_n w_n g_n g_n' with g_n from torch.func, for terms(z, y) -> losses and weights(z, y) -> w, flat."""
    theta, outputs = as_function(case.model, **({"forward": case.forward} if case.forward else {}))
    total = torch.zeros(len(theta), len(theta))
    for batch, count in zip(case.batches, case.counts or [1.0] * len(case.batches), strict=True):
        z, y = outputs(theta, batch)
        of_terms = torch.func.jacrev(lambda q, s=z.shape, t=y: terms(q.view(s), t).flatten())(z.detach().flatten())
        G = of_terms @ jacobian_of(outputs, theta, batch)
        total += count * G.T @ (weights(z, y).flatten()[:, None] * G)
    return total / (sum(case.counts) if case.counts else 1)


def data(case):
    return case.batches if len(case.batches) > 1 else case.batches[0]


FAMILIES = [name for name, make in CASES.items() if make().loss_fn is F.cross_entropy and name != "ignore_index"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", FAMILIES)
def test_empirical_fisher_of_every_family(name):
    case = CASES[name]()
    expected = empirical(
        case, partial(F.cross_entropy, reduction="none"), lambda z, y: torch.full(y.shape, 1 / y.numel())
    )
    options = {"forward": case.forward} if case.forward else {}
    fisher = twofold.Fisher(case.model, case.loss_fn, data(case), kind="empirical", **options)
    found = fisher.to_dense()
    assert (found - expected).norm() <= 1e-9 * expected.norm()
    parts = fisher.layout.as_dict(torch.arange(fisher.shape[0]))
    index = torch.cat([part.flatten() for part in list(parts.values())[-2:]])
    block = fisher.block(list(parts)[-2:]).to_dense()
    assert (block - expected[index][:, index]).norm() <= 1e-9 * expected.norm()


def class_weights():
    case = classification(mlp(4, 5, 3), sizes=(7, 3), loss_fn=nn.CrossEntropyLoss(weight=WEIGHTS))
    case.batches[1][1][0] = -100
    case.counts = [WEIGHTS[y[y >= 0]].sum().item() for _, y in case.batches]
    return (
        case,
        partial(F.cross_entropy, reduction="none"),
        lambda z, y: torch.where(y >= 0, WEIGHTS[y.clamp(0)], 0.0) / WEIGHTS[y[y >= 0]].sum(),
    )


def negative_log_likelihood():
    case, _, weights = class_weights()
    case.model.append(nn.LogSoftmax(1))
    case.loss_fn = nn.NLLLoss(weight=WEIGHTS)
    return case, lambda z, y: F.nll_loss(z, y, reduction="none"), weights


def binary(reduction):
    positive = torch.tensor([1.0, 3.0, 0.5])
    loss_fn = nn.BCEWithLogitsLoss(pos_weight=positive, reduction=reduction)
    case = Case(mlp(4, 5, 3), loss_fn, [(torch.randn(n, 4), torch.randint(2, (n, 3)).double()) for n in (5, 2)], None)
    case.counts = [15.0, 6.0] if reduction == "mean" else None
    return (
        case,
        partial(F.binary_cross_entropy_with_logits, reduction="none"),
        lambda z, y: torch.where(y == 1, positive, 1.0) / (y.numel() if reduction == "mean" else 1),
    )


def squares():
    case = Case(mlp(4, 5, 3), nn.MSELoss(), [(torch.randn(n, 4), torch.randn(n, 3)) for n in (5, 2)], [15.0, 6.0])
    return case, lambda z, y: (z - y) ** 2, lambda z, y: torch.full(z.shape, 1 / z.numel())


def huber():
    case, _, weights = squares()
    case.loss_fn = nn.HuberLoss(delta=0.3)
    return case, partial(F.huber_loss, delta=0.3, reduction="none"), weights


def rows():
    def terms(z, y):
        return torch.log(torch.cosh(z - y)).sum(1) + z.sum(1) ** 2

    case, _, _ = squares()
    case.loss_fn, case.counts = lambda z, y: terms(z, y).mean(), [5.0, 2.0]
    return case, terms, lambda z, y: torch.full((len(z),), 1 / len(z))


def segmentation():
    case = CASES["segmentation"]()
    return (
        case,
        partial(F.cross_entropy, reduction="none"),
        lambda z, y: (y >= 0).double() / (y >= 0).sum(),
    )


LOSSES = {
    "class weights and ignored labels": class_weights,
    "NLL": negative_log_likelihood,
    "BCE with pos_weight": lambda: binary("mean"),
    "BCE summed": lambda: binary("sum"),
    "MSE": squares,
    "Huber": huber,
    "rows of a loss of one's own": rows,
    "segmentation": segmentation,
}


@pytest.mark.parametrize("name", LOSSES)
def test_empirical_fisher_has_the_losses_own_terms_and_weights(name):
    case, terms, weights = LOSSES[name]()
    found = twofold.Fisher(case.model, case.loss_fn, case.batches, kind="empirical").to_dense()
    assert relative(found, empirical(case, terms, weights)) < 1e-12


def test_rows_of_several_output_tensors_are_one_term():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.spread = nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x):
            return self.mean(x), self.spread(x)[:, 0]

    def terms(z, y):
        return ((z[0] - y) ** 2 * torch.exp(-z[1])[:, None]).sum(1) + z[1]

    model, x, y = TwoHeads(), torch.randn(6, 4), torch.randn(6, 2)
    gradients = [torch.autograd.grad(term, list(model.parameters()), retain_graph=True) for term in terms(model(x), y)]
    G = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in gradients])
    fisher = twofold.Fisher(model, lambda z, t: terms(z, t).mean(), (x, y), kind="empirical")
    assert relative(fisher.to_dense(), G.T @ G / 6) < 1e-12
    with pytest.raises(TwofoldError, match="3 and 6 rows"):
        twofold.Fisher(model, lambda z, t: z[0].mean() + z[1].mean(), (x, y), kind="empirical", forward=uneven) @ (
            torch.ones(15)
        )


def uneven(model, batch):
    mean, spread = model(batch[0])
    return (mean, spread[:3]), batch[1]


def test_mean_over_all_labels_is_gauss_newton(monkeypatch):
    loss_fn = nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1)
    case = classification(mlp(4, 3), n=3, sizes=(3,), loss_fn=loss_fn)
    x, y = case.batches[0]
    y[0] = -100
    probabilities = case.model(x).softmax(1).detach()
    mean = 0
    for labels in itertools.product(range(3), repeat=3):
        chosen = torch.tensor(labels)
        monkeypatch.setattr(torch, "multinomial", lambda rows, n, generator, drawn=chosen: drawn[:, None])
        probability = probabilities[range(3), chosen].prod()
        mean += probability * twofold.Fisher(case.model, loss_fn, (x, y)).to_dense()
    assert relative(mean, twofold.GaussNewton(case.model, loss_fn, (x, y)).to_dense()) < 1e-12


def test_drawn_labels_make_the_sum_over_terms(monkeypatch):
    case, terms, weights = class_weights()
    drawn = []
    original = torch.multinomial

    def multinomial(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", multinomial)
    fisher = twofold.Fisher(case.model, case.loss_fn, case.batches, num_samples=2)
    found = fisher.to_dense()
    assert len(drawn) == 4, "labels are drawn once for each batch and sample"
    expected = 0
    for sample in range(2):
        of_batches = [drawn[sample][:, 0], drawn[2 + sample][:, 0]]
        # The weights are those of the data's labels, the gradients those of the drawn ones.
        targets = [torch.stack([y, labels]) for (_, y), labels in zip(case.batches, of_batches, strict=True)]
        relabelled = Case(
            case.model, None, [(x, t) for (x, _), t in zip(case.batches, targets, strict=True)], case.counts
        )
        expected += 0.5 * empirical(relabelled, lambda z, t: terms(z, t[1]), lambda z, t: weights(z, t[0]))
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("name", ["class weights and ignored labels", "BCE with pos_weight", "MSE", "segmentation"])
def test_mean_over_many_labels_tends_to_gauss_newton(name):
    case, _, _ = LOSSES[name]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(c.layout.size, generator=generator)
    forms = torch.stack([v @ (c.fisher(generator=generator) @ v) for _ in range(400)])
    expected = v @ (c.gauss_newton @ v)
    assert abs(forms.mean() - expected) < 4 * forms.std() / 20
    many = v @ (c.fisher(num_samples=400) @ v)
    assert abs(many - expected) < 4 * forms.std() / 20


def test_labels_are_fixed_at_construction():
    case = classification(mlp(4, 5, 3), sizes=(4, 3, 3))

    def fisher(generator, **options):
        return twofold.Fisher(case.model, case.loss_fn, case.batches, generator=generator, **options)

    v, generator = torch.randn(43), torch.Generator().manual_seed(3)
    kept = fisher(generator)
    state = torch.get_rng_state()
    first = kept @ v
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    reread = fisher(torch.Generator().manual_seed(3), memory=0)
    for again in (kept, reread, reread, kept):
        assert torch.equal(again @ v, first)
    assert relative(fisher(generator) @ v, first) > 1e-3, "each operator draws labels of its own"
    with torch.no_grad():
        case.model[0].weight.mul_(1.1)
    assert torch.equal(kept @ v, reread @ v)
    assert relative(kept @ v, first) > 1e-3


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_callers_context_changes_nothing(context):
    case = classification(mlp(4, 5, 3).float())
    x, y = case.batches[0]
    c = twofold.Curvature(case.model, case.loss_fn, (x.float(), y))
    operators = (c.fisher(), c.fisher("empirical"), c.jacobian, c.hessian.block("*"), c.fisher().block("*"))
    products = [operator @ torch.ones(43, dtype=torch.float32) for operator in operators]
    with context():
        fresh = twofold.Curvature(case.model, case.loss_fn, (x.float(), y))
        operators = (
            *(fresh.fisher(), fresh.fisher("empirical"), fresh.jacobian),
            *(fresh.hessian.block("*"), fresh.fisher().block("*")),
        )
        for operator, product in zip(operators, products, strict=True):
            assert torch.equal(operator @ torch.ones(43, dtype=torch.float32), product)


@pytest.mark.parametrize("name", ["class weights and ignored labels", "BCE with pos_weight", "MSE"])
def test_empirical_fisher_in_microbatches_is_the_same(name):
    case, _, _ = LOSSES[name]()
    whole, pieces = (
        twofold.Fisher(case.model, case.loss_fn, case.batches, kind="empirical", microbatches=m) for m in (1, 3)
    )
    assert relative(pieces.to_dense(), whole.to_dense()) < 1e-12


def test_it_is_an_operator_like_the_others():
    case = classification(mlp(4, 5, 3))
    c = twofold.Curvature(case.model, case.loss_fn, case.batches[0])
    difference = c.gauss_newton - c.fisher(num_samples=3)
    dense = c.gauss_newton.to_dense() - c.fisher(num_samples=3).to_dense()
    torch.testing.assert_close(difference.to_dense(), dense)
    assert relative(difference.block("0.*").to_dense(), dense[:25, :25]) < 1e-12
    assert twofold.eigsh(c.fisher("empirical"), k=1, which="SA").values.item() > -1e-12
    assert isinstance(c.fisher().block("0.*"), twofold.Fisher)


def test_what_cannot_be_is_refused():
    case, _, _ = rows()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    with pytest.raises(TwofoldError, match="kind='empirical'"):
        c.fisher() @ torch.ones(43)
    with pytest.raises(TwofoldError, match='"mc" or "empirical"'):
        c.fisher("true")
    with pytest.raises(TwofoldError, match="num_samples must be a positive integer"):
        c.fisher(num_samples=0)
    x = torch.randn(5, 4)
    with pytest.raises(TwofoldError, match="broadcasts"):
        twofold.Fisher(mlp(4, 1), nn.L1Loss(), (x, torch.randn(5, 3)), kind="empirical") @ torch.ones(5)
