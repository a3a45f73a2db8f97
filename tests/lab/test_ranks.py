"""Two processes that train one run together."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lab.picture_files import cifar_binary
from lab.test_published_setups import WIDE_RESNET
from lab.test_training import assert_same_weights
from twofold.errors import TwofoldError
from twofold.lab import ranks
from twofold.lab.config import DataConfig, ModelConfig, RegularizerConfig, RunConfig
from twofold.lab.places import find_place
from twofold.lab.runs import RunDirectory, load_model, load_run
from twofold.lab.training import train

SIGNALS = RunConfig(
    data=DataConfig(num_train=80, num_validation=51, num_test=61),
    model=ModelConfig(width=16, depth=2),
    epochs=2,
    batch_size=16,
)


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]


def script(what: str, out: Path, data_dir: Path, *configs: RunConfig) -> list[str]:
    text = json.dumps([config.to_dict() for config in configs])
    return torchrun(str(Path(__file__).with_name("on_two_ranks.py")), what, str(out), str(data_dir), text)


def test_a_sweep_on_two_ranks_takes_the_steps_of_one_process(tmp_path):
    regularizers = (RegularizerConfig(), RegularizerConfig("sam", 0.1), RegularizerConfig("gradient_penalty", 0.1))
    configs = [replace(SIGNALS, ranks=2, regularizer=regularizer) for regularizer in regularizers]
    wrong = replace(configs[0], regularizer=RegularizerConfig("sam", 0.1, {"radius": 1}))
    done = subprocess.run(
        script("sweep", tmp_path, tmp_path, *configs, wrong), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for finished, diverged, failed, reused in told:
        assert (finished, diverged, reused) == (3, 0, 0)
        assert list(failed) == [RunDirectory(tmp_path, wrong).id]
    for config in configs:
        directory = RunDirectory(tmp_path, config)
        run = load_run(directory.path)
        assert run.metrics["step"].tolist() == [0, 5, 10]
        alone = RunDirectory(tmp_path / "alone", replace(config, ranks=1))
        train(alone.config, directory=alone)
        for one, two in zip(*(load_model(d.path)[0].state_dict().values() for d in (alone, directory)), strict=True):
            torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-4)
        expected = load_run(alone.path).metrics
        for name in ("train/loss", "validation/loss", "test/loss"):
            assert run.metrics[name].tolist() == pytest.approx(expected[name].tolist(), rel=2e-3)


def ranks_of(torchrun: int) -> list[int]:
    children = [path.read_text().split() for path in Path(f"/proc/{torchrun}/task").glob("*/children")]
    found = [int(child) for of_thread in children for child in of_thread]
    assert len(found) == 2
    return found


def test_killed_two_ranks_go_on_with_the_same_bits(tmp_path):
    data_dir = tmp_path / "data"
    cifar_binary(data_dir / "cifar-10-batches-bin")
    config = replace(WIDE_RESNET, ranks=2, epochs=6, regularizer=RegularizerConfig("sam", 0.1))
    killed, whole = (RunDirectory(tmp_path / name, config) for name in ("killed", "whole"))
    command = script("train", tmp_path / "killed", data_dir, config)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if line.strip() == "2":
                for rank in ranks_of(process.pid):  # in sessions of their own; they would go on
                    os.kill(rank, signal.SIGKILL)
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert killed.result() is None
    assert killed.read_checkpoint() is not None
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    computed = [int(line) for line in again.stdout.split() if line.isdecimal()]
    assert computed[0] > 2
    assert computed[-1] == 6
    done = subprocess.run(
        script("train", tmp_path / "whole", data_dir, config), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert load_run(killed.path).metrics.equals(load_run(whole.path).metrics)
    assert_same_weights(whole, killed)
    statistics = [name for name in load_model(whole.path)[0].state_dict() if "running" in name]
    assert statistics


def test_ranks_end_with_the_torchrun_that_was_killed(tmp_path):
    config = replace(SIGNALS, ranks=2, epochs=100_000)
    with subprocess.Popen(script("train", tmp_path, tmp_path, config), stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        started = ranks_of(process.pid)
        process.kill()
    end = time.monotonic() + 30
    while any(is_running(rank) for rank in started):
        assert time.monotonic() < end
        time.sleep(0.1)
    with RunDirectory(tmp_path, config).lock(wait=False):
        pass


def is_running(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_command_line_under_torchrun_speaks_once(tmp_path):
    line = ["-m", "twofold", "train", "mnist1d", "--epochs", "1", "--out", str(tmp_path)]
    done = subprocess.run(torchrun(*line), capture_output=True, text=True, check=True)
    assert done.stdout.count("epoch   1") == 1
    [path] = (tmp_path / "runs").iterdir()
    assert load_run(path).config.ranks == 2


def test_another_number_of_processes_is_told():
    with pytest.raises(TwofoldError, match=r"ranks is 3, and 1 process is there.*--nproc-per-node 3"):
        train(replace(SIGNALS, ranks=3))


def test_torchrun_and_a_place_exclude_each_other(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TwofoldError, match="leave --place and --workers out"):
        find_place("ray", None, tmp_path)
    with pytest.raises(TwofoldError, match="leave --place and --workers out"):
        find_place("local", 4, tmp_path)
    assert find_place("local", None, tmp_path).slots == 1


@pytest.mark.parametrize(
    ("count", "batch", "of", "batches"), [(81, 16, 1, 6), (81, 16, 2, 5), (82, 16, 2, 6), (5, 8, 4, 1)]
)
def test_batches_of_an_epoch(count, batch, of, batches):
    assert ranks.num_batches(count, batch, of) == batches
