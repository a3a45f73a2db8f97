import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

from twofold.errors import TwofoldError
from twofold.lab import runs
from twofold.lab.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from twofold.lab.files import UnreadableError
from twofold.lab.runs import RunDirectory, load_run, load_runs, run_id
from twofold.lab.sweep import compute, sweep
from twofold.lab.training import train

SMALL = RunConfig(
    data=DataConfig(num_train=200, num_validation=50, num_test=60, label_noise=0.3),
    model=ModelConfig(width=8, depth=1),
    epochs=2,
    batch_size=64,
)
CONFIGS = [replace(SMALL, seed=seed) for seed in range(4)]
IDS = [run_id(config) for config in CONFIGS]


def test_numbers_do_not_depend_on_workers_or_order(tmp_path):
    told = []
    one = sweep(CONFIGS, tmp_path / "one", workers=1, progress=lambda *args: told.append(args))
    two = sweep(CONFIGS[::-1], tmp_path / "two", workers=2)
    assert one.finished == tuple(IDS)
    assert two.finished == tuple(IDS[::-1])
    assert [(done, total) for done, total, _ in told] == [(done, 4) for done in range(5)]
    assert told[0][2] is None
    assert told[-1][2] == 0
    for name in IDS:
        first, second = (tmp_path / out / "runs" / name for out in ("one", "two"))
        for file in ("metrics.csv", "weights.safetensors", "config.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
    assert load_run(tmp_path / "one" / "runs" / IDS[0]).metrics.equals(train(CONFIGS[0]))


def test_results_are_reused_and_equal_runs_are_run_once(tmp_path):
    train(CONFIGS[0], directory=RunDirectory(tmp_path, CONFIGS[0]))
    result = sweep([*CONFIGS[:2], CONFIGS[1]], tmp_path, workers=1)
    assert (result.finished, result.reused) == (tuple(IDS[:2]), 1)
    told = []
    again = sweep(CONFIGS[:2], tmp_path, progress=lambda *args: told.append(args))
    assert (again.finished, again.reused) == (tuple(IDS[:2]), 2)
    assert told == [(2, 2, None)]
    assert sweep([], tmp_path).finished == ()


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path):
    misfit = replace(SMALL, model=ModelConfig("wideresnet", width=1, depth=10))
    diverging = replace(SMALL, optimizer=OptimizerConfig(lr=1e20))
    result = sweep([misfit, diverging, CONFIGS[0]], tmp_path, workers=2)
    assert result.finished == (IDS[0],)
    assert result.diverged == (run_id(diverging),)
    assert list(result.failed) == [run_id(misfit)]
    assert result.failed[run_id(misfit)].startswith("twofold.errors.TwofoldError: A WideResNet takes images")
    run = load_run(tmp_path / "runs" / run_id(misfit))
    assert run.status == "failed"
    assert run.error.startswith("Traceback")
    assert sweep([misfit], tmp_path, workers=1).failed == result.failed  # tried again, not taken as a result


def test_a_run_that_fails_before_it_begins_is_recorded(tmp_path):
    def nothing(directory, data_dir):
        raise ValueError("on purpose")

    result = sweep(CONFIGS[:1], tmp_path, workers=1, compute=nothing)
    assert result.failed == {IDS[0]: "ValueError: on purpose"}
    assert "on purpose" in load_run(tmp_path / "runs" / IDS[0]).error


def test_a_file_that_cannot_be_read_stops_the_sweep_and_blames_no_run(tmp_path):
    def unreadable(directory, data_dir):
        raise UnreadableError("metrics.csv cannot be read (too many open files).")

    with pytest.raises(UnreadableError, match="too many open files"):
        sweep(CONFIGS[:1], tmp_path, workers=1, compute=unreadable)
    assert not (tmp_path / "runs" / IDS[0] / "status.json").exists()


def test_a_worker_with_other_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "code_version", lambda: "0+another")
    with pytest.raises(
        TwofoldError, match=r"could not be started: the code or torch of this worker \(\S+, \S+\) is not"
    ):
        sweep(CONFIGS[:1], tmp_path, workers=1)
    assert not (tmp_path / "runs" / run_id(CONFIGS[0])).exists()


def test_a_run_whose_worker_dies_once_is_retried(tmp_path):
    marker = str(tmp_path / "died")

    def die_once(directory, data_dir):
        if directory.config.seed == 1 and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(directory, data_dir)

    result = sweep(CONFIGS, tmp_path, workers=2, compute=die_once)
    assert result.finished == tuple(IDS)
    assert os.path.exists(marker)


def test_a_run_whose_worker_dies_twice_fails_alone(tmp_path):
    deaths = tmp_path / "deaths"

    def die(directory, data_dir):
        if directory.config.seed == 1:
            with deaths.open("a") as file:
                file.write("x")
            os._exit(3)
        return "finished"  # what the others compute is of no matter here

    result = sweep(CONFIGS, tmp_path, workers=2, compute=die)
    assert result.finished == (IDS[0], IDS[2], IDS[3])
    assert list(result.failed) == [IDS[1]]
    assert "died twice" in result.failed[IDS[1]]
    assert deaths.read_text() == "xx"
    assert "died twice" in load_run(tmp_path / "runs" / IDS[1]).error


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TwofoldError, match="cannot be written"):
        sweep(CONFIGS, tmp_path / "file")
    for workers in (0, -1, 1.5, True):
        with pytest.raises(TwofoldError, match=f"workers is {workers}"):
            sweep(CONFIGS, tmp_path, workers=workers)
    too_many = replace(SMALL, data=replace(SMALL.data, num_train=5000))
    with pytest.raises(TwofoldError, match="only 4000"):
        sweep([CONFIGS[0], too_many], tmp_path)
    assert not list((tmp_path / "runs").iterdir())


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("stop", "returned"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_sweep_keeps_finished_runs_and_leaves_no_process(tmp_path, stop, returned):
    script = f"""
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from twofold.lab.config import RunConfig
from twofold.lab.sweep import sweep
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
small = RunConfig.from_dict({SMALL.to_dict()!r})
configs = [small, replace(small, epochs=10**6)]
def tell(done, total, seconds_left):
    print(done, flush=True)
try:
    sweep(configs, Path(sys.argv[1]), workers=1, progress=tell)
except KeyboardInterrupt:
    sys.exit(130)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert [process.stdout.readline().strip() for _ in range(2)] == ["0", "1"]
            wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint.safetensors")))
            os.kill(process.pid, stop)
            assert process.wait(timeout=30) == returned
            wait_until(lambda: not is_alive(process.pid))
        finally:
            if is_alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    assert [run.status for run in load_runs(tmp_path)] == ["finished"]
    assert len(list(tmp_path.glob("runs/*/checkpoint.safetensors"))) == 1


def test_what_another_sweep_computes_is_left_for_later(tmp_path):
    first = RunDirectory(tmp_path, CONFIGS[0])
    seen = []
    with ExitStack() as stack:
        stack.enter_context(first.lock())
        assert first.is_busy()

        def tell(done: int, total: int, left: float | None) -> None:
            seen.append((done, first.has_result()))
            if done == 1:
                stack.close()

        result = sweep(CONFIGS[:2], tmp_path, workers=1, progress=tell)
    assert seen == [(0, False), (1, False), (2, True)]
    assert result.finished == tuple(IDS[:2])
    assert not first.is_busy()
