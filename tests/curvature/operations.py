"""Operations of torch on two parameters a, b [3, 4], each as a function of tensors: what jets know."""

import torch
import torch.nn.functional as F
from torch import nn


def positive(a):
    return a * a + 0.5


def in_place(a, b):
    h = a * 1.0
    h += b
    h.mul_(b).tanh_()
    h = h + a
    h[1] = b[0]
    return h


def buffered(a, b):
    h = torch.zeros(2, 3, 4)
    h[0] = a * b
    h[1, :, 1] = a[:, 0]
    return h


def constants(a, b):
    with torch.no_grad():
        fixed = a * b
    return a * fixed + b.detach().exp() * a + (a > 0) * b + float(a[0, 0].item())


def lstm(a, b):
    weights = [
        a.new_tensor(range(32)).view(8, 4).sin() * b[0, 0],
        a.repeat(3, 1)[:8, :2],
        a.flatten()[:8],
        b.flatten()[:8],
    ]
    x = torch.stack([a, b, a * b])
    states = (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))
    return torch.cat(torch.lstm(x, states, weights, True, 1, 0.0, True, False, False), 0)


def packed_gru(a, b):
    """Two layers in both directions over two sequences, of 2 steps and 1."""
    layer = [a.repeat(2, 1), b.repeat(2, 1)[:, :2], b.flatten()[:6], a.flatten()[:6]]
    both = [*layer, *(weights.flip(0) for weights in layer)]
    states = b[:2, :2].sin().expand(4, 2, 2)
    return torch.cat(torch.gru(a * b, torch.tensor([2, 1]), states, both + both, True, 2, 0.0, True, True)[1].unbind())


def packed_lstm(a, b):
    """Two sequences, of 2 steps and 1."""
    weights = [a.repeat(3, 1)[:8], b.repeat(3, 1)[:8, :2], a.flatten()[:8], b.flatten()[:8]]
    states = (b[:2, :2].sin().unsqueeze(0), a[:2, :2].unsqueeze(0))
    output, *last = torch.lstm(a * b, torch.tensor([2, 1]), states, weights, True, 1, 0.0, True, False)
    return torch.cat([output, *(state[0] for state in last)])


def batch_norm(training):
    def norm(a, b):
        return F.batch_norm(a, torch.ones(4), torch.full((4,), 2.0), b[0], b[1], training)

    return norm


OPERATIONS = {
    "add": lambda a, b: torch.add(a, b, alpha=2) + 1 + a[0],
    "sub": lambda a, b: torch.sub(a, b * a, alpha=2) - 1,
    "rsub": lambda a, b: 1 - a * a + torch.rsub(a, b * b, alpha=3),
    "mul": lambda a, b: a * b * 2 * a[0],
    "div": lambda a, b: a / positive(b) + a / 2 + a / torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "rdiv": lambda a, b: 2 / positive(a),
    "matmul": lambda a, b: a @ b.T + a.matmul(torch.ones(4, 3)),
    "bmm": lambda a, b: torch.bmm(a.expand(2, 3, 4), b.T.expand(2, 4, 3)),
    "einsum": lambda a, b: torch.einsum("ij,kj,kl->il", a, b, a),
    "outer": lambda a, b: torch.outer(a[0], b[1]) + torch.kron(a[:1], b[:1]).view(-1, 4)[0],
    "addmm": lambda a, b: torch.addmm(b[:, :3], a, b.T, beta=2, alpha=3),
    "addcmul and lerp": lambda a, b: (
        torch.addcmul(a, a, b, value=2) + torch.lerp(a, b, 0.3) + torch.addcdiv(a, b, positive(a))
    ),
    "linear": lambda a, b: F.linear(a, b, a[:, 0]) + F.linear(torch.ones(3, 4), b),
    "bilinear": lambda a, b: F.bilinear(
        a, b, (a @ b.T).view(1, 3, 3).expand(2, 3, 3).repeat(1, 2, 2)[:, :4, :4], b[0, :2]
    ),
    "conv1d": lambda a, b: F.conv1d(a.view(1, 3, 4), b.flatten()[:6].view(2, 3, 1), b[0, :2]),
    "conv2d": lambda a, b: F.conv2d(a.view(1, 2, 2, 3), b.view(2, 2, 1, 3), padding=(0, 1), stride=1),
    "conv3d, groups": lambda a, b: F.conv3d(a.view(1, 2, 1, 2, 3), b.view(2, 1, 1, 2, 3), groups=2, padding="same"),
    "conv_transpose": lambda a, b: F.conv_transpose2d(a.view(1, 2, 2, 3), b.view(2, 2, 1, 3), a[0, :2], stride=2),
    "views": lambda a, b: (a * b).view(4, 3).t().reshape(2, 6).unsqueeze(0).permute(2, 1, 0).flatten(1).contiguous().T,
    "pieces": lambda a, b: sum(x.sum(0) for x in [*(a * b).split(1), *(a * a).chunk(2, 1)[0].unbind(1)]),
    "index": lambda a, b: (a * b)[[0, 2, 0], 1:] + (a * b)[:, None, -1].expand(3, 3) + (a * a)[a.detach() > 9].sum(),
    "gather": lambda a, b: (
        (a * b).gather(1, torch.tensor([[0], [3], [1]])) + (a * a).index_select(0, torch.tensor([2]))
    ),
    "cat and stack": lambda a, b: (
        torch.cat([a * b, torch.ones(1, 4), b], 0).sum(0) + torch.stack([a * a, b]).mean((0, 1))
    ),
    "scatter_add": lambda a, b: torch.zeros(3, 4).index_add(0, torch.tensor([0, 2, 2]), a * b) + b,
    "iteration": lambda a, b: [row * row for row in a * b][1],
    "where": lambda a, b: torch.where(a.detach() > 0, a * b, 3.0) + (a * a).where(torch.eye(3, 4) > 0, b * b),
    "masked_fill": lambda a, b: (a * b).masked_fill(torch.eye(3, 4) > 0, 5.0).exp(),
    "pad": lambda a, b: F.pad(a * b, (1, 1), value=3.0) + F.pad((a * a)[None], (1, 1), mode="reflect")[0],
    "sum and mean": lambda a, b: (a * b).sum(0) + (a * a).mean(1, keepdim=True) + (a * b).mean() + (a * a).cumsum(1)[0],
    "var and std": lambda a, b: (a * b).var(0) + a.var(1, keepdim=True, unbiased=False)[0] + torch.std(a * b) + a.var(),
    "norm": lambda a, b: (
        (a * b).norm() + torch.linalg.vector_norm(a * b, dim=1) + a.norm(2, 0)[:3] + F.normalize(a, dim=1)[:, 0]
    ),
    "max": lambda a, b: (a * b).max(1).values + (a * a).max() + (a * b).amax(0)[:3] + torch.maximum(a * b, b)[:, 0],
    "min": lambda a, b: (
        (a * b).min(1, keepdim=True)[0][:, 0] + torch.minimum(a * a, b).sum(1) + torch.max(a * a, b)[:, 1]
    ),
    "sort": lambda a, b: (a * b).sort(1)[0] * torch.arange(4.0) + (a * a).topk(2, 1)[0].sum(),
    "powers": lambda a, b: (
        a**3 + positive(a).sqrt() + positive(b) ** 1.5 + torch.rsqrt(positive(a)) + 2**a + a.square()
    ),
    "reciprocal": lambda a, b: positive(a).reciprocal() + positive(a).pow(-0.5) + 1.5 ** (a * b),
    "exp and log": lambda a, b: (
        (a * b).exp() + positive(a).log() + torch.log1p(positive(b)) + torch.expm1(a) + a.exp2()
    ),
    "trigonometry": lambda a, b: (
        (a * b).sin() + torch.cos(a) + a.atan() + torch.erf(a * b) + a.sinh() + torch.special.expit(a)
    ),
    "abs and clamp": lambda a, b: (a * b).abs() * a + (a * a).clamp(0.1, 0.6) + (a * b).clamp_min(0.0) + a.sign() * b,
    "softmax": lambda a, b: (a * b).softmax(1) + F.softmax(a * a, 0) + F.softmin(a, dim=1),
    "log_softmax": lambda a, b: (a * b).log_softmax(1) + torch.logsumexp(a * b, 0) + (a * a).logsumexp(1, keepdim=True),
    "layer_norm": lambda a, b: F.layer_norm(a, (4,), b[0], b[1]) + F.layer_norm(a, (3, 4)),
    "rms_norm": lambda a, b: F.rms_norm(a, (4,), b[0]) + F.rms_norm(a * b, (3, 4), eps=0.1),
    "group_norm": lambda a, b: F.group_norm(a.view(1, 4, 3), 2, b[0], b[1]),
    "batch_norm train": batch_norm(True),
    "batch_norm eval": batch_norm(False),
    "instance_norm": lambda a, b: F.instance_norm((a * b).view(1, 3, 4), weight=b[:, 0], bias=a[:, 1]),
    "local_response_norm": lambda a, b: F.local_response_norm((a * b).view(1, 3, 4), 2, alpha=0.5),
    "avg_pool": lambda a, b: F.avg_pool1d(a * b, 2)[:, 0] + F.adaptive_avg_pool1d(a * a, 1)[:, 0],
    "max_pool": lambda a, b: (
        F.max_pool1d(a * b, 2)[:, 0] + F.max_pool2d((a * a)[None], 2)[0, 0, 0] + F.adaptive_max_pool1d(a, 1)[:, 0]
    ),
    "interpolate": lambda a, b: F.interpolate((a * b)[None], scale_factor=2, mode="linear")[0],
    "fold": lambda a, b: F.unfold((a * b).view(1, 1, 3, 4), 2) + (a * a).flip(0).roll(1, 1).tril()[0, 0],
    "embedding": lambda a, b: F.embedding(torch.tensor([0, 2, 2, 1]), a * b, padding_idx=1),
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], (a * b)[None], is_causal=True),
    "attention, masked": lambda a, b: F.scaled_dot_product_attention(
        a.view(1, 3, 4), b[None], a[None], attn_mask=torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool(), scale=2.0
    ),
    "glu": lambda a, b: F.glu(a * b, 1),
    "prelu": lambda a, b: F.prelu(a * b, b[0]) + torch.prelu(a, b[0, :1]),
    "lstm": lstm,
    "packed gru": packed_gru,
    "packed lstm": packed_lstm,
    "gru_cell": lambda a, b: torch.gru_cell(a, b[:, :1], b.flatten().view(3, 4), b[:, :1], a[:, 0], a[:, 1]),
    "rnn_cell": lambda a, b: torch.rnn_tanh_cell(a, b[:, :1], b[:1], b[:1, :1], a[0, :1]),
    "in place": in_place,
    "into a buffer": buffered,
    "constants": constants,
}

ACTIVATIONS = {
    "celu": F.celu,
    "elu": lambda x: F.elu(x, 0.5),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardshrink": F.hardshrink,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": nn.ReLU6(),
    "rrelu": nn.RReLU().eval(),
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": nn.SiLU(inplace=True),
    "softplus": nn.Softplus(2.0),
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
}
