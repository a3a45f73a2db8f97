"""The same sweep on every place, with the same results and the same ways to fail."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from lab.one_node_slurm import missing, one_node_slurm
from lab.test_sweep import CONFIGS, IDS
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.lab.files import UnwritableError
from twofold.lab.places import WorkerDiedError, find_place
from twofold.lab.runs import load_run
from twofold.lab.sweep import compute, sweep


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    """The text that names a place which is up."""
    name = request.param
    if name == "slurm":
        reason = missing()
        if reason is not None:
            assert not os.environ.get("CI"), reason
            pytest.skip(reason)
        with one_node_slurm(tmp_path_factory.mktemp("slurm")) as environment, pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            yield "slurm:timeout_min=5"
        return
    ray = pytest.importorskip("ray")
    yield name
    ray.shutdown()


@pytest.mark.xdist_group("clusters")
@pytest.mark.parametrize("cluster", ["ray", "slurm"], indirect=True)
def test_a_cluster_computes_what_this_machine_does(cluster, tmp_path):
    there = sweep(CONFIGS[:2], tmp_path / "there", place=cluster, workers=2)
    here = sweep(CONFIGS[:2], tmp_path / "here", workers=1)
    assert there.finished == here.finished == tuple(IDS[:2])
    for name in IDS[:2]:
        first, second = (tmp_path / out / "runs" / name for out in ("there", "here"))
        for file in ("metrics.csv", "weights.safetensors", "config.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
    assert sweep(CONFIGS[:2], tmp_path / "there", place=cluster).reused == 2


@pytest.mark.xdist_group("clusters")
@pytest.mark.parametrize("cluster", ["ray", "slurm"], indirect=True)
def test_a_worker_that_dies_on_a_cluster_costs_its_run_one_retry(cluster, tmp_path):
    deaths = tmp_path / "deaths"

    def die(directory, data_dir):
        died = deaths.read_text() if deaths.exists() else ""
        if directory.config.seed == 1 or (directory.config.seed == 2 and "2" not in died):
            with deaths.open("a") as file:
                file.write(str(directory.config.seed))
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(directory, data_dir)

    result = sweep(CONFIGS[:3], tmp_path, place=cluster, workers=2, compute=die)
    assert result.finished == (IDS[0], IDS[2])
    assert list(result.failed) == [IDS[1]]
    assert "died twice" in load_run(tmp_path / "runs" / IDS[1]).error
    assert sorted(deaths.read_text()) == ["1", "1", "2"]


@pytest.mark.xdist_group("clusters")
@pytest.mark.parametrize("cluster", ["ray", "slurm"], indirect=True)
def test_a_disk_that_is_full_on_a_cluster_ends_the_sweep_and_the_next_goes_on(cluster, tmp_path):
    sign = tmp_path / "full"
    sign.touch()

    def fill(directory, data_dir):
        if sign.exists() and directory.config.seed == 1:
            raise UnwritableError("No space left on the device of a node.")
        return compute(directory, data_dir)

    with pytest.raises(UnwritableError, match=r"No space left on the device of a node\."):
        sweep(CONFIGS[:2], tmp_path, place=cluster, workers=1, compute=fill)
    sign.unlink()
    result = sweep(CONFIGS[:2], tmp_path, place=cluster, workers=1, compute=fill)
    assert (result.finished, result.reused) == (tuple(IDS[:2]), 1)


@pytest.mark.xdist_group("clusters")
@pytest.mark.parametrize("cluster", ["slurm"], indirect=True)
def test_a_result_that_is_cut_off_on_slurm_is_a_death(cluster, tmp_path):
    sign = tmp_path / "once"

    def cut(directory, data_dir):
        if not sign.exists():
            sign.touch()
            from submitit import JobEnvironment

            JobEnvironment().paths.result_pickle.write_bytes(b"\x80\x05")
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(directory, data_dir)

    with pytest.warns(TwofoldWarning, match="A worker died"):
        assert sweep(CONFIGS[:1], tmp_path, place=cluster, workers=1, compute=cut).finished == (IDS[0],)


@pytest.mark.xdist_group("clusters")
@pytest.mark.parametrize("cluster", ["slurm"], indirect=True)
def test_a_job_that_slurm_does_not_take_is_told(cluster, tmp_path):
    with pytest.raises(TwofoldError, match="Slurm does not take the job"):
        sweep(CONFIGS[:1], tmp_path, place=f"{cluster},slurm_partition=moon", workers=1)


@pytest.mark.parametrize(
    ("text", "workers", "message"),
    [
        ("moon", None, "no place 'moon'.*local, ray, slurm"),
        ("local:2", None, "no place"),
        ("local", 0, "workers is 0"),
        ("slurm:timeout_min", None, "timeout_min has no value"),
        ("slurm:nonsense=1", None, "Slurm cannot be used"),
    ],
    ids=str,
)
def test_places_that_cannot_be_used(text, workers, message, tmp_path):
    with pytest.raises(TwofoldError, match=message):
        find_place(text, workers, tmp_path)
    assert not list(Path(tmp_path).iterdir())


def gpu_after(seconds: float) -> str:
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("allowed", "names"), [(None, {"0", "1"}), ("3,5", {"3", "5"})])
def test_workers_on_this_machine_have_a_gpu_each(monkeypatch, tmp_path, allowed, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if allowed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    place = find_place("local", None, tmp_path, gpus=1)
    assert place.slots == 2
    try:
        assert {future.result() for future in [place.submit(gpu_after, 1.0) for _ in range(2)]} == names
        assert isinstance(place.submit(die).exception(), WorkerDiedError)
        assert {future.result() for future in [place.submit(gpu_after, 1.0) for _ in range(2)]} == names
    finally:
        place.stop()
