"""Measuring is read-only, also when it fails."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import twofold
from models import CASES, Recurrent, WeightNorm, classification, conv_batchnorm
from twofold import TwofoldError


class Moody(nn.Module):
    """Keeps state in every way that a module can: buffers, plain tensors, counters, caches, lists, hooks."""

    def __init__(self):
        super().__init__()
        self.body = conv_batchnorm()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.plain = torch.zeros(2)
        self.calls, self.cache, self.log = 0, {}, []

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.plain.add_(1)
        self.cache["last"] = x
        self.log.append(self.calls)
        self.extra = x
        self.register_forward_hook(lambda *_: None)
        np.random.rand()
        random.random()
        return self.dropout(self.body(x))


def fingerprint(model):
    return {
        "parameters": [(id(p), p.clone(), p._version, p.requires_grad, p.grad) for p in model.parameters()],
        "buffers": [(id(b), b.clone(), b._version) for b in model.buffers()],
        "modules": [(m.training, sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()],
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("mode", [None, "train", "eval"])
def test_measuring_leaves_no_trace(mode):
    case = classification(Moody(), (1, 2, 2))
    model = case.model
    model.body[0].weight.requires_grad_(False)
    model.body[3].bias.grad = torch.ones(2)
    before = fingerprint(model)
    state = (model.calls, dict(model.cache), list(model.log), model.plain.clone(), hasattr(model, "extra"))
    c = twofold.Curvature(model, case.loss_fn, case.batches[0], mode=mode)
    c.products(torch.ones(c.hessian.shape[0]))
    c.traces(2), c.frobenius(2), c.gradient(), twofold.trace(c.nme, 2)
    assert same(before, fingerprint(model))
    assert same(state, (model.calls, model.cache, model.log, model.plain, hasattr(model, "extra")))


@pytest.mark.parametrize("stage", ["forward", "loss"])
def test_a_failure_leaves_no_trace(stage):
    case = classification(Moody(), (1, 2, 2))
    model = case.model
    original = Moody.forward

    class Broken(Moody):
        def forward(self, x):
            original(self, x)
            raise KeyError("broken on purpose")

    if stage == "forward":
        model.__class__ = Broken

    def loss_fn(z, y):
        raise KeyError("broken on purpose")

    before = fingerprint(model)
    c = twofold.Curvature(model, loss_fn if stage == "loss" else case.loss_fn, case.batches[0])
    with pytest.raises(KeyError, match="on purpose"):
        c.gradient()
    assert same(before, fingerprint(model))
    assert torch.is_grad_enabled()
    assert torch.overrides._len_torch_function_stack() == 0


def test_recurrent_layers_keep_their_flat_weights():
    case = classification(Recurrent(nn.LSTM), (3, 2), n=4, sizes=(4,))
    cells = case.model.cells
    before = list(map(id, cells._flat_weights))
    twofold.Curvature(case.model, case.loss_fn, case.batches[0]).gradient()
    assert list(map(id, cells._flat_weights)) == before
    assert all(a is b for a, b in zip(cells._flat_weights, cells.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_weight_norm_by_hook_keeps_its_weight():
    case = classification(WeightNorm(nn.utils.weight_norm))
    before = case.model.a.weight
    twofold.Curvature(case.model, case.loss_fn, case.batches[0]).gradient()
    assert case.model.a.weight is before


def test_hooks_on_parameters_do_not_touch_the_products():
    case = CASES["mlp"]()
    v = torch.randn(twofold.Hessian(case.model, case.loss_fn, case.batches[0]).shape[0])
    expected = twofold.Hessian(copy.deepcopy(case.model), case.loss_fn, case.batches[0]) @ v
    for parameter in case.model.parameters():
        parameter.register_hook(lambda gradient: 0 * gradient)
    assert torch.equal(twofold.Hessian(case.model, case.loss_fn, case.batches[0]) @ v, expected)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_context_does_not_matter(context):
    case = CASES["mlp"]()
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    v = torch.randn(hessian.shape[0])
    expected = hessian @ v
    with context():
        assert torch.equal(twofold.Hessian(case.model, case.loss_fn, case.batches[0]) @ v, expected)


def test_compiled_and_wrapped_models_are_looked_through():
    case = CASES["mlp"]()
    v = torch.randn(twofold.Hessian(case.model, case.loss_fn, case.batches[0]).shape[0])
    expected = twofold.Hessian(case.model, case.loss_fn, case.batches[0]) @ v
    wrapped = nn.DataParallel(torch.compile(case.model))
    assert torch.equal(twofold.Hessian(wrapped, case.loss_fn, case.batches[0]) @ v, expected)
    inner = nn.Sequential(torch.compile(case.model, backend="eager"), nn.Identity())
    inner(case.batches[0][0])
    assert torch.equal(twofold.Hessian(inner, case.loss_fn, case.batches[0]) @ v, expected)


def test_a_model_under_ddp_is_looked_through(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = CASES["mlp"]()
        v = torch.randn(twofold.Hessian(case.model, case.loss_fn, case.batches[0]).shape[0])
        expected = twofold.Hessian(case.model, case.loss_fn, case.batches[0]) @ v
        wrapped = nn.parallel.DistributedDataParallel(case.model)
        assert torch.equal(twofold.Hessian(wrapped, case.loss_fn, case.batches[0]) @ v, expected)
    finally:
        torch.distributed.destroy_process_group()


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.bag(tokens)))


class FunctionalBag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(F.embedding_bag(tokens, self.table.weight)))


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return torch.cdist(h, h.flip(0) + 1.0)[:, :3]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class OnceOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(Once.apply(torch.tanh(self.a(x)))))


class Reentrant(OnceOnly):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.b, torch.tanh(self.a(x)), use_reentrant=True)


class ReentrantAtTheInput(nn.Module):
    """The segment's input needs no gradient, so torch gives its parameters none, and a gradient of zero passes."""

    def __init__(self, use_reentrant=True):
        super().__init__()
        self.a, self.b, self.use_reentrant = nn.Linear(4, 4), nn.Linear(4, 3), use_reentrant

    def forward(self, x):
        h = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=self.use_reentrant)
        return self.b(h)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_at_the_input_is_refused_unless_its_parameters_are_left_out():
    torch.manual_seed(0)
    batch, reentrant, plain = (
        (torch.randn(6, 4), torch.randint(3, (6,))),
        ReentrantAtTheInput(),
        ReentrantAtTheInput(False),
    )
    plain.load_state_dict(reentrant.state_dict())
    c = twofold.Curvature(reentrant, F.cross_entropy, batch)
    questions = [c.gradient, lambda: c.nme @ torch.ones(35), lambda: c.traces(2), lambda: c.frobenius(2)]
    questions += [lambda: twofold.HessianTrace(strength=1.0).backward(reentrant, F.cross_entropy, batch)]
    for ask in questions:
        with pytest.raises(TwofoldError, match="use_reentrant=False"):
            ask()
    heads = [twofold.Curvature(model, F.cross_entropy, batch, params="b.*") for model in (reentrant, plain)]
    assert torch.equal(heads[0].hessian.to_dense(), heads[1].hessian.to_dense())
    assert heads[0].traces(2)["hessian"] == heads[1].traces(2)["hessian"]
    assert twofold.Curvature(plain, F.cross_entropy, batch).gradient()[:20].norm() > 0


@pytest.mark.parametrize(
    ("model", "tokens", "text"),
    [
        (Bag, True, "EmbeddingBag"),
        (FunctionalBag, True, "embedding_bag"),
        (Distances, False, "cdist"),
        (OnceOnly, False, "cannot be differentiated twice"),
        (Reentrant, False, "use_reentrant=False"),
        (ReentrantAtTheInput, False, "use_reentrant=False"),
    ],
)
def test_operations_without_a_second_derivative_are_refused_by_name(model, tokens, text):
    x = torch.randint(5, (6, 3)) if tokens else torch.randn(6, 4)
    net, y = model(), torch.randint(3, (6,))
    v = torch.ones(sum(p.numel() for p in net.parameters()))
    before = fingerprint(net)
    with pytest.raises(TwofoldError, match=text):
        twofold.Curvature(net, F.cross_entropy, (x, y)).products(v)
    assert same(before, fingerprint(net))


class Weighed(nn.Module):
    """A bag whose entries are weighed by parameters."""

    def __init__(self):
        super().__init__()
        self.table, self.weights, self.head = nn.Embedding(5, 4), nn.Parameter(torch.rand(6, 3)), nn.Linear(4, 3)

    def forward(self, tokens):
        table = self.table.weight
        return self.head(F.embedding_bag(tokens, table, mode="sum", per_sample_weights=self.weights))


class MaxBag(Bag):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 4, mode="max")


@pytest.mark.parametrize(("model", "params"), [(Bag, "head.*"), (MaxBag, "head.*"), (Weighed, "head.*")])
def test_a_bag_of_embeddings_runs_where_nothing_before_it_is_chosen(model, params):
    """It is a constant then: the curvature is that of the head on what the bag gives."""
    net, x, y = model(), torch.randint(5, (6, 3)), torch.randint(3, (6,))
    seen = []
    net.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    net(x)
    expected = twofold.Curvature(copy.deepcopy(net.head), F.cross_entropy, (seen[0], y)).hessian.to_dense()
    c = twofold.Curvature(net, F.cross_entropy, (x, y), params=params)
    torch.testing.assert_close(c.hessian.to_dense(), expected, rtol=1e-10, atol=1e-12)
    trace = c.traces(4)["hessian"]
    assert abs(trace.value - expected.trace().item()) <= 4 * trace.stderr + 1e-12


def test_gradients_through_a_bag_of_embeddings_are_dense_and_unscaled():
    tokens, y, net = torch.randint(5, (6, 3)), torch.randint(3, (6,)), Bag()
    expected = torch.autograd.grad(F.cross_entropy(net(tokens), y), list(net.parameters()))
    net.bag.sparse = net.bag.scale_grad_by_freq = True
    found = twofold.Curvature(net, F.cross_entropy, (tokens, y)).gradient()
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]))
    assert net.bag.sparse


@pytest.mark.parametrize(("model", "params"), [(Weighed, "weights"), (Weighed, "table.*"), (MaxBag, "bag.*")])
def test_a_bag_of_embeddings_is_refused_where_its_output_depends_on_what_is_chosen(model, params):
    batch = (torch.randint(5, (6, 3)), torch.randint(3, (6,)))
    c = twofold.Curvature(model(), F.cross_entropy, batch, params=params)
    for ask in (lambda: c.hessian @ torch.ones(c.layout.size), lambda: c.traces(2), lambda: c.frobenius(2)):
        with pytest.raises(TwofoldError, match=r"embedding_bag.*(.|\n)*nn\.EmbeddingBag, or leave .* params="):
            ask()


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


SHARDED = {
    "FullyShardedDataParallel": lambda model, mesh: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "FSDPSequential": lambda model, mesh: fully_shard(model, mesh=mesh),
    "FSDPLinear": lambda model, mesh: nn.Sequential(fully_shard(model[0], mesh=mesh), model[1]),
    "Linear": lambda model, mesh: parallelize_module(model, mesh, {"0": ColwiseParallel()}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_models_are_refused_by_name(one_rank, name):
    model = SHARDED[name](nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), one_rank)
    with pytest.raises(TwofoldError, match=f"^{name} is sharded(.|\n)*unsharded copy"):
        twofold.Hessian(model, F.cross_entropy, (torch.randn(2, 4), torch.randint(3, (2,))))


def test_scripted_models_are_refused():
    batch = (torch.randn(2, 4), torch.randint(3, (2,)))
    with pytest.raises(TwofoldError, match=r"torch\.jit"):
        twofold.Hessian(torch.jit.script(nn.Linear(4, 3)), F.cross_entropy, batch)


def test_a_parameter_that_hides_in_a_closure_is_refused():
    hidden = nn.Linear(4, 3)

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.known = hidden
            self.call = {"layers": [(hidden.weight, hidden.bias)]}

        def forward(self, x):
            w, b = self.call["layers"][0]
            return F.linear(x, w, b)

    with pytest.raises(TwofoldError, match=r"known\.(weight|bias)"):
        twofold.Curvature(Closure(), F.cross_entropy, (torch.randn(2, 4), torch.randint(3, (2,)))).gradient()


def test_weight_decay_inside_the_loss_is_refused():
    model = nn.Linear(4, 3)

    def loss_fn(z, y):
        return F.cross_entropy(z, y) + 0.1 * model.weight.square().sum()

    with pytest.raises(TwofoldError, match="weight decay"):
        twofold.Curvature(model, loss_fn, (torch.randn(2, 4), torch.randint(3, (2,)))).gradient()


def test_a_model_that_returns_its_parameters_is_fine():
    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([1.0, -2.0]))

        def forward(self, scale):
            return self.theta

    A = torch.tensor([[3.0, 1.0], [1.0, -2.0]])
    c = twofold.Curvature(Point(), lambda z, y: 0.5 * z @ A @ z, (torch.ones(1), torch.ones(1)))
    torch.testing.assert_close(c.hessian.to_dense(), A)
    torch.testing.assert_close(c.gauss_newton.to_dense(), A)
    assert not c.nme.to_dense().any()


class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4, **options), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens).mean(1)))


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": 0}])
def test_embedding_options_do_not_change_the_curvature(options):
    plain, optional = Embedded(), Embedded(**options)
    optional.load_state_dict(plain.state_dict())
    tokens, y = torch.randint(1, 5, (6, 3)), torch.randint(3, (6,))
    expected = twofold.Hessian(plain, F.cross_entropy, (tokens, y)).to_dense()
    torch.testing.assert_close(twofold.Hessian(optional, F.cross_entropy, (tokens, y)).to_dense(), expected)


def test_an_embedding_with_max_norm_is_not_renormalised_by_measuring():
    model, tokens, y = Embedded(max_norm=0.5), torch.randint(5, (6, 3)), torch.randint(3, (6,))
    before = model.table.weight.detach().clone()
    hessian = twofold.Hessian(model, F.cross_entropy, (tokens, y)).to_dense()
    assert torch.equal(model.table.weight, before)
    model(tokens)
    assert not torch.equal(model.table.weight, before)
    torch.testing.assert_close(twofold.Hessian(model, F.cross_entropy, (tokens, y)).to_dense(), hessian)


def test_outputs_that_a_loss_cannot_take_are_told():
    class Dictionary(nn.Linear):
        def forward(self, x):
            return {"scores": super().forward(x)}

    with pytest.raises(TwofoldError, match=r"scores.*forward="):
        twofold.Curvature(Dictionary(4, 3), F.cross_entropy, (torch.randn(2, 4), torch.tensor([0, 1]))).gradient()


def test_a_loss_without_a_second_derivative_is_refused_by_name():
    def loss_fn(z, y):
        lengths = torch.tensor([len(z)]), torch.tensor([len(y)])
        return F.ctc_loss(z.log_softmax(1)[:, None], y[None], *lengths)

    case = classification(nn.Linear(4, 3), loss_fn=loss_fn)
    c = twofold.Curvature(case.model, loss_fn, (case.batches[0][0], torch.tensor([1, 2])))
    with pytest.raises(TwofoldError, match="ctc_loss"):
        c.gauss_newton.to_dense()
