"""What a loss says of itself: counts, H_z, residuals; each against torch's own loss."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from twofold import TwofoldError
from twofold.curvature.losses import Loss
from twofold.curvature.torch_losses import as_loss

pytestmark = pytest.mark.usefixtures("float64")

WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def hard(shape):
    y = torch.randint(3, shape)
    y.view(-1)[0] = -100
    return y


def probabilities(*shape):
    return torch.rand(*shape).softmax(1)


# name: (loss_fn, outputs' shape, targets)
LOSSES = {
    "cross_entropy": (F.cross_entropy, (6, 3), lambda: hard((6,))),
    "cross_entropy 2d": (nn.CrossEntropyLoss(), (2, 3, 4, 2), lambda: hard((2, 4, 2))),
    "cross_entropy one term": (nn.CrossEntropyLoss(), (3,), lambda: torch.tensor(1)),
    "class weights": (nn.CrossEntropyLoss(WEIGHTS), (6, 3), lambda: hard((6,))),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), (6, 3), lambda: hard((6,))),
    "weights, smoothing": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2), (2, 3, 4), lambda: hard((2, 4))),
    "own ignore_index": (partial(F.cross_entropy, ignore_index=1), (6, 3), lambda: torch.randint(3, (6,))),
    "soft": (nn.CrossEntropyLoss(), (6, 3), lambda: probabilities(6, 3)),
    "soft, all options": (
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2),
        (2, 3, 4),
        lambda: probabilities(2, 3, 4),
    ),
    "cross_entropy sum": (nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), (6, 3), lambda: hard((6,))),
    "BCE": (nn.BCEWithLogitsLoss(), (6, 3), lambda: torch.rand(6, 3)),
    "BCE weights": (nn.BCEWithLogitsLoss(WEIGHTS, pos_weight=1 / WEIGHTS), (6, 3), lambda: torch.rand(6, 3)),
    "BCE sum": (partial(F.binary_cross_entropy_with_logits, reduction="sum"), (6,), lambda: torch.rand(6)),
    "MSE": (nn.MSELoss(), (6, 3), lambda: torch.randn(6, 3)),
    "MSE broadcast": (F.mse_loss, (6, 3), lambda: torch.randn(3)),
    "MSE weights": (
        partial(F.mse_loss, weight=torch.rand(6, 3, dtype=torch.float64)),
        (6, 3),
        lambda: torch.randn(6, 3),
    ),
    "MSE sum": (nn.MSELoss(reduction="sum"), (6, 3), lambda: torch.randn(6, 3)),
    "NLL": (lambda z, y: F.nll_loss(z.log_softmax(1), y), (6, 3), lambda: hard((6,))),
    "smooth L1": (nn.SmoothL1Loss(beta=0.4), (6, 3), lambda: torch.randn(6, 3)),
    "L1": (nn.L1Loss(), (6, 3), lambda: torch.randn(6, 3)),
    "Poisson": (nn.PoissonNLLLoss(), (6, 3), lambda: torch.rand(6, 3)),
}


@pytest.fixture(params=LOSSES)
def example(request):
    loss_fn, shape, targets = LOSSES[request.param]
    return loss_fn, torch.randn(shape), targets()


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_output_hessian_is_that_of_torchs_loss(example):
    loss_fn, z, y = example
    product = as_loss(loss_fn).output_hessian(z, y)
    expected = torch.autograd.functional.hessian(lambda q: loss_fn(q, y), z).reshape(z.numel(), -1)
    t = torch.randn(z.shape)
    torch.testing.assert_close(product([t])[0].reshape(-1), expected @ t.reshape(-1))


@pytest.mark.parametrize("kind", ["labels", "gaussian"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name.split()[0] not in ("NLL", "smooth", "L1", "Poisson")])
def test_residuals_have_covariance_output_hessian(name, kind):
    loss_fn, shape, targets = LOSSES[name]
    z, y = torch.randn(shape), targets()
    loss, generator = as_loss(loss_fn), torch.Generator().manual_seed(1)
    r = torch.stack([loss.residual(z, y, kind, generator).reshape(-1) for _ in range(4000)])
    H_z = torch.stack([loss.output_hessian(z, y)([t.view(shape)])[0].reshape(-1) for t in torch.eye(z.numel())])
    products = r.unsqueeze(2) * r.unsqueeze(1)
    # 4 sigma over all entries at once, by the worst entry's union bound.
    bound = 5.5 * products.std(0) / 4000**0.5 + 1e-12
    assert ((products.mean(0) - H_z).abs() <= bound).all()
    assert (r.mean(0).abs() <= 5.5 * r.std(0) / 4000**0.5 + 1e-12).all()


def test_gaussian_residuals_are_differentiable_in_the_outputs():
    z = torch.randn(5, 3, requires_grad=True)
    loss = as_loss(F.cross_entropy)
    y, generator = torch.randint(3, (5,)), torch.Generator()
    assert torch.autograd.gradcheck(lambda q: loss.residual(q, y, "gaussian", generator.manual_seed(0)), z)


COUNTS = [
    (nn.CrossEntropyLoss(), torch.randn(6, 3), torch.tensor([0, 1, 2, -100, -100, 0]), 4),
    (nn.CrossEntropyLoss(WEIGHTS), torch.randn(3, 3).double(), torch.tensor([0, 1, -100]), 3),
    (nn.CrossEntropyLoss(WEIGHTS), torch.randn(2, 3, 5).double(), torch.rand(2, 3, 5), 10),
    (nn.CrossEntropyLoss(reduction="sum"), torch.randn(6, 3), torch.tensor([0] * 6), 1),
    (F.nll_loss, torch.randn(6, 3), torch.tensor([0, 1, 2, -100, -100, 0]), 4),
    (partial(F.nll_loss, weight=WEIGHTS), torch.randn(2, 3).double(), torch.tensor([0, 1]), 3),
    (nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 3), 18),
    (nn.L1Loss(), torch.randn(6, 3), torch.randn(6, 3), 18),
    (nn.BCELoss(), torch.rand(6, 3), torch.rand(6, 3), 18),
    (nn.KLDivLoss(reduction="batchmean"), torch.randn(6, 3), torch.rand(6, 3), 6),
    (nn.KLDivLoss(), torch.randn(6, 3), torch.rand(6, 3), 18),
    (nn.KLDivLoss(reduction="batchmean"), torch.randn(6), torch.rand(6), 6),
    (nn.CrossEntropyLoss(WEIGHTS).forward, torch.randn(2, 3).double(), torch.tensor([0, 1]), 3),
    (nn.CrossEntropyLoss(WEIGHTS), torch.randn(2, 3).double(), torch.tensor([0, 1], dtype=torch.uint8), 3),
    (torch.compile(nn.CrossEntropyLoss(WEIGHTS)), torch.randn(2, 3).double(), torch.tensor([0, 1]), 3),
    (type("Renamed", (nn.CrossEntropyLoss,), {})(WEIGHTS), torch.randn(2, 3).double(), torch.tensor([0, 1]), 3),
    (nn.MultiLabelSoftMarginLoss(), torch.randn(6, 3), torch.rand(6, 3), 6),
    (nn.MultiMarginLoss(), torch.randn(6, 3), torch.zeros(6).long(), 6),
    (lambda z, y: z.mean(), torch.randn(6, 3), torch.zeros(1), 6),
    (lambda z, y: z.mean(), torch.randn(()), torch.zeros(1), 1),
    (nn.CrossEntropyLoss(size_average=False), torch.randn(6, 3), torch.tensor([0] * 6), 1),
]


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize(("loss_fn", "z", "y", "count"), COUNTS)
def test_counts(loss_fn, z, y, count):
    assert as_loss(loss_fn).count(z, y) == count


@pytest.mark.parametrize("loss_fn", [row[0] for row in COUNTS[:11]])
def test_a_mean_over_two_batches_is_the_mean_over_their_union(loss_fn):
    index = next(i for i, row in enumerate(COUNTS) if row[0] is loss_fn)
    _, z, y, _ = COUNTS[index]
    z = z.double().abs() if isinstance(loss_fn, nn.BCELoss) else z.double()
    y = y.double() if y.is_floating_point() else y
    if len(y) < 2:
        pytest.fail("needs two terms")
    cut, loss = len(y) // 2, as_loss(loss_fn)
    parts = [(z[:cut], y[:cut]), (z[cut:], y[cut:])]
    counts = [loss.count(*part) for part in parts]
    total = sum(c * loss(*part) for c, part in zip(counts, parts, strict=True) if c)
    torch.testing.assert_close(total / sum(counts) if loss.averages else total, loss(z, y))


def test_an_unknown_loss_is_counted_by_weight():
    loss = as_loss(lambda z, y: z.mean(), weight=lambda z, y: 7)
    assert loss.count(torch.randn(3, 2), None) == 7
    with pytest.raises(TwofoldError, match="not negative"):
        as_loss(lambda z, y: z.mean(), weight=lambda z, y: -1.0).count(torch.randn(3), None)


def test_a_subclass_of_a_loss_module_is_not_taken_for_it():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, z, y):
            return super().forward(z, y) ** 2

    assert type(as_loss(Focal())) is Loss


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "reduction"),
        (partial(F.mse_loss, reduction="none"), "reduction"),
        (lambda z, y: (z - y).square(), r"shape \(6, 3\)"),
        (lambda z, y: 3.0, "float"),
        ("cross_entropy", "callable"),
    ],
)
def test_what_is_no_scalar_loss_is_refused(loss_fn, text):
    with pytest.raises(TwofoldError, match=text):
        as_loss(loss_fn)(torch.randn(6, 3), torch.randn(6, 3))


class ThreeArguments(nn.Module):
    def forward(self, z, y, lengths):
        return (z - y).square().mean()


@pytest.mark.parametrize(
    ("loss_fn", "takes"),
    [
        (nn.CTCLoss(), "log_probs, targets, input_lengths, target_lengths"),
        (nn.TripletMarginLoss(), "anchor, positive, negative"),
        (nn.GaussianNLLLoss(), "input, target, var"),
        (partial(F.cosine_embedding_loss, margin=0.1), "input1, input2, target"),
        (ThreeArguments(), "z, y, lengths"),
        (lambda z: z.mean(), "z"),
    ],
    ids=["CTC", "triplet", "Gaussian NLL", "cosine", "module", "one"],
)
def test_a_loss_of_other_arguments_is_refused_with_the_way_out(loss_fn, takes):
    batch = (torch.randn(6, 4), torch.randn(6, 3))
    questions = [
        lambda: twofold.Curvature(nn.Linear(4, 3), loss_fn, batch).gradient(),
        lambda: twofold.SAM(rho=0.1).backward(nn.Linear(4, 3), loss_fn, batch),
        lambda: twofold.GradientPenalty(rho=0.1).backward(nn.Linear(4, 3), loss_fn, batch),
    ]
    for ask in questions:
        with pytest.raises(TwofoldError, match=re.escape(f"takes ({takes}")) as caught:
            ask()
        assert "lambda outputs, targets:" in str(caught.value)


def test_a_type_error_inside_a_loss_is_its_own():
    with pytest.raises(TypeError, match="unsupported operand"):
        as_loss(lambda z, y: z.mean() + "a")(torch.randn(2, 3), torch.randn(2, 3))


def test_ctc_by_a_closure_has_a_gradient_and_is_refused_by_name_beyond_it():
    model, x, lengths = nn.Sequential(nn.Linear(4, 5), nn.LogSoftmax(-1)), torch.randn(12, 3, 4), torch.tensor([4] * 3)
    targets = (torch.randint(1, 5, (3, 4)), torch.tensor([12] * 3), lengths)
    (expected,) = torch.autograd.grad(nn.CTCLoss()(model(x), *targets), model[0].bias)
    c = twofold.Curvature(model, lambda z, t: nn.CTCLoss()(z, *t), (x, targets))
    torch.testing.assert_close(c.gradient()[20:], expected)
    for ask in (lambda: c.hessian @ torch.ones(25), lambda: c.traces(2), lambda: c.frobenius(2)):
        with pytest.raises(TwofoldError, match="_ctc_loss_backward cannot be differentiated twice"):
            ask()


def test_no_labels_can_be_drawn_for_an_unknown_loss():
    with pytest.raises(TwofoldError, match="hutchinson"):
        as_loss(nn.HuberLoss()).residual(torch.randn(2, 3), torch.randn(2, 3), "labels", None)


def test_losses_that_are_constant_or_work_in_place():
    z, y = torch.randn(6, 3), torch.randint(3, (6,))
    constant = as_loss(lambda z, y: torch.zeros(()))
    assert not constant.output_hessian(z, y)([torch.ones(6, 3)])[0].any()
    in_place, plain = (
        as_loss(lambda z, y: F.cross_entropy(z.mul_(2), y)),
        as_loss(lambda z, y: F.cross_entropy(2 * z, y)),
    )
    t = torch.randn(6, 3)
    torch.testing.assert_close(in_place.output_hessian(z, y)([t]), plain.output_hessian(z, y)([t]))


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), LOSSES.values(), ids=LOSSES.keys())
def test_the_third_derivative_is_that_of_autograd(loss_fn, shape, targets):
    z, t, y = torch.randn(shape), torch.randn(shape), targets()

    def twice_along(outputs):
        def along(f):
            return lambda q: torch.func.jvp(f, (q,), (t,))[1]

        return along(along(lambda q: as_loss(loss_fn)(q, y)))(outputs)

    (found,) = as_loss(loss_fn).output_third(z, y)([t])
    torch.testing.assert_close(found, torch.func.grad(twice_along)(z))
