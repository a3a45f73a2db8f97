import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import classification, mlp
from references import dense
from twofold import NotFiniteError, TwofoldError


def start(**options):
    torch.manual_seed(0)
    case = classification(mlp(4, 6, 3), n=12, sizes=(8, 4))
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.05, fused=True)
    return case, optimizer, twofold.track(case.model, case.loss_fn, case.batches, **options)


def train(case, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(case.loss_fn(case.model(x), y) for x, y in case.batches).backward()
        optimizer.step()


def test_records_follow_the_model(float64):
    case, optimizer, tracker = start(max_steps=12)
    for step in range(4):
        record = tracker.measure(step)
        reference = dense(case.model, case.loss_fn, case.batches, case.counts)
        curvature = twofold.Curvature(case.model, case.loss_fn, case.batches)
        g = curvature.gradient()
        for matrix in ("hessian", "gauss_newton"):
            values, vectors = torch.linalg.eigh(getattr(reference, matrix))
            residual = record[f"curvature/{matrix}/lambda_max_residual"]
            assert abs(record[f"curvature/{matrix}/lambda_max"] - values[-1]) <= residual + 1e-12
            assert residual <= 1e-2 * values[-1]
            alignment = (vectors[:, -1] @ g).abs() / g.norm()
            assert record[f"curvature/{matrix}/gradient_alignment"] == pytest.approx(alignment.item(), abs=1e-2)
        for matrix in ("hessian", "gauss_newton", "nme"):
            along = (g @ getattr(reference, matrix) @ g / (g @ g)).item()
            assert record[f"curvature/{matrix}/along_gradient"] == pytest.approx(along, abs=1e-10)
            trace, norm = curvature.traces(4)[matrix], curvature.frobenius(4)[matrix]
            assert record[f"curvature/{matrix}/trace"] == pytest.approx(trace.value, rel=1e-9)
            assert record[f"curvature/{matrix}/trace_stderr"] == pytest.approx(trace.stderr, rel=1e-9)
            assert record[f"curvature/{matrix}/frobenius_norm"] == pytest.approx(norm.value, rel=1e-9)
        norms = [curvature.frobenius(4)[half].value for half in ("nme", "gauss_newton")]
        assert record["curvature/nme/ratio"] == pytest.approx(norms[0] / norms[1], rel=1e-9)
        train(case, optimizer)
    assert [record["step"] for record in tracker.history] == [0, 1, 2, 3]
    assert len({record["curvature/hessian/trace"] for record in tracker.history}) == 4


def test_later_records_cost_less_than_the_first():
    case, optimizer, tracker = start()
    spent = []
    for step in range(3):
        before = tracker.overhead.num_matvecs
        tracker.measure(step)
        spent.append(tracker.overhead.num_matvecs - before)
        train(case, optimizer, steps=1)
    assert spent[0] > spent[1]
    assert max(spent[1:]) <= 1 + 4 + 2 * 8
    overhead = tracker.overhead
    assert (overhead.num_matvecs, overhead.num_records) == (sum(spent), 3)
    assert overhead.seconds > 0
    assert 0 < overhead.share <= 1
    assert "3 records" in str(overhead)


class Bowl(nn.Module):
    """A loss whose Hessian is diagonal, with entries that a test may set."""

    def __init__(self, curvatures):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(curvatures)))
        self.register_buffer("curvatures", torch.tensor(curvatures))

    def forward(self, x):
        return self.curvatures.sqrt() * self.w + 0 * x.sum()


def test_an_eigenvalue_that_overtakes_is_seen():
    curvatures = torch.linspace(0, 1, 60).tolist()
    curvatures[0] = 3.0
    model = Bowl(curvatures)
    tracker = twofold.track(model, nn.MSELoss(reduction="sum"), (torch.ones(1), torch.ones(60)))
    assert tracker.measure(0)["curvature/hessian/lambda_max"] == pytest.approx(2 * 3.0, rel=1e-3)
    model.curvatures[30] = 4.0
    for step in range(1, 4):
        record = tracker.measure(step)
    assert record["curvature/hessian/lambda_max"] == pytest.approx(2 * 4.0, rel=1e-3)
    assert record["curvature/gauss_newton/lambda_max"] == pytest.approx(2 * 4.0, rel=1e-3)
    assert record["curvature/nme/ratio"] == 0


def test_a_resumed_tracker_goes_on_as_if_it_had_never_stopped():
    case, optimizer, tracker = start()
    tracker.measure(0)
    train(case, optimizer)
    tracker.measure(3)
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    train(case, optimizer)
    wanted = tracker.measure(6)

    file.seek(0)
    again = twofold.track(case.model, case.loss_fn, case.batches)
    again.load_state_dict(torch.load(file))
    assert again.history == tracker.history[:2]
    before = again.overhead
    assert before.num_matvecs > 0
    assert before.seconds > 0
    assert again.measure(6) == wanted
    assert again.history == tracker.history
    assert again.overhead.num_matvecs == tracker.overhead.num_matvecs
    fresh = twofold.track(case.model, case.loss_fn, case.batches)
    assert fresh.measure(6) != wanted  # the eigenvectors start elsewhere


def test_a_kept_state_does_not_move():
    case, optimizer, tracker = start()
    tracker.measure(0)
    state = tracker.state_dict()
    kept = copy.deepcopy(state)
    train(case, optimizer)
    tracker.measure(1)
    assert state["history"] == kept["history"]
    for name, vector in kept["vectors"].items():
        assert torch.equal(vector, state["vectors"][name])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {},
        lambda state: None,
        lambda state: state | {"vectors": {"hessian": torch.ones(3)}},
        lambda state: state | {"vectors": {"magic": state["vectors"]["hessian"]}},
        lambda state: state | {"vectors": [1]},
        lambda state: state | {"seconds": "long"},
        lambda state: {name: value for name, value in state.items() if name != "history"},
    ],
    ids=["empty", "None", "shape", "name", "list", "seconds", "half"],
)
def test_a_state_of_another_form_is_refused_and_nothing_is_lost(spoil):
    _, _, tracker = start()
    record = tracker.measure(0)
    with pytest.raises(TwofoldError):
        tracker.load_state_dict(spoil(tracker.state_dict()))
    assert tracker.history == [record]
    assert tracker.measure(1)["curvature/hessian/trace"] == record["curvature/hessian/trace"]


def test_a_run_that_diverged_is_recorded_as_nan():
    case, _, tracker = start()
    first = tracker.measure(0)
    weights = copy.deepcopy(case.model.state_dict())
    with torch.no_grad():
        case.model[0].weight.fill_(math.nan)
    record = tracker.measure(1)
    assert list(record) == list(first)
    assert all(math.isnan(value) for key, value in record.items() if key != "step")
    case.model.load_state_dict(weights)
    assert tracker.measure(2)["curvature/nme/trace"] == first["curvature/nme/trace"]
    with torch.no_grad():
        case.model[0].weight.fill_(math.nan)
    with pytest.raises(NotFiniteError):
        twofold.Curvature(case.model, case.loss_fn, case.batches).loss()


def test_read_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.GELU(), nn.Linear(5, 3))
    batch = (torch.randn(8, 4), torch.randint(3, (8,)))
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    before = [(copy.deepcopy(t), t.grad if t.grad is None else t.grad.clone()) for t in model.parameters()]
    buffers, state = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    tracker = twofold.track(model, nn.CrossEntropyLoss(), batch)
    tracker.measure(0)
    tracker.measure(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model[1].training
    for (value, gradient), parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(value, parameter)
        assert torch.equal(gradient, parameter.grad)
        assert parameter.requires_grad
    assert all(torch.equal(buffers[name], now) for name, now in model.named_buffers())


def test_at_a_stationary_point_the_directions_are_nan():
    model = nn.Linear(2, 1, bias=False)
    tracker = twofold.track(model, nn.MSELoss(), (torch.zeros(3, 2), torch.zeros(3, 1)))
    record = tracker.measure(0)
    assert math.isnan(record["curvature/hessian/along_gradient"])
    assert math.isnan(record["curvature/hessian/gradient_alignment"])
    assert record["curvature/hessian/trace"] == 0
    assert record["curvature/hessian/lambda_max"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "options", [{"num_probes": 0}, {"max_steps": 1}, {"mode": "test"}, {"params": "none.*"}], ids=str
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(TwofoldError):
        start(**options)
