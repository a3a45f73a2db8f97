"""Both halves of the Hessian of a model of GPT-2's small size, in plain torch, with random weights and tokens.

twofold measure examples/measure_gpt2.py:gpt2
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH, LAYERS, HEADS, WIDTH = 50257, 1024, 12, 12, 768


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder-only transformer whose output layer is its token embedding."""

    def __init__(self, vocabulary: int, length: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                onto_the_stream = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if onto_the_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def gpt2():
    """124 million parameters, one batch of 64 tokens: (model, loss_fn, data)."""
    torch.manual_seed(0)
    text = torch.randint(VOCABULARY, (1, 65))
    return GPT(VOCABULARY, LENGTH, LAYERS, HEADS, WIDTH), nn.CrossEntropyLoss(), (text[:, :-1], text[:, 1:].flatten())


def tiny():
    """The same with 38 thousand parameters, for a first try."""
    torch.manual_seed(0)
    text = torch.randint(100, (8, 17))
    return GPT(100, 32, 2, 4, 32), nn.CrossEntropyLoss(), (text[:, :-1], text[:, 1:].flatten())
