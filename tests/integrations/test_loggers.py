"""A run of the lab in TensorBoard and, offline, in Weights & Biases."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.test_loggers import SMALL
from twofold.lab.runs import RunDirectory
from twofold.lab.training import train

pytestmark = pytest.mark.filterwarnings("ignore")


def test_both_get_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = RunDirectory(tmp_path, SMALL)
    metrics = train(SMALL, directory=directory, loggers=["tensorboard", "wandb"])
    events = EventAccumulator(str(directory.path / "tensorboard"))
    events.Reload()
    for name in ("validation/accuracy", "curvature/nme/trace", "fidelity/hessian/cosine"):
        found = events.Scalars(name)
        assert [event.step for event in found] == list(metrics["step"])
        assert [event.value for event in found] == pytest.approx(metrics[name].tolist(), rel=1e-5)
    (run,) = (directory.path / "wandb").glob("offline-run-*")
    assert run.name.endswith(directory.id)
    # what an offline run will hand to the server: records with each number as JSON
    kept = next(run.glob("*.wandb")).read_bytes()
    for name in ("validation/accuracy", "curvature/nme/trace", "fidelity/hessian/cosine"):
        assert name.encode() in kept
        assert all(json.dumps(value).encode() in kept for value in metrics[name])
