"""Real Lightning on tiny models: a callback's steps are those of a loop written by hand."""

import copy
import doctest
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

import twofold
from regularizers.rows import ROWS
from twofold import TwofoldError
from twofold.integrations.lightning import CurvatureMonitor, RegularizerCallback

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = 6


class Module(LightningModule):
    """A user's: nothing in it knows of regularizers."""

    def __init__(self, lr=0.1, form="tensor"):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.lr, self.form = lr, form

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self(x)
        loss = F.cross_entropy(outputs, y)
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        self.accuracy(outputs, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if self.form == "mapping":
            return {"loss": loss, "outputs": outputs}
        return None if self.form == "none" and batch_idx == 1 else loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def problem(**options):
    torch.manual_seed(0)
    return Module(**options), [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(BATCHES)]


def fit(module, data, *callbacks, epochs=1, ckpt_path=None, logger=False, **options):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **{"log_every_n_steps": 1, **options},
    )
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def by_hand(module, data, regularizer, *, accumulate=1, clip=None, autocast=None):
    """One epoch of the same in a plain loop."""
    optimizer = torch.optim.SGD(module.parameters(), lr=module.lr, momentum=0.9)
    regularizer.attach(optimizer)
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()  # what iterating a DataLoader draws
    module.train()
    for i, batch in enumerate(data):
        with autocast() if autocast else nullcontext():
            regularizer.backward(module.body, F.cross_entropy, batch, weight=1 / accumulate)
        if (i + 1) % accumulate == 0:
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


SETTINGS = {
    "fp32": ({}, {}),
    "bf16": ({"precision": "bf16-mixed"}, {"autocast": bf16}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "clipping": ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
}


def steps_as_by_hand(row, setting):
    """Fit with a callback and train by hand; the weights must agree far better than those of plain training do."""
    options, hand = SETTINGS[setting]
    module, data = problem()
    expected = copy.deepcopy(module)
    regularizer = row.make(0.02)
    fit(module, data, RegularizerCallback(regularizer), **options)
    by_hand(expected, data, row.make(0.02), **hand)
    assert regularizer.steps == BATCHES // hand.get("accumulate", 1)
    plain, _ = problem()
    by_hand(plain, data, row.make(0.0), **hand)
    apart = sum(torch.dist(a, b) ** 2 for a, b in zip(module.parameters(), expected.parameters(), strict=True))
    moved = sum(torch.dist(a, b) ** 2 for a, b in zip(expected.parameters(), plain.parameters(), strict=True))
    assert (apart / moved) ** 0.5 < (0.1 if setting == "bf16" else 1e-3)
    assert module.body[1].num_batches_tracked == BATCHES


@pytest.mark.parametrize(
    ("name", "setting"),
    [*((name, setting) for name in ROWS for setting in ("bf16", "accumulation")), ("SAM", "clipping")],
)
def test_every_method_steps_as_in_a_loop_by_hand(name, setting):
    row = ROWS[name]
    if setting == "bf16" and not row.half_precision:
        with pytest.raises(TwofoldError, match="half precision"):
            steps_as_by_hand(row, setting)
    else:
        steps_as_by_hand(row, setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_strength_zero_is_plain_lightning_bit_for_bit(setting):
    options, _ = SETTINGS[setting]
    module, data = problem()
    plain = copy.deepcopy(module)
    fit(plain, data, **options)
    fit(module, data, RegularizerCallback(twofold.SAM(rho=0.0)), **options)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_fp16_with_its_scaler():
    """Lightning lends fp16 to a CPU only where the plugin is given."""

    def half(autocast_scale):
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=autocast_scale))

    module, data = problem()
    expected = copy.deepcopy(module)
    fit(module, data, RegularizerCallback(twofold.SAM(rho=0.1)), plugins=[half(2.0**10)])
    by_hand(expected, data, twofold.SAM(rho=0.1), autocast=lambda: torch.autocast("cpu", torch.float16))
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    module, data = problem()
    data[0][0][0, 0] = float("inf")
    before = copy.deepcopy(module.state_dict())
    regularizer = twofold.SAM(rho=0.1)
    fit(module, data[:1], RegularizerCallback(regularizer), plugins=[half(2.0**10)])
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert regularizer.steps == 0


def test_what_is_logged_is_that_of_the_first_pass(tmp_path):
    module, data = problem(lr=0.0)
    module.body[3].p = 0.0
    plain = copy.deepcopy(module)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit(module, data, RegularizerCallback(twofold.SAM(rho=0.5)), logger=logger)
    reference = fit(plain, data)
    assert trainer.callback_metrics["accuracy"] == reference.callback_metrics["accuracy"]
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    found = [row.split(",")[names.index("train_loss")] for row in rows[1:]]
    losses = [float(value) for value in found if value]
    body = problem()[0].body
    body[3].p = 0.0
    assert losses == pytest.approx([F.cross_entropy(body(x), y).item() for x, y in data])
    assert {"regularizer/gradient_norm", "regularizer/perturbation_norm", "regularizer/loss_rise"} <= set(names)
    assert module.body[1].num_batches_tracked == BATCHES


@pytest.mark.parametrize("form", ["mapping", "none"])
def test_training_step_may_return_a_mapping_or_nothing(form):
    module, data = problem(form=form)
    expected, _ = problem(form="tensor")
    regularizer = twofold.SAM(rho=0.1)
    module.body[3].p = expected.body[3].p = 0.0
    fit(module, data, RegularizerCallback(regularizer))
    by_hand(expected, [b for i, b in enumerate(data) if form == "mapping" or i != 1], twofold.SAM(rho=0.1))
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_module_is_as_before_afterwards_also_when_a_step_raises():
    module, data = problem()
    fit(module, data, RegularizerCallback(twofold.SAM()))
    assert "training_step" not in vars(module)
    assert "log" not in vars(module)
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(module, data, RegularizerCallback(twofold.SAM()))
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    "make", [twofold.FriendlySAM, lambda **o: twofold.WSAM(gamma=0.8, **o)], ids=["Friendly", "WSAM"]
)
def test_a_checkpoint_carries_the_regularizer_and_resumes_bit_for_bit(make, tmp_path):
    def generator():
        return torch.Generator().manual_seed(3)

    module, data = problem()
    module.body[3].p = 0.0
    fit(whole := copy.deepcopy(module), data, RegularizerCallback(make(rho=0.1, generator=generator())), epochs=2)
    first = fit(half := copy.deepcopy(module), data, RegularizerCallback(make(rho=0.1, generator=generator())))
    first.save_checkpoint(tmp_path / "half.ckpt")
    regularizer = make(rho=0.1, generator=torch.Generator())
    fit(half, data, RegularizerCallback(regularizer), epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert regularizer.steps == 2 * BATCHES
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), whole.parameters(), strict=True))


def test_what_cannot_work_is_refused_by_name():
    module, data = problem()
    with pytest.raises(TwofoldError, match="regularizer such as"):
        RegularizerCallback(torch.optim.SGD(module.parameters()))
    with pytest.raises(TwofoldError, match="Accumulate gradients"):
        fit(module, data, RegularizerCallback(twofold.SAM(microbatches=2)))
    module.automatic_optimization = False
    with pytest.raises(TwofoldError, match="manual_backward"):
        fit(module, data, RegularizerCallback(twofold.SAM()))


@pytest.mark.parametrize("loss", ["smooth", "sum of two", "squared"])
def test_a_loss_that_hides_the_outputs_is_refused_where_they_are_needed(loss):
    class Other(Module):
        def training_step(self, batch, batch_idx):
            z, y = self(batch[0]), batch[1]
            return {
                "smooth": lambda: -z.log_softmax(1).mean(),
                "sum of two": lambda: F.cross_entropy(z, y) + 1e-3 * self.body[0].weight.square().sum(),
                "squared": lambda: F.cross_entropy(z, y) ** 2,
            }[loss]()

    torch.manual_seed(0)
    module, data = Other(), problem()[1]
    for regularizer in (twofold.GaussNewtonTrace(strength=0.1), twofold.GradientPenalty(rho=0.1, curvature="nme")):
        with pytest.raises(TwofoldError, match="tells GN from NME"):
            fit(module, data, RegularizerCallback(regularizer))
    fit(module, data, RegularizerCallback(twofold.GradientPenalty(rho=0.1)))


@pytest.mark.parametrize("scaled", ["times", "over", "in place", "module"])
def test_a_multiple_of_a_torch_loss_is_seen_from_its_outputs(scaled):
    class Other(Module):
        def training_step(self, batch, batch_idx):
            z, y = self(batch[0]), batch[1]
            loss = F.cross_entropy(z, y, reduction="sum")
            if scaled == "times":
                return 0.125 * loss
            if scaled == "over":
                return loss / torch.tensor(8)
            if scaled == "module":
                return nn.CrossEntropyLoss()(z, target=y)
            loss *= 0.125
            return loss

    for make in (
        lambda: twofold.GaussNewtonTrace(strength=0.1, generator=torch.Generator().manual_seed(1)),
        lambda: twofold.GradientPenalty(rho=0.1, p=2, curvature="gauss_newton"),
    ):
        torch.manual_seed(0)
        module, (expected, data) = Other(), problem()
        module.load_state_dict(expected.state_dict())
        module.body[3].p = expected.body[3].p = 0.0
        fit(module, data, RegularizerCallback(make()))
        by_hand(expected, data, make())
        for a, b in zip(module.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Shard(IterableDataset):
    """Every second batch, beginning with this process's own."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data[torch.distributed.get_rank() :: 2])


@pytest.mark.parametrize("name", ["SAM", "GradientPenalty NME", "GSAM"])
def test_two_processes_average_what_each_hands_on(name):
    module, data = problem()
    module.body[3].p = 0.0
    expected = copy.deepcopy(module)
    regularizer = ROWS[name].make(0.1)
    fit(module, Shard(data), RegularizerCallback(regularizer), strategy="ddp_fork", devices=2)
    by_hand(expected, data, ROWS[name].make(0.1), accumulate=2)
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class WithSharpnessAware(Module):
    def configure_optimizers(self):
        return twofold.SharpnessAware(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9), twofold.SAM(rho=0.1))


@pytest.mark.parametrize("setting", ["fp32", "bf16"])
def test_sharpness_aware_from_configure_optimizers(setting):
    options, hand = SETTINGS[setting]
    torch.manual_seed(0)
    module, (expected, data) = WithSharpnessAware(), problem()
    module.load_state_dict(expected.state_dict())
    fit(module, data, **options)
    by_hand(expected, data, twofold.SAM(rho=0.1), **hand)
    for (key, a), b in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        if not key.startswith("accuracy"):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sharpness_aware_refuses_what_a_closure_cannot_do():
    torch.manual_seed(0)
    module, data = WithSharpnessAware(), problem()[1]
    with pytest.raises(TwofoldError, match="RegularizerCallback"):
        fit(module, data, accumulate_grad_batches=2)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    with pytest.raises(TwofoldError, match="RegularizerCallback"):
        fit(module, data, plugins=[plugin])
    with pytest.raises(TwofoldError, match="base"):
        fit(module, data, RegularizerCallback(twofold.SAM()))


@pytest.mark.parametrize("by", ["steps", "epochs"])
def test_the_monitor_logs_curvature_to_tensorboard_and_changes_nothing(by, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module, data = problem()
    plain = copy.deepcopy(module)
    every = {"steps": 2, "epochs": None}[by]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitor = CurvatureMonitor(nn.CrossEntropyLoss(), data[0], every_n_steps=every, rho=0.05)
    fit(module, data, monitor, RegularizerCallback(twofold.SAM(rho=0.1)), epochs=2, logger=logger)
    fit(plain, data, RegularizerCallback(twofold.SAM(rho=0.1)), epochs=2)
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.Scalars("curvature/nme/trace")
    assert len(found) == {"steps": BATCHES, "epochs": 2}[by]
    c = twofold.Curvature(module, nn.CrossEntropyLoss(), data[0], mode="eval")
    assert found[-1].value == pytest.approx(c.traces(4)["nme"].value, rel=1e-4)
    fidelity = twofold.fidelity(module, nn.CrossEntropyLoss(), data[0], 0.05, mode="eval")
    assert events.Scalars("fidelity/hessian/cosine")[-1].value == pytest.approx(fidelity.cosine["hessian"][0], rel=1e-3)
    assert {"curvature/hessian/frobenius_norm", "curvature/gauss_newton/trace_stderr"} <= set(events.Tags()["scalars"])


def test_the_monitor_counts_optimizer_steps_under_accumulation():
    module, data = problem()
    calls = []
    monitor = CurvatureMonitor(nn.CrossEntropyLoss(), data[0], every_n_steps=1)
    measure = monitor._metrics.measure
    monitor._metrics.measure = lambda model, step: calls.append(step) or measure(model, step)
    fit(module, data, monitor, accumulate_grad_batches=3)
    assert calls == [1, 2]


def test_wandb_offline(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="twofold")
    logged = {}
    inner = logger.log_metrics
    logger.log_metrics = lambda metrics, step=None: logged.update(metrics) or inner(metrics, step)
    module, data = problem()
    fit(module, data, CurvatureMonitor(nn.CrossEntropyLoss(), data[0]), logger=logger)
    logger.experiment.finish()
    assert "curvature/gauss_newton/trace" in logged
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_docstring_examples():
    from twofold.integrations import lightning

    assert doctest.testmod(lightning, extraglobs={"twofold": twofold, "nn": nn}).failed == 0
