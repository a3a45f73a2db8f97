"""Curvature of Hugging Face models with random weights: mapping batches, tied embeddings, both kinds of attention."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import twofold
from references import dense, relative
from twofold import TwofoldError, causal_lm_forward

pytestmark = pytest.mark.usefixtures("float64")

SMALL = {"vocab_size": 7, "max_position_embeddings": 6, "hidden_size": 4, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "intermediate_size": 6}


def gpt2(attention="sdpa", dropout=0.0):
    config = transformers.GPT2Config(
        vocab_size=7,
        n_positions=6,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=6,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config).double()


def llama(attention="sdpa"):
    config = transformers.LlamaConfig(
        **SMALL, **HEADS, num_key_value_heads=1, tie_word_embeddings=False, attn_implementation=attention
    )
    return transformers.LlamaForCausalLM(config).double()


def bert(attention="sdpa"):
    config = transformers.BertConfig(**SMALL, **HEADS, num_labels=3, attn_implementation=attention)
    return transformers.BertForSequenceClassification(config).double()


def text(sizes=(2, 3), length=5):
    """Batches with padding on the right: masked in attention, ignored by the loss."""
    batches = []
    for n in sizes:
        ids = torch.randint(7, (n, length))
        mask = torch.ones(n, length, dtype=torch.long)
        mask[0, -2:] = 0
        labels = torch.where(mask.bool(), ids, -100)
        batches.append(transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels}))
    return batches


def terms(batches):
    return [float((batch["labels"][:, 1:] != -100).sum()) for batch in batches]


def agree(c, reference, tolerance=1e-9):
    identity = torch.eye(c.hessian.shape[0])
    for found, part in zip(c.products(identity), ("hessian", "gauss_newton", "nme"), strict=True):
        assert relative(found, getattr(reference, part)) < tolerance, part


def seeded_forward(model, batch):
    """The dropout masks of a batch at construction."""
    torch.manual_seed(5)
    return causal_lm_forward(model, batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gpt2_with_tied_embeddings(attention, mode):
    model, batches = gpt2(attention, dropout=0.3), text()
    assert model.lm_head.weight is model.transformer.wte.weight
    c = twofold.Curvature(
        model, F.cross_entropy, batches, mode=mode, forward=seeded_forward if mode == "train" else causal_lm_forward
    )
    assert c.loss() == pytest.approx(whole_loss(model, batches, mode), rel=1e-12)
    model.train(mode == "train")
    agree(c, dense(model, F.cross_entropy, batches, terms(batches), forward=seeded_forward))
    assert "lm_head.weight" not in c.layout.shapes


def whole_loss(model, batches, mode):
    model.train(mode == "train")
    counts = terms(batches)
    losses = [F.cross_entropy(*seeded_forward(model, batch)).item() for batch in batches]
    return sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_is_the_models_own(attention):
    model, (batch,) = gpt2(attention).eval(), text((4,))
    c = twofold.Curvature(model, nn.CrossEntropyLoss(), batch, forward=causal_lm_forward)
    assert c.loss() == pytest.approx(model(**batch).loss.item(), rel=1e-6)  # which it takes in float32


def test_llama():
    model, batches = llama().eval(), text()
    c = twofold.Curvature(model, F.cross_entropy, batches, forward=causal_lm_forward)
    # Its norms and rotary embeddings work in float32 whatever the weights are.
    agree(c, dense(model, F.cross_entropy, batches, terms(batches), forward=causal_lm_forward), tolerance=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_by_the_default_forward(attention):
    model, batches = bert(attention).eval(), text()
    for batch in batches:
        batch["labels"] = torch.randint(3, (len(batch["input_ids"]),))

    def forward(m, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return m(**inputs).logits, batch["labels"]

    params = [name for name, _ in model.named_parameters() if "word_embeddings" not in name]
    c = twofold.Curvature(model, F.cross_entropy, batches, params=params)
    agree(c, dense(model, F.cross_entropy, batches, [2.0, 3.0], forward=forward, params=params))


def test_a_batch_in_pieces_is_the_whole_batch():
    model, (batch,) = gpt2().eval(), text((5,))
    v = torch.randn(twofold.Hessian(model, F.cross_entropy, batch, forward=causal_lm_forward).shape[0])
    options = {"forward": causal_lm_forward}
    whole = twofold.Hessian(model, F.cross_entropy, batch, **options) @ v
    assert relative(twofold.Hessian(model, F.cross_entropy, batch, microbatches=3, **options) @ v, whole) < 1e-10
    assert relative(twofold.Hessian(model, F.cross_entropy, [batch], memory=0, **options) @ v, whole) < 1e-12


def test_parts_traces_and_anatomy_of_gpt2():
    model, (batch,) = gpt2(dropout=0.1), text((3,))
    c = twofold.Curvature(model, F.cross_entropy, batch, forward=causal_lm_forward)
    c.check_determinism()
    identity = torch.eye(c.hessian.shape[0])
    n, a, rest = c.products(identity, parts=("nme", "activation_nme", "rest"))
    assert relative(a + rest, n) < 1e-10
    assert a.norm() > 0
    state = torch.get_rng_state()
    anatomy = twofold.anatomy(model, F.cross_entropy, batch, forward=causal_lm_forward, mode="eval", num_matvecs=4)
    assert torch.equal(torch.get_rng_state(), state)
    v = identity[:, 3]
    evaluated = twofold.Hessian(model, F.cross_entropy, batch, forward=causal_lm_forward, mode="eval")
    assert relative(sum(part @ v for part in anatomy.kinds.values()), evaluated @ v) < 1e-9


@pytest.mark.parametrize("make", [gpt2, llama])
def test_regularizers_train_language_models(make):
    model, (batch,) = make().train(), text((4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for regularizer in (
        twofold.SAM(rho=0.01),
        twofold.GradientPenalty(rho=0.01, curvature="gauss_newton"),
        twofold.GaussNewtonTrace(strength=1e-3),
        twofold.HessianTrace(strength=1e-4),
    ):
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = regularizer.backward(model, F.cross_entropy, batch, forward=causal_lm_forward)
            losses.append(loss.item())
            optimizer.step()
        assert losses[-1] < losses[0]


def test_outputs_that_are_no_tensor_are_told():
    model, (batch,) = gpt2(), text((2,))
    with pytest.raises(TwofoldError, match="forward="):
        twofold.Curvature(model, F.cross_entropy, batch, forward=lambda m, b: (m(**b), b["labels"])).gradient()
