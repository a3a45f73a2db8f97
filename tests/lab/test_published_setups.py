"""The published set-ups on a few pictures in the real formats: they start, step, keep their state, go on and finish."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import twofold
from lab.picture_files import cifar_binary, folders
from lab.test_training import assert_same_weights, raising
from twofold.errors import TwofoldError
from twofold.lab import recipes
from twofold.lab.building import build_optimizer
from twofold.lab.config import ModelConfig, OptimizerConfig, RegularizerConfig, RunConfig
from twofold.lab.models import build
from twofold.lab.runs import RunDirectory, load_model
from twofold.lab.targets import load_target
from twofold.lab.training import train

WIDE_RESNET = recipes.cifar10()
WIDE_RESNET = replace(
    WIDE_RESNET,
    data=replace(WIDE_RESNET.data, num_train=14, num_validation=6),
    model=replace(WIDE_RESNET.model, depth=10, width=1),
    epochs=2,
    batch_size=4,
    device="cpu",
    compile=False,  # half a minute a net; it has a test of its own
)
RESNET = recipes.imagenet()
RESNET = replace(
    RESNET,
    data=replace(RESNET.data, num_train=10, num_validation=2, image_size=32),
    model=replace(RESNET.model, width=2),
    optimizer=replace(RESNET.optimizer, lr=0.02),
    epochs=2,
    warmup_epochs=1,
    batch_size=4,
    device="cpu",
    compile=False,  # half a minute a net; it has a test of its own
)
SETUPS = {"cifar10": WIDE_RESNET, "imagenet": RESNET}
REGULARIZERS = [
    RegularizerConfig(),
    RegularizerConfig("sam", 0.1),
    RegularizerConfig("gradient_penalty", 0.1),
    RegularizerConfig("hessian_trace", 1e-6),
    RegularizerConfig("gauss_newton_trace", 1e-4),
    RegularizerConfig("weight_noise", 1e-3),
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    cifar_binary(place / "cifar-10-batches-bin")
    folders(place / "imagenet")
    return place


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=lambda regularizer: regularizer.name)
@pytest.mark.parametrize("name", SETUPS)
def test_starts_steps_stops_goes_on_and_finishes_with_the_same_bits(tmp_path, data_dir, name, regularizer):
    config = replace(SETUPS[name], regularizer=regularizer)
    whole, broken = (RunDirectory(tmp_path / part, config) for part in ("whole", "broken"))
    metrics = train(config, data_dir=data_dir, directory=whole)
    steps = -(-config.data.num_train // 4)
    assert metrics["step"].tolist() == [0, steps, 2 * steps]
    assert metrics["train/loss"].notna().all()
    with raising(KeyboardInterrupt(), steps + 1), pytest.raises(KeyboardInterrupt):
        train(config, data_dir=data_dir, directory=broken)
    computed = []
    assert train(config, data_dir=data_dir, directory=broken, progress=computed.append).equals(metrics)
    assert len(computed) == 1
    assert_same_weights(whole, broken)
    model, _ = load_model(broken.path)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_killed_it_goes_on_with_the_same_bits(tmp_path, data_dir):
    config = replace(RESNET, epochs=6)
    script = (
        "import json, sys; from pathlib import Path; from twofold.lab.config import RunConfig\n"
        "from twofold.lab.runs import RunDirectory; from twofold.lab.training import train\n"
        "config = RunConfig.from_dict(json.loads(sys.argv[3]))\n"
        "train(config, data_dir=Path(sys.argv[2]), directory=RunDirectory(Path(sys.argv[1]), config),"
        " progress=lambda row: print(row['epoch'], flush=True))"
    )
    killed, whole = (RunDirectory(tmp_path / name, config) for name in ("killed", "whole"))
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), str(data_dir), json.dumps(config.to_dict())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 2:
                os.kill(process.pid, signal.SIGKILL)
                break
    computed = []
    metrics = train(config, data_dir=data_dir, directory=killed, progress=computed.append)
    assert 0 < len(computed) <= 4
    assert metrics.equals(train(config, data_dir=data_dir, directory=whole))
    assert_same_weights(whole, killed)


@pytest.mark.parametrize("name", SETUPS)
def test_precision_and_memory_format_change_the_rounding_alone(data_dir, name):
    exact = replace(SETUPS[name], precision="float32", channels_last=False, warmup_epochs=0)
    losses = {
        "exact": exact,
        "channels last": replace(exact, channels_last=True),
        "half": replace(exact, precision="bfloat16"),
    }
    losses = {name: train(config, data_dir=data_dir)["train/loss"].tolist() for name, config in losses.items()}
    start, *_, end = losses["exact"]
    assert losses["channels last"][-1] == pytest.approx(end, rel=1e-3)
    assert losses["half"] != losses["exact"]
    # casts of old weights would take it elsewhere
    assert losses["half"][-1] == pytest.approx(end, abs=0.2 * abs(end - start))


@pytest.mark.parametrize("regularizer", REGULARIZERS[:3], ids=lambda regularizer: regularizer.name)
def test_a_compiled_model_takes_the_same_steps(tmp_path, data_dir, monkeypatch, regularizer):
    calls, original = [], nn.Module.compile

    def compile_without_code(model):
        calls.append(model)
        original(model, backend="eager")  # the tracing is the same, and takes no compiler

    monkeypatch.setattr(nn.Module, "compile", compile_without_code)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = replace(WIDE_RESNET, regularizer=regularizer, max_steps=2, precision="float32", channels_last=False)
    plain = train(config, data_dir=data_dir)
    directory = RunDirectory(tmp_path, replace(config, compile=True))
    compiled = train(directory.config, data_dir=data_dir, directory=directory)
    assert len(calls) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(
        torch.tensor(compiled.values), torch.tensor(plain.values), rtol=1e-3, atol=1e-4, equal_nan=True
    )
    assert (
        load_model(directory.path)[0].state_dict().keys() == build(config.model, (3, 32, 32), 10, 0).state_dict().keys()
    )


def test_signals_have_no_channels_to_lay_out():
    with pytest.raises(TwofoldError, match=r"channels_last.*\[40\]"):
        train(RunConfig(channels_last=True))


def test_norms_do_not_decay_where_the_recipe_says_so():
    model = build(ModelConfig("resnet", width=1, depth=50, norm="batch"), (3, 32, 32), 10, seed=0)
    decayed, norms = build_optimizer(OptimizerConfig(weight_decay=0.5, decay_norms=False), model).param_groups
    assert (decayed["weight_decay"], norms["weight_decay"]) == (0.5, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or "shortcut.1" in names[id(p)] for p in norms["params"])
    assert not any("norm" in names[id(p)] or "shortcut.1" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(norms["params"]) == len(list(model.parameters()))


def test_a_run_on_stored_pictures_can_be_measured(tmp_path, data_dir):
    config = replace(RESNET, max_steps=2)
    directory = RunDirectory(tmp_path, config)
    train(config, data_dir=data_dir, directory=directory)
    target = load_target(str(directory.path), num_examples=6, data_dir=data_dir)
    [(inputs, targets)] = target.data
    assert torch.equal(inputs, next(iter(target.data))[0])  # read again, and the centre again
    assert (inputs.shape, targets.shape) == ((6, 3, 32, 32), (6,))
    report = twofold.measure(target.model, target.loss_fn, target.data, num_probes=4, **target.options)
    assert str(report)
