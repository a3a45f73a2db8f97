"""Small models of many families, and what each library makes of them. Adding one: a row in cases()."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peers import Batches


@dataclass(frozen=True)
class Case:
    """A model, its loss and its batches; which matrices of which library are wrong or refused there, and why."""

    model: nn.Module
    loss_fn: nn.Module
    batches: Batches
    wrong: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    why: str = ""


def mlp(*widths: int, act: Callable[[], nn.Module], extra: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    """Linear layers with an activation between, and `extra(width)` before it."""
    model = nn.Sequential()
    for i, o in itertools.pairwise(widths):
        model.append(nn.Linear(i, o))
        if extra:
            model.append(extra(o))
        model.append(act())
    return model[: -2 if extra else -1]


class Lambda(nn.Module):
    """A function as a module, with modules that it uses."""

    def __init__(self, function: Callable, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def labels(*sizes: int, features: tuple[int, ...] = (4,), classes: int = 3) -> Batches:
    """Batches of these sizes with classes as targets."""
    return [(torch.randn(n, *features), torch.randint(classes, (n,))) for n in sizes]


def tokens(*sizes: int, length: int = 4, vocabulary: int = 5) -> Batches:
    """Batches of sequences with a target for each token."""
    return [(torch.randint(vocabulary, (n, length)), torch.randint(vocabulary, (n, length))) for n in sizes]


def _convolutional(norm: nn.Module, act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), norm, act, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2 * 4, 3))


def _attention(model: Any, x: Tensor) -> Tensor:
    q, k, v = model.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return model.head((x + y.transpose(1, 2).reshape(x.shape)).mean(1))


def _recurrent(kind: Callable[..., nn.Module]) -> nn.Module:
    return Lambda(lambda m, x: m.head(m.cells(x)[0][:, -1]), cells=kind(2, 3, batch_first=True), head=nn.Linear(3, 3))


def _language_model(tie: bool) -> nn.Module:
    model = Lambda(
        lambda m, x: m.head(torch.tanh(m.mix(m.embed(x)))).transpose(1, 2),
        embed=nn.Embedding(5, 3),
        mix=nn.Linear(3, 3),
        head=nn.Linear(3, 5, bias=False),
    )
    if tie:
        model.head.weight = model.embed.weight
    return model


def _settled(model: nn.Module, batches: Batches) -> nn.Module:
    """In eval mode, with running statistics of its own."""
    for x, _ in batches:
        model(x)
    return model.eval()


CURVLINOPS, EIGENTHINGS, PYHESSIAN = (
    ("curvlinops H", "curvlinops GN"),
    ("hessian-eigenthings H", "hessian-eigenthings GN"),
    ("PyHessian H",),
)


def cases() -> dict[str, Callable[[], Case]]:
    """Every case by name; each is built after torch.manual_seed(0), with float64 as default."""
    ce, tanh, linear = nn.CrossEntropyLoss(), nn.Tanh, nn.Linear
    weight_norm = nn.utils.parametrizations.weight_norm

    def plain(act: Callable[[], nn.Module] = tanh, loss_fn: nn.Module = ce, sizes: tuple = (8,), **found: Any) -> Case:
        return Case(mlp(4, 5, 4, 3, act=act), loss_fn, labels(*sizes), **found)

    def regression(act: Callable[[], nn.Module], loss_fn: nn.Module) -> Case:
        return Case(mlp(4, 5, 2, act=act), loss_fn, [(torch.randn(8, 4), torch.rand(8, 2))])

    def convolution(norm: nn.Module, act: nn.Module, settle: bool = False, **found: Any) -> Case:
        model, images = _convolutional(norm, act), labels(8, features=(1, 4, 4))
        return Case(_settled(model, images) if settle else model, ce, images, **found)

    def ignoring() -> Batches:
        batches = tokens(2, 2)
        batches[0][1][:, 1:] = -100
        return batches

    forward_mode = "no forward-mode derivative"
    return {
        "MLP, tanh, cross-entropy": plain,
        "MLP, ReLU, label smoothing": lambda: plain(nn.ReLU, nn.CrossEntropyLoss(label_smoothing=0.1)),
        "MLP, GELU, squared error": lambda: regression(nn.GELU, nn.MSELoss()),
        "MLP, sigmoid, binary cross-entropy": lambda: regression(nn.Sigmoid, nn.BCEWithLogitsLoss()),
        "MLP, softplus, Huber loss": lambda: regression(nn.Softplus, nn.HuberLoss()),
        "convolution, GELU": lambda: convolution(nn.Identity(), nn.GELU()),
        "convolution, BatchNorm in eval mode": lambda: convolution(nn.BatchNorm2d(2), nn.ReLU(), settle=True),
        "tied embedding": lambda: Case(_language_model(tie=True), ce, tokens(3)),
        "bilinear": lambda: Case(
            Lambda(lambda m, x: m.b(*2 * [torch.tanh(m.a(x))]), a=linear(4, 3), b=nn.Bilinear(3, 3, 3)), ce, labels(8)
        ),
        "LSTM": lambda: Case(_recurrent(nn.LSTM), ce, labels(6, features=(3, 2))),
        "MLP, SiLU": lambda: plain(nn.SiLU, refused=("curvlinops H",), why=forward_mode),
        "GroupNorm": lambda: convolution(nn.GroupNorm(1, 2), nn.GELU(), refused=("curvlinops H",), why=forward_mode),
        "attention, default kernel": lambda: Case(
            Lambda(_attention, qkv=linear(4, 12), head=linear(4, 3)),
            ce,
            labels(6, features=(3, 4)),
            refused=CURVLINOPS + EIGENTHINGS + PYHESSIAN,
            why="no second derivative; all are right under `sdpa_kernel(SDPBackend.MATH)`",
        ),
        "BatchNorm in train mode": lambda: convolution(
            nn.BatchNorm2d(2),
            nn.GELU(),
            wrong=PYHESSIAN,
            refused=(*CURVLINOPS, "hessian-eigenthings GN"),
            why="running statistics move; PyHessian switches to eval mode",
        ),
        "weight_norm": lambda: Case(
            nn.Sequential(weight_norm(linear(4, 4)), nn.Tanh(), linear(4, 3)),
            ce,
            labels(8),
            wrong=("hessian-eigenthings H", *PYHESSIAN),
            refused=(*CURVLINOPS, "hessian-eigenthings GN"),
            why="torch's own second derivative is wrong",
        ),
        "LayerNorm": lambda: Case(
            mlp(4, 5, 4, 3, act=tanh, extra=nn.LayerNorm),
            ce,
            labels(8),
            wrong=("curvlinops H",),
            why="torch's jvp of jacrev is wrong",
        ),
        "batches of 4 and 1": lambda: plain(sizes=(4, 1), wrong=EIGENTHINGS, why="batches are averaged, not examples"),
        "ignore_index, two batches": lambda: Case(
            _language_model(tie=False),
            ce,
            ignoring(),
            wrong=CURVLINOPS + EIGENTHINGS + PYHESSIAN,
            why="ignored targets are counted",
        ),
        "class weights, two batches": lambda: plain(
            loss_fn=nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0])),
            sizes=(6, 6),
            wrong=CURVLINOPS + EIGENTHINGS + PYHESSIAN,
            why="the weights are not counted",
        ),
        "summed loss, two batches": lambda: plain(
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            sizes=(4, 4),
            wrong=EIGENTHINGS + PYHESSIAN,
            why="batches are averaged",
        ),
    }
