"""Each part of the Hessian against its own dense reference: all other operations replaced by their linearisation."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import CASES, classification, mlp
from references import relative
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")

KINDS = ["loss", "activation", "product", "normalisation", "attention", "other"]


class Linearised:
    """Runs a model written out in operations; those that `keep` does not name are linear around the present point."""

    def __init__(self, keep):
        self.keep, self.base, self.place = keep, [], None

    def __call__(self, label, f, *inputs):
        if self.place is None:
            self.base.append(tuple(x.detach() for x in inputs))
            return f(*inputs)
        base, self.place = self.base[self.place], self.place + 1
        if self.keep(*label.split(":")):
            return f(*inputs)
        y, change = torch.func.jvp(f, base, tuple(x - b for x, b in zip(inputs, base, strict=True)))
        return y + change

    def product(self, written_out, model, vectors):
        """The second derivative of what is left times vectors [P, K]."""
        named = {name: p.detach() for name, p in model.named_parameters()}
        sizes = [p.numel() for p in named.values()]

        def run(theta):
            parts = theta.split(sizes)
            return written_out(self, {n: q.view(p.shape) for (n, p), q in zip(named.items(), parts, strict=True)})

        theta = torch.cat([p.flatten() for p in named.values()]).requires_grad_()
        run(theta)
        self.place = 0
        (gradient,) = torch.autograd.grad(run(theta), theta, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(vectors)
        columns = [torch.autograd.grad(gradient, theta, v, retain_graph=True)[0] for v in vectors.T]
        return torch.stack(columns, 1)


def gelu_mlp():
    model, x, y = mlp(4, 5, 4, 3), torch.randn(8, 4), torch.randint(3, (8,))

    def written_out(op, p):
        h = op("product:0", F.linear, x, p["0.weight"], p["0.bias"])
        h = op("activation:1", F.gelu, h)
        h = op("product:2", F.linear, h, p["2.weight"], p["2.bias"])
        h = op("activation:3", F.gelu, h)
        z = op("product:4", F.linear, h, p["4.weight"], p["4.bias"])
        return op("loss:(loss)", lambda z: F.cross_entropy(z, y), z)

    return model, (x, y), written_out


def convolution(train):
    case = classification(
        nn.Sequential(
            *(nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.SiLU(inplace=True)),
            *(nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)),
        ),
        (1, 2, 2),
    )
    model, (x, y) = case.model, case.batches[0]
    model(torch.randn(20, 1, 2, 2))
    model.train(train)
    mean, var = (model[1].running_mean.clone(), model[1].running_var.clone())

    def norm(h, w, b):
        return F.batch_norm(h, None if train else mean, None if train else var, w, b, train)

    def written_out(op, p):
        h = op("product:0", lambda x, w, b: F.conv2d(x, w, b, padding=1), x, p["0.weight"], p["0.bias"])
        h = op("normalisation:1", norm, h, p["1.weight"], p["1.bias"])
        h = op("activation:2", lambda h: h * torch.sigmoid(h), h)
        h = op("product:3", F.conv2d, h, p["3.weight"], p["3.bias"])
        z = op("product:5", F.linear, h.flatten(1), p["5.weight"], p["5.bias"])
        return op("loss:(loss)", lambda z: F.cross_entropy(z, y), z)

    return model, (x, y), written_out


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2, self.qkv, self.out = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.norm = nn.Embedding(5, 4), nn.Sequential(Block(), Block()), nn.LayerNorm(4)

    def forward(self, tokens):
        return (self.norm(self.blocks(self.embed(tokens))) @ self.embed.weight.T).flatten(0, 1)


def transformer():
    model, x, y = Transformer(), torch.randint(5, (2, 3)), torch.randint(5, (6,))
    mask = torch.ones(3, 3).triu(1).bool()

    def layer_norm(h, w, b):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b

    def block(op, p, name, h):
        def linear(at, h):
            return op(f"product:{name}.{at}", F.linear, h, p[f"{name}.{at}.weight"], p[f"{name}.{at}.bias"])

        def norm(at, h):
            return op(f"normalisation:{name}.{at}", layer_norm, h, p[f"{name}.{at}.weight"], p[f"{name}.{at}.bias"])

        q, k, v = linear("qkv", norm("n1", h)).view(2, 3, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = op(f"product:{name}", lambda q, k: q @ k.mT / 2**0.5, q, k)
        weights = op(f"attention:{name}", lambda s: torch.softmax(s.masked_fill(mask, -torch.inf), -1), scores)
        h = h + linear("out", op(f"product:{name}", torch.matmul, weights, v).transpose(1, 2).reshape(h.shape))
        return h + linear("down", op(f"activation:{name}", F.gelu, linear("up", norm("n2", h))))

    def written_out(op, p):
        h = p["embed.weight"][x]
        for name in ("blocks.0", "blocks.1"):
            h = block(op, p, name, h)
        h = op("normalisation:norm", layer_norm, h, p["norm.weight"], p["norm.bias"])
        z = op("product:(model)", lambda h, w: h @ w.T, h, p["embed.weight"]).flatten(0, 1)
        return op("loss:(loss)", lambda z: F.cross_entropy(z, y), z)

    return model, (x, y), written_out


class Gated(nn.Module):
    """SwiGLU and GLU, an in-place gate, and a norm written out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.glu, self.head = nn.GLU(), nn.Linear(2, 3)

    def forward(self, x):
        h = F.silu(self.a(x)) * self.b(x)
        gate = torch.sigmoid(self.c(h))
        h = h.clone()
        h *= gate
        h = h / h.pow(2).mean(-1, keepdim=True).add(1.0).sqrt()
        return self.head(self.glu(self.d(h)))


def gated():
    model, x, y = Gated(), torch.randn(6, 4), torch.randn(6, 3)

    def written_out(op, p):
        def linear(at, h):
            return op(f"product:{at}", F.linear, h, p[f"{at}.weight"], p[f"{at}.bias"])

        h = op("product:(model)", torch.mul, op("activation:(model)", F.silu, linear("a", x)), linear("b", x))
        h = op("product:(model)", torch.mul, h, op("activation:(model)", torch.sigmoid, linear("c", h)))
        h = op("other:(model)", lambda h: h / (h.square().mean(-1, keepdim=True) + 1).sqrt(), h)
        z = linear("head", op("product:glu", lambda h: h[:, :2] * torch.sigmoid(h[:, 2:]), linear("d", h)))
        return op("loss:(loss)", lambda z: F.mse_loss(z, y), z)

    return model, (x, y), written_out


REFERENCES = {
    "GELU MLP": gelu_mlp,
    "convolution, BatchNorm train": lambda: convolution(True),
    "convolution, BatchNorm eval": lambda: convolution(False),
    "transformer": transformer,
    "gated": gated,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_every_part_equals_its_dense_reference(name):
    model, batch, written_out = REFERENCES[name]()
    loss_fn = nn.MSELoss() if name == "gated" else nn.CrossEntropyLoss()
    a = twofold.anatomy(model, loss_fn, batch, num_matvecs=1)
    vectors = torch.randn(a.hessian.shape[0], 8)
    whole = Linearised(lambda *_: True).product(written_out, model, vectors)
    assert relative(a.hessian @ vectors, whole) < 1e-9
    met = 0
    for part, column in [*((p, 0) for p in a.kinds.values()), *((p, 1) for p in a.modules.values())]:
        alone = Linearised(lambda *label, c=column, n=part.name: label[c] == n)
        expected = alone.product(written_out, model, vectors)
        met += bool(expected.norm() > 1e-6 * whole.norm())
        error = (part @ vectors - expected).norm()
        assert error <= max(1e-9 * expected.norm(), 1e-15 * whole.norm()), part.name
    assert met >= 6


@pytest.mark.filterwarnings("ignore:.*(weight_norm|even kernel).*")
@pytest.mark.parametrize("name", CASES)
def test_parts_sum_to_the_hessian(name):
    case = CASES[name]()
    data = case.batches if len(case.batches) > 1 else case.batches[0]
    options = {"forward": case.forward} if case.forward else {}
    a = twofold.anatomy(case.model, case.loss_fn, data, num_matvecs=1, **options)
    c = twofold.Curvature(case.model, case.loss_fn, data, **options)
    vectors = torch.randn(c.layout.size, 4)
    hessian, gauss_newton, *_ = c.products(vectors)
    for parts in (a.kinds, a.modules):
        assert relative(sum(part @ vectors for part in parts.values()), hessian) < 1e-12
        assert sum(part.share["gradient"] for part in parts.values()) == pytest.approx(1, abs=1e-9)
    assert list(a.kinds) == KINDS
    assert (a["loss"] @ vectors - gauss_newton).norm() <= 1e-12 * hessian.norm()
    if name not in ("LSTM", "GRU"):
        assert (a["activation"] @ vectors - c.activation_nme @ vectors).norm() <= 1e-12 * hessian.norm()


def test_figures_are_those_of_the_matrices():
    case = CASES["conv BatchNorm train"]()
    v = torch.randn(twofold.Hessian(case.model, case.loss_fn, case.batches).shape[0])
    directions = {"v": v, "2v": 2 * v}
    a = twofold.anatomy(case.model, case.loss_fn, case.batches, num_matvecs=120, directions=directions)
    hessian = a.hessian.to_dense()
    for part in [a.hessian, *a.kinds.values(), *a.modules.values()]:
        A = part.to_dense()
        assert part.along["v"] == pytest.approx((v @ A @ v / (v @ v)).item(), abs=1e-12)
        assert part.share["2v"] == pytest.approx((v @ A @ v / (v @ hessian @ v)).item(), abs=1e-12)
        assert part.trace.num_matvecs == part.frobenius.num_matvecs == 120
        for found, exact in ((part.trace, A.trace()), (part.frobenius, A.norm())):
            assert abs(found.value - exact.item()) <= 4 * found.stderr + 1e-12, part.name
            assert found.stderr <= 0.2 * A.norm().item() + 1e-12
    assert a.kinds["normalisation"].trace.value != 0


def test_norms_of_modules_are_calibrated():
    case = classification(mlp(4, 5, 3))
    scores = []
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        a = twofold.anatomy(case.model, case.loss_fn, case.batches[0], num_matvecs=128, generator=generator)
        part = a.modules["1"]
        exact = part.to_dense().norm().item()
        scores.append((part.frobenius.value**2 - exact**2) / (2 * part.frobenius.value * part.frobenius.stderr))
    scores = torch.tensor(scores)
    assert abs(scores.mean().item()) < 0.6
    assert 0.3 < scores.var().item() < 2.5


def test_the_second_derivative_in_force_is_the_activations():
    case = CASES["PReLU"]()
    with twofold.second_derivative(torch.cos):
        a = twofold.anatomy(case.model, case.loss_fn, case.batches[0], num_matvecs=1)
        c = twofold.Curvature(case.model, case.loss_fn, case.batches[0])
        activation, hessian = c.activation_nme.to_dense(), c.hessian.to_dense()
        assert activation.norm() > 0.01 * hessian.norm()
        assert relative(a["activation"].to_dense(), activation) < 1e-12
        assert relative(sum(part.to_dense() for part in a.kinds.values()), hessian) < 1e-12


def test_functions_of_ones_own_are_computed_too():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(Cube.apply(self.a(x)))

    case = classification(Model())
    x, y = case.batches[0]
    a = twofold.anatomy(case.model, case.loss_fn, (x, y), num_matvecs=1)

    def written_out(op, p):
        h = op("product:a", F.linear, x, p["a.weight"], p["a.bias"])
        h = op("other:(unseen)", lambda h: h * h * h, h)
        z = op("product:b", F.linear, h, p["b.weight"], p["b.bias"])
        return op("loss:(loss)", lambda z: F.cross_entropy(z, y), z)

    identity = torch.eye(a.hessian.shape[0])
    expected = Linearised(lambda kind, _: kind == "other").product(written_out, case.model, identity)
    assert relative(a["other"].to_dense(), expected) < 1e-9
    assert relative(a.modules["(unseen)"].to_dense(), expected) < 1e-9


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_counts_by_its_pieces(dropout, need_weights):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha, self.head = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.mha(x, x, x, need_weights=need_weights)[0].mean(1))

    case = classification(Model(), (3, 4), n=4, sizes=(4,))
    state = torch.get_rng_state()
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0]).to_dense()
    torch.set_rng_state(state)
    a = twofold.anatomy(case.model, case.loss_fn, case.batches[0], num_matvecs=1)
    assert relative(sum(part.to_dense() for part in a.kinds.values()), hessian) < 1e-12
    assert a["attention"].to_dense().norm() > 0
    assert not a["other"].to_dense().any()
    assert a.modules["mha"].to_dense().norm() > a["attention"].to_dense().norm()


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.eye(3).bool()}, {}])
def test_attention_in_pieces_is_attention(options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, **options).flatten(1)

    model, batch = Model(), (torch.randn(2, 3, 4), torch.randn(2, 12))
    a = twofold.anatomy(model, nn.MSELoss(), batch, num_matvecs=1)
    hessian = twofold.Hessian(model, nn.MSELoss(), batch).to_dense()
    assert relative(sum(part.to_dense() for part in a.kinds.values()), hessian) < 1e-12


def test_it_follows_the_parameters_and_leaves_no_trace():
    case = CASES["conv BatchNorm train"]()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    a = twofold.anatomy(case.model, case.loss_fn, case.batches, num_matvecs=2)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())
    v = torch.randn(a.hessian.shape[0])
    old = a["normalisation"] @ v
    with torch.no_grad():
        case.model[1].weight.mul_(1.5)
    fresh = twofold.anatomy(case.model, case.loss_fn, case.batches, num_matvecs=1)
    assert torch.equal(a["normalisation"] @ v, fresh["normalisation"] @ v)
    assert not torch.equal(old, fresh["normalisation"] @ v)


def test_its_graphs_leave_memory_without_the_garbage_collector():
    case = CASES["LayerNorm and attention"]()
    gc.disable()
    try:
        a = twofold.anatomy(case.model, case.loss_fn, case.batches[0], num_matvecs=1)
        (recording,) = a.hessian._products.recordings.kept.values()  # one serves the gradient too
        ref = weakref.ref(recording.outputs[0])
        del recording, a
        assert ref() is None
    finally:
        gc.enable()


def test_it_prints_a_table():
    case = classification(mlp(4, 5, 3))
    text = str(twofold.anatomy(case.model, case.loss_fn, case.batches[0], num_matvecs=8))
    for word in ("hessian", *KINDS, "gradient", "(unseen)", "±"):
        assert word in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_matvecs": 0}, "num_matvecs"),
        ({"directions": {"v": torch.ones(3)}}, "expected"),
        ({"directions": torch.ones(43)}, "mapping from names"),
        ({"directions": {"two": torch.ones(43, 2)}}, "one vector"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    case = classification(mlp(4, 5, 3))
    with pytest.raises(TwofoldError, match=text):
        twofold.anatomy(case.model, case.loss_fn, case.batches[0], **options)
    a = twofold.anatomy(case.model, case.loss_fn, case.batches[0], num_matvecs=1)
    with pytest.raises(TwofoldError, match="kinds are loss, activation"):
        a["gelu"]
