"""The real Hugging Face Trainer on a tiny GPT-2 with random weights: its steps are those of a loop written by hand."""

import copy
import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import twofold
from regularizers.rows import ROWS
from twofold import TwofoldError
from twofold.integrations.transformers import RegularizedMixin, watch_curvature

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 3


class MyTrainer(RegularizedMixin, Trainer):
    """What a user writes."""


def gpt2(dropout=0.0):
    config = GPT2Config(
        vocab_size=17,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def problem(padded=False):
    torch.manual_seed(0)
    model, ids = gpt2(), torch.randint(17, (12, 8))
    labels = ids.clone()
    labels[:, 0] = -100  # nothing predicts the first token, so the Trainer is not to count it
    if padded:
        labels[::2, 5:] = -100
    return model, [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def collate(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def train(model, data, tmp_path, regularizer=None, *, trainer=MyTrainer, watch=None, callbacks=(), **options):
    known = {
        "label_smoothing_factor",
        "gradient_accumulation_steps",
        "bf16",
        "max_grad_norm",
        "report_to",
        "max_steps",
        "ddp_backend",
    }
    arguments = TrainingArguments(
        str(tmp_path),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
        }
        | {name: value for name, value in options.items() if name in known},
    )
    rest = {name: value for name, value in options.items() if name not in known}
    if trainer is not Trainer:
        rest["regularizer"] = regularizer
    found = trainer(model, arguments, train_dataset=data, callbacks=list(callbacks), **rest)
    if watch:
        watch(found)
    torch.manual_seed(1)
    found.train()
    return found


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def by_hand(model, data, regularizer, *, accumulate=1, autocast=False, clip=None, smoothing=0.0, size=2):
    """The same in a plain loop: batches in order, plain SGD, causal cross-entropy over tokens of the whole step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer)
    model.train()
    batches = [collate(data[i : i + size]) for i in range(0, len(data), size)]

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch["input_ids"]).logits
        following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return logits.flatten(0, 1).float(), following.flatten()

    for step in range(STEPS):
        chosen = batches[step * accumulate : (step + 1) * accumulate]
        tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in chosen]
        for batch, count in zip(chosen, tokens, strict=True):
            # a batch counts by its tokens, and is of the size of a mean
            share = accumulate * count / sum(tokens)

            def loss_fn(z, y, share=share):
                return share * F.cross_entropy(z, y, label_smoothing=smoothing)

            exact = F.cross_entropy if share == 1 and not smoothing else loss_fn
            regularizer.backward(model, exact, batch, forward=forward, weight=1 / accumulate)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


SETTINGS = {
    "fp32": ({}, {}),
    "bf16": ({"bf16": True}, {"autocast": True}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
}


def steps_as_by_hand(row, setting, path):
    """Train in the Trainer and by hand; the weights must agree far better than those of plain training do."""
    options, hand = SETTINGS[setting]
    model, data = problem()
    expected, plain = copy.deepcopy(model), copy.deepcopy(model)

    def make(strength=0.05):
        return row.make(strength, generator=torch.Generator().manual_seed(5))

    regularizer = make()
    train(model, data, path, regularizer, **options)
    by_hand(expected, data, make(), **hand)
    by_hand(plain, data, make(0.0), **hand)
    assert regularizer.steps == STEPS
    apart = sum(torch.dist(a, b) ** 2 for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    moved = sum(torch.dist(a, b) ** 2 for a, b in zip(expected.parameters(), plain.parameters(), strict=True))
    assert (apart / moved) ** 0.5 < (0.05 if setting == "bf16" else 1e-3)


@pytest.mark.parametrize("setting", ["bf16", "accumulation"])
@pytest.mark.parametrize("name", ROWS)
def test_every_method_steps_as_in_a_loop_by_hand(name, setting, tmp_path):
    row = ROWS[name]
    if setting == "bf16" and not row.half_precision:
        with pytest.raises(TwofoldError, match="half precision"):
            steps_as_by_hand(row, setting, tmp_path)
    else:
        steps_as_by_hand(row, setting, tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}], ids=str
)
def test_strength_zero_is_the_plain_trainer_bit_for_bit(options, tmp_path):
    model, data = problem(padded=True)
    plain = copy.deepcopy(model)
    one = train(model, data, tmp_path, twofold.SAM(rho=0.0), **options)
    other = train(plain, data, tmp_path, trainer=Trainer, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert losses(one) == losses(other)


@pytest.mark.parametrize(
    "make", [lambda: twofold.SAM(rho=0.1), lambda: twofold.GradientPenalty(rho=0.1, p=2)], ids=["SAM", "p=2"]
)
def test_batches_of_a_step_count_by_their_tokens(make, tmp_path):
    model, data = problem(padded=True)
    for item in data[2:4]:
        item["labels"][2:] = -100
    expected = copy.deepcopy(model)
    train(model, data, tmp_path, make(), gradient_accumulation_steps=2)
    by_hand(expected, data, make(), accumulate=2)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_label_smoothing_and_clipping(tmp_path):
    model, data = problem()
    expected = copy.deepcopy(model)
    train(model, data, tmp_path, twofold.SAM(rho=0.1), label_smoothing_factor=0.1, max_grad_norm=0.5)
    by_hand(expected, data, twofold.SAM(rho=0.1), smoothing=0.1, clip=0.5)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class WithOwnLoss(MyTrainer):
    """A user's compute_loss, which takes labels out of its inputs."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        WithOwnLoss.calls += 1
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def own_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    "options", [{"trainer": WithOwnLoss}, {"compute_loss_func": own_loss}], ids=["method", "function"]
)
@pytest.mark.parametrize("name", ["SAM", "GaussNewtonTrace hutchinson full", "HessianTrace"])
def test_a_loss_of_the_users_own(name, options, tmp_path):
    model, data = problem()
    expected = copy.deepcopy(model)

    def make():
        return ROWS[name].make(0.05, generator=torch.Generator().manual_seed(5))

    trainer = train(model, data, tmp_path, make(), **options)
    by_hand(expected, data, make())
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    WithOwnLoss.calls = 0
    trainer.evaluate(data[:2])
    assert WithOwnLoss.calls == ("trainer" in options)
    assert "compute_loss" not in vars(trainer)


def test_a_classifier_with_dropout_trains_and_logs_diagnostics(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = BertForSequenceClassification(config)
    data = [{"input_ids": torch.randint(17, (6,)), "labels": torch.tensor(i % 3)} for i in range(6)]
    regularizer = twofold.GaussNewtonTrace(strength=0.1)
    trainer = train(model, data, tmp_path, regularizer)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS
    assert rows[-1]["regularizer/trace"] == pytest.approx(regularizer.diagnostics["trace"])


def test_two_processes_step_as_one_with_the_whole_batch(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model, data = problem()
    by_hand(model, data, twofold.SAM(rho=0.1), size=4)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_without_a_regularizer_it_is_the_trainer(tmp_path):
    model, data = problem()
    plain = copy.deepcopy(model)
    train(model, data, tmp_path)
    train(plain, data, tmp_path, trainer=Trainer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_what_cannot_work_is_refused_by_name(tmp_path):
    model, data = problem()
    with pytest.raises(TwofoldError, match="such as SAM"):
        train(model, data, tmp_path, "SAM")
    with pytest.raises(TwofoldError, match="Accumulate gradients"):
        train(model, data, tmp_path, twofold.SAM(microbatches=2))
    with pytest.raises(TwofoldError, match="tells GN from NME"):
        train(model, data, tmp_path, twofold.GaussNewtonTrace(strength=0.1), label_smoothing_factor=0.1)
    optimizer = twofold.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), twofold.SAM())
    with pytest.raises(TwofoldError, match="base optimiser"):
        train(model, data, tmp_path, twofold.SAM(), optimizers=(optimizer, None))


@pytest.mark.parametrize("bf16", [False, True])
def test_watch_curvature_logs_both_halves_in_full_precision_and_changes_nothing(bf16, tmp_path):
    model, data = problem()
    plain, batch = copy.deepcopy(model), collate(data[:6])
    trainer = train(model, data, tmp_path, watch=lambda t: watch_curvature(t, batch, every=STEPS, rho=0.05), bf16=bf16)
    reference = train(plain, data, tmp_path, bf16=bf16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert losses(trainer) == losses(reference)
    (row,) = [row for row in trainer.state.log_history if "curvature/nme/trace" in row]
    options = {"forward": twofold.causal_lm_forward, "mode": "eval"}
    traces = twofold.Curvature(plain_forward(plain), F.cross_entropy, batch, **options).traces(4)
    for matrix in ("hessian", "gauss_newton", "nme"):
        assert row[f"curvature/{matrix}/trace"] == pytest.approx(traces[matrix].value, rel=1e-3)
    expected = twofold.fidelity(plain_forward(plain), F.cross_entropy, batch, 0.05, **options)
    assert row["fidelity/hessian/relative_error"] == pytest.approx(expected.relative_error["hessian"][0], rel=1e-2)


def plain_forward(model):
    """Off Accelerate's autocast."""
    clean = gpt2()
    clean.load_state_dict(model.state_dict())
    return clean


def test_watch_curvature_takes_a_loss_of_its_own(tmp_path):
    model, data = problem()
    batch = collate(data[:6])

    def watch(trainer):
        watch_curvature(trainer, batch, every=1, loss_fn=F.cross_entropy, forward=twofold.causal_lm_forward)

    trainer = train(model, data, tmp_path, watch=watch, label_smoothing_factor=0.1, max_steps=1)
    assert any("curvature/nme/trace" in row for row in trainer.state.log_history)
    with pytest.raises(TwofoldError, match="watch_curvature tells"):
        train(
            model,
            data,
            tmp_path,
            watch=lambda t: watch_curvature(t, batch, every=1),
            label_smoothing_factor=0.1,
            max_steps=1,
        )


def test_tensorboard_gets_the_curvature(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, data = problem()
    watch = lambda t: watch_curvature(t, collate(data[:6]), every=1)
    train(model, data, tmp_path, twofold.SAM(), watch=watch, report_to=["tensorboard"])
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.endswith("curvature/nme/trace")]
    assert len(tags) == 1
    assert len(events.Scalars(tags[0])) == STEPS
    assert any(tag.endswith("regularizer/perturbation_norm") for tag in events.Tags()["scalars"])


def test_docstring_examples():
    from twofold.integrations import transformers

    assert doctest.testmod(transformers, extraglobs={"twofold": twofold}).failed == 0
