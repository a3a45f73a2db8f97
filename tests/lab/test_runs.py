import errno
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import twofold
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.lab import runs
from twofold.lab.config import DataConfig, ModelConfig, OptimizerConfig, RegularizerConfig, RunConfig
from twofold.lab.data import load
from twofold.lab.evaluation import evaluate
from twofold.lab.runs import RunDirectory, load_model, load_run, load_runs, load_table, prepare_output, run_id
from twofold.lab.training import train

SMALL = RunConfig(
    data=DataConfig(num_train=200, num_validation=50, num_test=60),
    model=ModelConfig(width=8, depth=1),
    epochs=2,
    batch_size=64,
)


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    train(SMALL, directory=directory)
    return directory


def test_ids_are_stable_across_processes_and_hash_seeds():
    script = (
        "import json, sys; from twofold.lab.config import RunConfig; from twofold.lab.runs import run_id;"
        "print(run_id(RunConfig.from_dict(json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", script, json.dumps(SMALL.to_dict())]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    assert told == run_id(SMALL) == run_id(RunConfig.from_dict(SMALL.to_dict()))


def test_ids_tell_apart_whatever_decides_the_numbers(monkeypatch):
    variants = [
        SMALL,
        replace(SMALL, seed=1),
        replace(SMALL, threads=2),
        replace(SMALL, device="cuda"),
        replace(SMALL, data=replace(SMALL.data, seed=1)),
        replace(SMALL, model=replace(SMALL.model, activation="relu")),
        replace(SMALL, optimizer=replace(SMALL.optimizer, lr=0.1)),
        replace(SMALL, regularizer=RegularizerConfig("sam", 0.1)),
        replace(SMALL, regularizer=RegularizerConfig("sam", 0.1, {"microbatches": 2})),
        replace(SMALL, regularizer=RegularizerConfig("sam", 0.1, second_derivative="0")),
    ]
    ids = {run_id(config) for config in variants}
    assert len(ids) == len(variants)
    monkeypatch.setattr(torch, "__version__", "0")
    ids.add(run_id(SMALL))
    monkeypatch.setattr(twofold, "__version__", "0")
    runs.code_version.cache_clear()
    try:
        ids.add(run_id(SMALL))
    finally:
        runs.code_version.cache_clear()
    assert len(ids) == len(variants) + 2


def test_a_changed_source_is_another_code_version(tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    monkeypatch.setattr(twofold, "__file__", str(tmp_path / "__init__.py"))
    versions = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("lab/training.py", "1"), ("cli.py", "1")):
        (tmp_path / name).write_text(text)
        runs.code_version.cache_clear()
        versions.append(runs.code_version())
    runs.code_version.cache_clear()
    assert len(set(versions[:3])) == 3
    assert versions[3] == versions[2]  # the command line changes no numbers


def test_a_run_directory_holds_what_it_says(directory):
    names = {path.name for path in directory.path.iterdir()}
    assert names == {
        "config.json",
        "environment.json",
        "metrics.csv",
        "weights.safetensors",
        "status.json",
        ".lock",
    }
    assert directory.path.parent.name == "runs"
    run = load_run(directory.path)
    assert (run.id, run.config, run.status, run.error) == (run_id(SMALL), SMALL, "finished", "")
    assert run.metrics.equals(train(SMALL))
    assert run.final == run.metrics.iloc[-1].to_dict()
    environment = json.loads((directory.path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1


def test_the_model_is_the_one_that_was_measured(directory):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model, config = load_model(directory.path)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    final = load_run(directory.path).final
    for name, value in evaluate(model, load(config.data)).items():
        assert final[name] == value


def test_the_table_has_a_row_a_run_with_dotted_fields(tmp_path, directory):
    penalised = replace(SMALL, seed=101, regularizer=RegularizerConfig("gradient_penalty", 0.1, {"p": 2}))
    other = RunDirectory(tmp_path, penalised)
    train(penalised, directory=other)
    ids = [other.id, directory.id]
    table = load_table(tmp_path, ids)
    assert table["id"].tolist() == ids
    assert table["seed"].tolist() == [101, 100]
    assert table["regularizer.strength"].tolist() == [0.1, 0.0]
    assert table["regularizer.options.p"].isna().tolist() == [False, True]
    assert table["test/accuracy"].tolist() == [load_run(d.path).final["test/accuracy"] for d in (other, directory)]
    assert table["metrics"][1].equals(load_run(directory.path).metrics)
    assert sorted(load_table(tmp_path)["id"]) == sorted(ids)
    with pytest.raises(TwofoldError, match=r"absent.*no run directory"):
        load_table(tmp_path, ["absent"])
    assert load_table(tmp_path / "nothing").empty


def test_metrics_come_back_bit_for_bit(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    odd = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, math.inf, math.nan]
    rows = [{"epoch": i, "step": 10 * i, "train/loss": value} for i, value in enumerate(odd)]
    rows[3]["curvature/nme/trace"] = -1 / 7
    with directory.lock():
        directory.begin()
        directory.finish(
            status="finished", rows=rows, model=torch.nn.Linear(1, 1), input_shape=(1,), num_classes=1, seconds=0
        )
    metrics = load_run(directory.path).metrics
    assert metrics["train/loss"].tolist()[:-1] == odd[:-1]
    assert math.isnan(metrics["train/loss"].iloc[-1])
    assert metrics["curvature/nme/trace"].dropna().tolist() == [-1 / 7]
    assert metrics["epoch"].tolist() == list(range(6))


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def garble(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path):
    path.unlink()


def blank(path):
    path.write_bytes(b"")


def append_row(path):
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])


DAMAGES = [
    (name, damage)
    for name in ("weights.safetensors", "metrics.csv", "config.json")
    for damage in (cut, garble, remove, blank)
]
DAMAGES += [("metrics.csv", append_row), ("status.json", cut), ("status.json", blank)]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_run_is_told_left_out_and_redone(tmp_path, directory, name, damage):
    intact = {path.name: path.read_bytes() for path in directory.path.iterdir()}
    damage(directory.path / name)
    with pytest.raises(TwofoldError, match=name):
        load_run(directory.path)
    with pytest.warns(TwofoldWarning, match=name):
        assert load_runs(tmp_path) == []
    computed = []
    with pytest.warns(TwofoldWarning, match=rf"{name}(.|\n)*computed anew"):
        train(SMALL, directory=directory, progress=computed.append)
    assert len(computed) == 3
    for same in ("config.json", "metrics.csv", "weights.safetensors"):
        assert (directory.path / same).read_bytes() == intact[same]
    assert load_run(directory.path).status == "finished"


@pytest.mark.parametrize("content", ["[]", "{}", '{"status": "fine", "sha256": {}}', '{"status": "finished"}'])
def test_a_status_that_says_nothing_is_damage(directory, content):
    (directory.path / "status.json").write_text(content)
    with pytest.raises(TwofoldError, match=r"status\.json is damaged"):
        load_run(directory.path)


def interrupted(out, config):
    """A run that was stopped after its first epoch."""
    directory = RunDirectory(out, config)

    def stop(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, directory=directory, progress=stop)
    return directory


@pytest.mark.parametrize("damage", [cut, garble, blank], ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_told_and_the_run_starts_over(tmp_path, damage):
    directory = interrupted(tmp_path, SMALL)
    damage(directory.path / "checkpoint.safetensors")
    computed = []
    with pytest.warns(TwofoldWarning, match=r"checkpoint\.safetensors(.|\n)*starts over"):
        metrics = train(SMALL, directory=directory, progress=computed.append)
    assert len(computed) == 3
    assert metrics.equals(train(SMALL))


def test_the_checkpoint_of_another_run_is_not_taken(tmp_path):
    there, here = (interrupted(tmp_path, replace(SMALL, seed=seed)) for seed in (3, 4))
    shutil.copy(there.path / "checkpoint.safetensors", here.path)
    with pytest.warns(TwofoldWarning, match=r"that of another run(.|\n)*starts over"):
        metrics = train(here.config, directory=here)
    assert metrics.equals(train(here.config))


def test_the_files_of_another_run_are_not_taken(tmp_path, directory):
    other = RunDirectory(tmp_path, replace(SMALL, seed=3))
    shutil.copytree(directory.path, other.path)
    with pytest.warns(TwofoldWarning, match=r"config\.json is that of another run"):
        assert train(other.config, directory=other).equals(train(other.config))
    assert load_run(other.path).config == other.config


def test_a_directory_of_another_run_is_refused(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    with pytest.raises(TwofoldError, match="that of another run"):
        train(replace(SMALL, seed=3), directory=directory)
    assert not directory.path.exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "weights.safetensors", "status.json"])
def test_what_cannot_be_read_at_the_moment_is_no_damage(directory, name, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    before = {path.name: path.read_bytes() for path in directory.path.iterdir()}
    with monkeypatch.context() as patched:
        read = {"status.json": "read_text"}.get(name, "open")
        original = getattr(Path, read)
        patched.setattr(
            Path, read, lambda path, *args, **kwargs: (refuse if path.name == name else original)(path, *args, **kwargs)
        )
        with pytest.raises(TwofoldError, match=rf"{name} cannot be read \(Too many open files\)"):
            train(SMALL, directory=directory)
    assert {path.name: path.read_bytes() for path in directory.path.iterdir()} == before
    assert directory.result().status == "finished"


def test_an_unfinished_run_is_no_run_yet(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    with directory.lock():
        directory.begin()
    with pytest.raises(TwofoldError, match="has not finished"):
        load_run(directory.path)
    assert load_runs(tmp_path) == []
    assert directory.result() is None


def test_leftovers_of_a_kill_during_a_write_go_away(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    directory.path.mkdir(parents=True)
    leftover = directory.path / ".metrics.csv.123.tmp"
    leftover.write_text("epoch,st")
    train(SMALL, directory=directory)
    assert not leftover.exists()


def test_a_run_that_failed_has_an_error_and_no_model(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    directory.fail("the reason")
    run = load_run(directory.path)
    assert (run.status, run.error, run.final) == ("failed", "the reason", {})
    table = load_table(tmp_path)
    assert table["status"].tolist() == ["failed"]
    with pytest.raises(TwofoldError, match="no weights"):
        load_model(directory.path)


def test_a_diverged_run_is_a_result(tmp_path):
    config = replace(SMALL, optimizer=OptimizerConfig(lr=1e20))
    directory = RunDirectory(tmp_path, config)
    train(config, directory=directory)
    assert load_table(tmp_path)["status"].tolist() == ["diverged"]
    assert directory.result().status == "diverged"
    assert load_model(directory.path)[1] == config


def _compute(out, barrier, seen):
    barrier.wait()
    rows = []
    train(LONG, directory=RunDirectory(out, LONG), progress=rows.append)
    seen.put(len(rows))


LONG = replace(SMALL, epochs=30)


def test_two_processes_compute_a_run_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, seen = context.Barrier(2), context.Queue()
    load(LONG.data)
    processes = [context.Process(target=_compute, args=(tmp_path, barrier, seen)) for _ in range(2)]
    for process in processes:
        process.start()
    counts = sorted(seen.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert counts == [0, 31]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_run(RunDirectory(tmp_path, LONG).path).status == "finished"


def test_an_output_that_cannot_be_written_is_told(tmp_path):
    prepare_output(tmp_path / "new")
    assert not list((tmp_path / "new" / "runs").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(TwofoldError, match=r"cannot be written to.*--out"):
        prepare_output(tmp_path / "file")
