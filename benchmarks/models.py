"""The three models that every benchmark uses, each with a batch."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """784-512-512-10 with GELU, batch 128."""
    model = nn.Sequential()
    for i, o in itertools.pairwise((784, 512, 512, 10)):
        model.extend([nn.Linear(i, o), nn.GELU()])
    model.pop(-1)
    return model, torch.randn(128, 784), torch.randint(10, (128,))


def wideresnet(training: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """WideResNet-10-2 with BatchNorm, batch 32 of 3x32x32."""
    from twofold.lab.config import ModelConfig
    from twofold.lab.models import build

    config = ModelConfig(name="wideresnet", depth=10, width=2, activation="relu", norm="batch")
    model = build(config, (3, 32, 32), 10, seed=0)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    model.train()(x)
    return model.train(training), x, y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class _Transformer(nn.Module):
    def __init__(self, layers: int = 4, width: int = 128, length: int = 64, vocabulary: int = 1000) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[_Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions))).flatten(0, 1)


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    """A causal transformer of 4 layers of width 128, batch 8 x 64 tokens."""
    return _Transformer(), torch.randint(1000, (8, 64)), torch.randint(1000, (512,))


MODELS = {
    "mlp": mlp,
    "wrn eval": lambda: wideresnet(False),
    "wrn train": lambda: wideresnet(True),
    "transformer": transformer,
}
