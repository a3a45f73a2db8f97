"""The anatomy's kinds on every family of models, against a trace of the model in ATen operations.

The trace is run with all operations of other kinds replaced by their linearisation; it shares no code with twofold.
"""

import pytest
import torch
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

import twofold
from models import CASES
from references import as_function

pytestmark = pytest.mark.usefixtures("float64")

NAMES = {
    "activation": "gelu relu tanh sigmoid silu elu softplus relu_ sigmoid_ elu_",
    "product": "addmm mm bmm mul mul_ convolution _trilinear mv dot glu _prelu_kernel",
    "normalisation": "native_layer_norm native_batch_norm _native_batch_norm_legit native_group_norm",
    "attention": "_softmax _safe_softmax",
}
KIND_OF = {name: kind for kind, names in NAMES.items() for name in names.split()}
KINDS = ("loss", *NAMES, "other")
# ATen sees the pieces of these; twofold sees one operation.
IN_PIECES = {"LSTM", "GRU", "weight_norm", "weight_norm by hook"}


def glu(x, dim=-1):
    """torch's own has no derivative of its forward derivative."""
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


class Linearised(Interpreter):
    """Runs a trace in which every operation that `keep` does not name is linear around a base point."""

    def __init__(self, trace, base, keep):
        super().__init__(trace)
        self.keep, self.at = keep, {}
        self.recording = True
        self.run(base)
        self.recording = False

    def run_node(self, node):
        if node.op != "call_function":
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if self.recording:
            # Copies, since operations may work in place.
            copies = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            result = node.target(*args, **kwargs)
            self.at[node] = copies
            return result
        name = getattr(node.target, "overloadpacket", node.target).__name__
        if self.keep(KIND_OF.get(name, "other")):
            return node.target(*args, **kwargs)
        return self.linear(node, args, kwargs)

    def linear(self, node, args, kwargs):
        flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        base, _ = torch.utils._pytree.tree_flatten(self.at[node])
        places = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.requires_grad]
        if not places:
            return node.target(*args, **kwargs)

        target = glu if node.target is torch.ops.aten.glu.default else node.target

        def f(*tensors):
            values = list(base)
            for i, x in zip(places, tensors, strict=True):
                values[i] = x.clone()
            own_args, own_kwargs = torch.utils._pytree.tree_unflatten(values, spec)
            return target(*own_args, **own_kwargs)

        at = tuple(base[i] for i in places)
        # Masked scores are -inf and stay so.
        steps = tuple(torch.where(b.isfinite(), flat[i] - b, 0.0) for i, b in zip(places, at, strict=True))
        y, change = torch.func.jvp(f, at, steps)
        return torch.utils._pytree.tree_map(lambda a, b: a + b if a.is_floating_point() else a, y, change)


def trace_of(outputs, batch, theta):
    """The model's outputs at theta as a graph of ATen operations."""
    return make_fx(lambda v: outputs(v, batch)[0])(theta)


def product(scalar, theta, vectors):
    theta = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(theta), theta, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros_like(vectors)
    columns = [torch.autograd.grad(gradient, theta, v, retain_graph=True, materialize_grads=True)[0] for v in vectors.T]
    return torch.stack(columns, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_kinds_equal_the_trace_with_all_others_linear(name):
    case = CASES[name]()
    options = {"forward": case.forward} if case.forward else {}
    data = case.batches if len(case.batches) > 1 else case.batches[0]
    theta, outputs = as_function(case.model, **options)
    vectors = torch.randn(len(theta), 3)
    expected = dict.fromkeys(KINDS, 0)
    total = sum(case.counts) if case.counts else 1.0
    for batch, count in zip(case.batches, case.counts or [1.0] * len(case.batches), strict=True):
        z, y = outputs(theta, batch)
        z = z.detach().requires_grad_()
        (u,) = torch.autograd.grad(case.loss_fn(z, y), z)
        trace = trace_of(outputs, batch, theta)
        for kind in KINDS:
            model = Linearised(trace, theta, lambda of, kind=kind: of == kind)
            if kind == "loss":
                found = product(lambda v, m=model, t=y: case.loss_fn(m.run(v), t), theta, vectors)
            else:
                found = product(lambda v, m=model, u=u: (u * m.run(v)).sum(), theta, vectors)
            expected[kind] = expected[kind] + count / total * found
    a = twofold.anatomy(case.model, case.loss_fn, data, num_matvecs=1, **options)
    found = {kind: a[kind] @ vectors for kind in KINDS}
    whole = sum(expected.values()).norm()
    if name in IN_PIECES:
        found, expected = (
            {"loss": parts["loss"], "NME": sum(part for kind, part in parts.items() if kind != "loss")}
            for parts in (found, expected)
        )
    for kind, part in expected.items():
        assert (found[kind] - part).norm() <= max(1e-9 * part.norm(), 1e-13 * whole), kind
    if name in ("ViT", "GPT"):
        assert all(part.norm() > 1e-3 * whole for kind, part in expected.items() if kind != "other")
