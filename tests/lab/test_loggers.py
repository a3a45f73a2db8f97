"""Loggers get what the run's own tables hold, and cannot change it."""

import sys
from dataclasses import replace

import pandas as pd
import pytest

from twofold.errors import TwofoldError
from twofold.lab import loggers
from twofold.lab.config import DataConfig, ModelConfig, RegularizerConfig, RunConfig
from twofold.lab.runs import RunDirectory, load_run
from twofold.lab.training import train

SMALL = RunConfig(
    data=DataConfig(num_train=200, num_validation=50, num_test=60),
    model=ModelConfig(width=16, depth=2),
    regularizer=RegularizerConfig("sam", 0.05),
    epochs=2,
    batch_size=64,
    curvature_every=1,
    curvature_matvecs=2,
    curvature_probe=32,
    fidelity_rho=0.05,
)


class Kept:
    """A logger that a test can read."""

    def __init__(self, path, config):
        self.path, self.config, self.rows, self.closed = path, config, [], False
        Kept.last = self

    def log(self, metrics, step):
        self.rows.append((step, metrics))

    def close(self):
        self.closed = True


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "kept", Kept)


def test_a_logger_gets_every_row_and_what_is_tracked(kept, tmp_path):
    directory = RunDirectory(tmp_path, replace(SMALL, track_every=4))
    metrics = train(directory.config, directory=directory, loggers=["kept"])
    logger, run = Kept.last, load_run(directory.path)
    assert logger.closed
    assert logger.path == directory.path
    rows = {step: row for step, row in logger.rows if "epoch" in row}
    assert list(rows) == list(metrics["step"])
    for step, row in rows.items():
        expected = metrics[metrics["step"] == step].iloc[0]
        assert all(expected[name] == value for name, value in row.items())
    tracked = [step for step, row in logger.rows if "epoch" not in row]
    assert tracked == list(run.tracked["step"])
    assert all("step" not in row for _, row in logger.rows)
    assert train(replace(SMALL, track_every=0)).equals(pd.DataFrame(run.metrics)[train(SMALL).columns])


def test_diagnostics_and_fidelity_are_in_the_run(tmp_path):
    metrics = train(SMALL)
    assert (metrics["fidelity/hessian/cosine"].abs() <= 1).all()
    assert {"fidelity/gauss_newton/relative_error", "fidelity/nme/cosine"} <= set(metrics.columns)
    assert metrics["regularizer/perturbation_norm"].iloc[1:].tolist() == pytest.approx([0.05, 0.05])
    without = train(replace(SMALL, fidelity_rho=0.0))
    assert not [name for name in without.columns if name.startswith("fidelity")]
    assert without["train/loss"].equals(metrics["train/loss"])


def test_a_logger_is_closed_when_the_run_fails(kept, tmp_path):
    directory = RunDirectory(tmp_path, SMALL)

    def fail(row):
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        train(SMALL, directory=directory, loggers=["kept"], progress=fail)
    assert Kept.last.closed


def test_a_logger_that_cannot_end_costs_no_finished_run(kept, monkeypatch, tmp_path):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Kept, "close", full)
    directory = RunDirectory(tmp_path, SMALL)
    with pytest.raises(OSError, match="No space"):
        train(SMALL, directory=directory, loggers=["kept"])
    assert directory.result().status == "finished"


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")], ids=["tensorboard", "wandb"]
)
def test_a_package_that_is_missing_is_named(name, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TwofoldError, match=rf"pip install 'twofold\[{name}\]'"):
        train(SMALL, directory=RunDirectory(tmp_path, SMALL), loggers=[name])


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(TwofoldError, match="among tensorboard, wandb"):
        train(SMALL, directory=RunDirectory(tmp_path, SMALL), loggers=["mlflow"])
    with pytest.raises(TwofoldError, match="pass directory="):
        train(SMALL, loggers=["tensorboard"])
    with pytest.raises(TwofoldError, match="fidelity_rho"):
        replace(SMALL, curvature_every=0)
