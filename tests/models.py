"""Small models of many families, each with a loss and data: one row a case for every operator's tests."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Case:
    """A model, its loss, the batches, and the weight of each batch's loss (None: the losses are summed)."""

    model: nn.Module
    loss_fn: Callable[..., torch.Tensor]
    batches: list[Any]
    counts: list[float] | None
    forward: Callable[..., Any] | None = None


def classification(model, features=(4,), classes=3, n=10, loss_fn=F.cross_entropy, sizes=(10,)):
    x, y = torch.randn(n, *features), torch.randint(classes, (n,))
    return Case(
        model, loss_fn, list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)), list(map(float, sizes))
    )


def mlp(*widths, act=nn.GELU):
    layers = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Attention(nn.Module):
    """LayerNorm and the default scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        return self.head((x + self.out(y)).mean(1))


class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.mix(self.embed(tokens))))).flatten(0, 1)


class Aliased(nn.Module):
    """In-place activations whose input is used again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x)
        h.relu_()
        k = self.b(h) * 1.0
        y = F.elu_(k)
        return self.c(torch.sigmoid_(y + k) + h)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = mlp(4, 5, 5), mlp(5, 4, 3)

    def forward(self, x):
        return self.b(torch.tanh(checkpoint(self.a, x, use_reentrant=False)))


class WeightNorm(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.a, self.b = wrap(nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Bilinear(3, 3, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h, h)


class Residual(nn.Module):
    """Depthwise, transposed and strided convolutions around a skip."""

    def __init__(self):
        super().__init__()
        self.up, self.depthwise = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 2, groups=2, padding="same")
        self.down, self.head = nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Linear(2, 3)
        self.norm = nn.GroupNorm(2, 2)

    def forward(self, x):
        h = F.silu(self.up(x))
        h = h + F.softplus(self.norm(self.depthwise(h)))
        return self.head(self.down(h).mean((2, 3)))


class ResidualConv(nn.Module):
    """A residual block with BatchNorm, as ResNets have it; smooth, since some tests take differences."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Linear(2, 3)
        self.conv1, self.norm1 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.norm2 = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)

    def forward(self, x):
        x = self.stem(x)
        h = F.gelu(self.norm1(self.conv1(x)))
        return self.head(F.gelu(x + self.norm2(self.conv2(h))).mean((2, 3)))


class Mixer(nn.Module):
    """An MLP over tokens and one over channels, each with LayerNorm and a skip."""

    def __init__(self):
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(3), mlp(4, 3, 4)
        self.norm2, self.channels, self.head = nn.LayerNorm(3), mlp(3, 4, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).mT).mT
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, positions, one block with MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.cls, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))
        self.norm1, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm2, self.mlp, self.head = nn.LayerNorm(4), mlp(4, 3, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class GPT(nn.Module):
    """Causal attention over tokens and positions; the head is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(5, 4), nn.Embedding(3, 4)
        self.norm1, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.norm2, self.mlp = nn.LayerNorm(4), mlp(4, 3, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        return self.head(x + self.mlp(self.norm2(x))).flatten(0, 1)


class Gated(nn.Module):
    """GLU and a SwiGLU written out."""

    def __init__(self):
        super().__init__()
        self.a, self.gate, self.up, self.head = nn.Linear(4, 6), nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = F.glu(self.a(x))
        return self.head(F.silu(self.gate(h)) * self.up(h))


class Convolutions(nn.Module):
    """Every argument that a convolution has, in one, two and three dimensions."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(2, 4, 2, stride=2, padding=1, dilation=2, groups=2)
        self.two = nn.Conv2d(1, 2, (2, 1), padding=(1, 0), bias=False)
        self.up = nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1, groups=2)
        self.three = nn.Conv3d(1, 1, 2, padding="valid")
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.one(x))
        h = torch.tanh(self.up(torch.tanh(self.two(h.unsqueeze(1)))))
        h = torch.tanh(self.three(h.unsqueeze(1)).mean((1, 3, 4)))
        return self.head(h.repeat(1, 4)[:, :4])


def conv_batchnorm():
    return nn.Sequential(
        nn.Conv2d(1, 3, 2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def batchnorm_eval(model, size):
    case = classification(model, (1, size, size))
    case.model(torch.randn(20, 1, size, size))
    case.model.eval()
    return case


def ignored():
    case = classification(mlp(4, 5, 3), sizes=(7, 3))
    case.batches[0][1][:3] = -100
    case.counts = [4.0, 3.0]
    return case


def class_weights():
    weights = torch.tensor([1.0, 2.0, 0.5])
    case = classification(mlp(4, 5, 3), sizes=(7, 3), loss_fn=nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1))
    case.batches[1][1][0] = -100
    case.counts = [weights[y[y != -100]].sum().item() for _, y in case.batches]
    return case


def soft_targets():
    weights = torch.tensor([1.0, 2.0, 0.5])
    loss_fn = partial(F.cross_entropy, weight=weights, label_smoothing=0.2)
    batches = [(torch.randn(n, 4), torch.rand(n, 3)) for n in (6, 2)]
    return Case(mlp(4, 5, 3), loss_fn, batches, [6.0, 2.0])


def segmentation():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 1))
    batches = [(torch.randn(n, 1, 3, 3), torch.randint(3, (n, 2, 2))) for n in (2, 1)]
    batches[0][1][0, 0, 0] = -100
    return Case(model, nn.CrossEntropyLoss(), batches, [7.0, 4.0])


def regression(loss_fn, low=False):
    batches = [(torch.randn(n, 4), torch.rand(n, 3) if low else torch.randn(n, 3)) for n in (5, 2)]
    return Case(mlp(4, 5, 3, act=nn.Tanh), loss_fn, batches, [15.0, 6.0])


def custom():
    def loss_fn(z, y):
        return torch.log(torch.cosh(z - y)).sum(1).mean() + 0.1 * (z.sum(1) ** 2).mean()

    case = regression(loss_fn)
    case.counts = [5.0, 2.0]
    return case


def summed():
    case = classification(mlp(4, 5, 3), sizes=(7, 3), loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    case.counts = None
    return case


def mapping():
    model = mlp(4, 5, 3)

    def forward(m, batch):
        return m(batch["features"]), batch["kind"]

    batches = [{"features": torch.randn(n, 4), "kind": torch.randint(3, (n,))} for n in (4, 3)]
    return Case(model, F.cross_entropy, batches, [4.0, 3.0], forward)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: classification(mlp(4, 5, 4, 3)),
    "ragged": lambda: classification(mlp(4, 5, 3), sizes=(7, 3)),
    "linear": lambda: classification(nn.Linear(4, 3)),
    "conv BatchNorm train": lambda: classification(conv_batchnorm(), (1, 2, 2), sizes=(7, 3)),
    "conv BatchNorm eval": lambda: batchnorm_eval(conv_batchnorm(), 2),
    "ResNet train": lambda: classification(ResidualConv(), (1, 3, 3), sizes=(7, 3)),
    "ResNet eval": lambda: batchnorm_eval(ResidualConv(), 3),
    "mixer": lambda: classification(Mixer(), (4, 3), n=4, sizes=(4,)),
    "ViT": lambda: classification(VisionTransformer(), (1, 4, 4), n=4, sizes=(4,)),
    "GPT": lambda: Case(GPT(), F.cross_entropy, [(torch.randint(5, (3, 3)), torch.randint(5, (9,)))], [9.0]),
    "gated": lambda: classification(Gated()),
    "LayerNorm and attention": lambda: classification(Attention(), (3, 4), n=4, sizes=(4,)),
    "TransformerEncoderLayer": lambda: classification(EncoderLayer(), (3, 4), n=4, sizes=(4,)),
    "TransformerEncoderLayer eval": lambda: classification(EncoderLayer().eval(), (3, 4), n=4, sizes=(4,)),
    "LSTM": lambda: classification(Recurrent(nn.LSTM), (3, 2), n=4, sizes=(4,)),
    "GRU": lambda: classification(Recurrent(nn.GRU), (3, 2), n=4, sizes=(4,)),
    "tied": lambda: Case(Tied(), F.cross_entropy, [(torch.randint(5, (3, 4)), torch.randint(5, (12,)))], [12.0]),
    "aliased in-place": lambda: classification(Aliased()),
    "checkpoint": lambda: classification(Checkpointed()),
    "weight_norm": lambda: classification(WeightNorm(nn.utils.parametrizations.weight_norm)),
    "weight_norm by hook": lambda: classification(WeightNorm(nn.utils.weight_norm)),
    "spectral_norm": lambda: classification(WeightNorm(nn.utils.parametrizations.spectral_norm).eval()),
    "Bilinear": lambda: classification(Bilinear()),
    "depthwise and transposed": lambda: classification(Residual(), (1, 3, 3), n=4, sizes=(4,)),
    "convolutions": lambda: classification(Convolutions(), (2, 5), n=3, sizes=(3,)),
    "PReLU": lambda: classification(nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3))),
    "ignore_index": ignored,
    "class weights and smoothing": class_weights,
    "soft targets": soft_targets,
    "segmentation": segmentation,
    "sum": summed,
    "MSE": lambda: regression(nn.MSELoss()),
    "BCE with logits": lambda: regression(nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0, 0.5])), low=True),
    "Huber": lambda: regression(partial(F.huber_loss, delta=0.3)),
    "custom loss": custom,
    "forward=": mapping,
}
