"""Models as other libraries write them: output objects and mapping batches, stochastic depth, LayerScale, permutes."""

from collections import OrderedDict, UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from references import dense, relative
from twofold import causal_lm_forward

pytestmark = pytest.mark.usefixtures("float64")


class ModelOutput(OrderedDict):
    """A mapping whose entries are attributes too, as transformers returns."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class LanguageModel(nn.Module):
    """A causal decoder layer with tied embeddings, a mask, dropout and an output object."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.gate, self.down = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.dropout = dropout

    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=True):
        length = input_ids.shape[1]
        h = self.table(input_ids) + self.places(torch.arange(length))
        q, k, v = self.qkv(self.norm(h)).view(*h.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        h = h + self.down(F.silu(self.gate(h)) * self.up(h))
        logits = self.head(F.dropout(h, self.dropout, self.training))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return ModelOutput(loss=loss, logits=logits, past_key_values=[(k, v)] if use_cache else None)


def text(sizes=(2, 3)):
    batches = []
    for n in sizes:
        ids, mask = torch.randint(7, (n, 5)), torch.ones(n, 5, dtype=torch.long)
        mask[0, -2:] = 0
        labels = torch.where(mask.bool(), ids, -100)
        batches.append(UserDict(input_ids=ids, attention_mask=mask, labels=labels))
    return batches


def seeded_forward(model, batch):
    torch.manual_seed(5)
    return causal_lm_forward(model, batch)


def agree(c, reference):
    for found, part in zip(c.products(torch.eye(c.hessian.shape[0])), HALVES, strict=True):
        assert relative(found, getattr(reference, part)) < 1e-9, part


HALVES = ("hessian", "gauss_newton", "nme")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_language_model_with_tied_embeddings(mode):
    model, batches = LanguageModel(), text()
    counts = [float((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    c = twofold.Curvature(model, F.cross_entropy, batches, mode=mode, forward=seeded_forward)
    model.train(mode == "train")
    agree(c, dense(model, F.cross_entropy, batches, counts, forward=seeded_forward))
    pieces = twofold.Hessian(model, F.cross_entropy, batches, mode="eval", forward=causal_lm_forward, microbatches=2)
    whole = twofold.Hessian(model, F.cross_entropy, batches, mode="eval", forward=causal_lm_forward)
    v = torch.randn(whole.shape[0])
    assert relative(pieces @ v, whole @ v) < 1e-10


def test_mapping_batches_by_the_default_forward():
    model, (batch,) = LanguageModel(dropout=0.0).eval(), text((3,))

    def loss_fn(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    c = twofold.Curvature(model, loss_fn, batch)
    assert c.loss() == pytest.approx(model(**batch).loss.item(), rel=1e-12)
    plain = twofold.Curvature(model, loss_fn, ({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]))
    assert torch.equal(c.gradient(), plain.gradient())


def drop_path(x, p, training):
    """Stochastic depth as timm draws it: one Bernoulli number an example."""
    if not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - p)
    return x * keep.div_(1 - p)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim, p):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm, self.up, self.down = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))
        self.p = p

    def forward(self, x):
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.gamma * self.down(F.gelu(self.up(h)))
        return x + drop_path(h.permute(0, 3, 1, 2), self.p, self.training)


class ConvNeXt(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(1, 2, 2, stride=2), ConvNeXtBlock(2, p), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((-2, -1)))


class ViTBlock(nn.Module):
    """Pre-norm, LayerScale, class token, stochastic depth."""

    def __init__(self, p=0.5):
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 4, 2, stride=2), nn.Parameter(torch.randn(1, 1, 4))
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.ls, self.head, self.p = nn.Parameter(torch.full((4,), 0.1)), nn.Linear(4, 3), p

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        q, k, v = self.qkv(self.norm(h)).reshape(*h.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        return self.head((h + drop_path(self.out(y) * self.ls, self.p, self.training))[:, 0])


@pytest.mark.parametrize("make", [ConvNeXt, ViTBlock], ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_image_models_with_stochastic_depth(make, mode):
    model = make()
    batches = [(torch.randn(n, 1, 4, 4), torch.randint(3, (n,))) for n in (4, 2)]

    def forward(m, batch):
        torch.manual_seed(3)
        return m(batch[0]), batch[1]

    c = twofold.Curvature(model, F.cross_entropy, batches, mode=mode, forward=forward)
    model.train(mode == "train")
    agree(c, dense(model, F.cross_entropy, batches, [4.0, 2.0], forward=forward))
    unseeded = twofold.Curvature(model, F.cross_entropy, batches, mode=mode, memory=0)
    v = torch.randn(c.hessian.shape[0])
    assert torch.equal(unseeded.hessian @ v, unseeded.hessian @ v)
    unseeded.check_determinism()
