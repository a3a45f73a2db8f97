"""What a hostile machine does to runs and sweeps: full and read-only disks, signals, kills, damaged files."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from lab.test_runs import SMALL
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.lab import files
from twofold.lab.config import ModelConfig, RunConfig
from twofold.lab.files import UnwritableError, write_whole
from twofold.lab.runs import RunDirectory, load_model, load_run, load_runs, run_id
from twofold.lab.sweep import compute, sweep
from twofold.lab.training import train

CONFIGS = [replace(SMALL, seed=seed) for seed in range(4)]
IDS = [run_id(config) for config in CONFIGS]
FILES = ("config.json", "metrics.csv", "weights.safetensors", "status.json")

CLI = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this
from twofold import cli
from twofold.lab import config
recipe = config.RunConfig.from_dict({recipe!r})
config.mnist1d = lambda: recipe
raise SystemExit(cli.main(sys.argv[1:]))
"""


def twofold(*line, recipe: RunConfig = SMALL) -> list[str]:
    """The command line, with a small recipe in the place of mnist1d."""
    return [sys.executable, "-c", CLI.format(recipe=recipe.to_dict()), *map(str, line)]


def called(*line, recipe: RunConfig = SMALL) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines on stderr that are no progress."""
    done = subprocess.run(twofold(*line, recipe=recipe), capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, complaints(done.stderr)


def complaints(err: str) -> list[str]:
    return [line for line in err.splitlines() if " runs" not in line or line.startswith("twofold")]


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def mount(*options) -> bool:
    return subprocess.run(["mount", *map(str, options)], capture_output=True, check=False).returncode == 0


@contextmanager
def read_only(path: Path):
    """A directory that cannot be written to, not even by root."""
    path.mkdir(exist_ok=True)
    mounted = os.geteuid() == 0 and mount("--bind", path, path) and mount("-o", "remount,ro,bind", path)
    before = path.stat().st_mode
    if not mounted:
        assert os.geteuid() != 0, "root can write everywhere where mounting is not permitted"
        for each in [path, *path.rglob("*")]:
            each.chmod(each.stat().st_mode & ~0o222)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", path], check=True)
        else:
            for each in [path, *path.rglob("*")]:
                each.chmod(before)


@contextmanager
def disk(path: Path):
    """A disk of 1 MiB; yields what makes it larger. Where none can be mounted, no file may grow."""
    path.mkdir()
    if os.geteuid() == 0 and mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", path):
        try:
            yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", path], check=True)
        finally:
            subprocess.run(["umount", path], check=True)
    else:
        pytest.fail("a full disk needs `mount -t tmpfs`: run as root") if os.environ.get("CI") else pytest.skip(
            "a full disk needs `mount -t tmpfs`: run as root; ENOSPC itself is tested below"
        )


WIDE = replace(SMALL, model=ModelConfig(width=160, depth=2), epochs=1)  # weights of 130 kB, checkpoints of 260 kB


@pytest.mark.parametrize("command", ["sweep", "train"])
def test_a_full_disk_is_told_in_a_line_and_the_next_start_goes_on(tmp_path, command):
    seeds = range(8)
    with disk(tmp_path / "disk") as enlarge:
        out = tmp_path / "disk" / "out"
        if command == "sweep":
            line = ("sweep", "mnist1d", "--regularizers", "none", "--seeds", *seeds, "--out", out, "--workers", 2)
        else:
            (tmp_path / "disk" / "other").write_bytes(bytes(800_000))
            line = ("train", "mnist1d", "--epochs", 2, "--out", out)
        code, _, told = called(*line, recipe=WIDE)
        assert code == 2
        assert len(told) == 1
        assert told[0].startswith(f"twofold: {out}/runs/")
        assert "(No space left on device). Free some space, and the same command goes on" in told[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kept = load_runs(out)
        assert [run.status for run in kept] == ["finished"] * len(kept)
        assert bool(kept) == (command == "sweep")
        enlarge()
        code, shown, told = called(*line, recipe=WIDE)
        assert (code, told) == (0, [])
        assert not list(out.rglob("*.tmp"))
        runs = load_runs(out)
        assert [run.status for run in runs] == ["finished"] * (8 if command == "sweep" else 1)
        if command == "sweep":
            assert f"{8 - len(kept)} computed, {len(kept)} reused" in shown
        for run in runs:
            assert run.metrics.equals(train(run.config))


def test_a_disk_that_is_full_already_is_told_before_anything_starts(tmp_path):
    with disk(tmp_path / "disk"):
        with pytest.raises(OSError, match="No space"):
            (tmp_path / "disk" / "other").write_bytes(bytes(2 << 20))
        with pytest.raises(UnwritableError, match=r"No space left.*Free some space"):
            sweep(CONFIGS, tmp_path / "disk" / "out", workers=1)
        assert load_runs(tmp_path / "disk" / "out") == []


@pytest.mark.parametrize("failing", ["checkpoint.safetensors", "metrics.csv", "weights.safetensors", "status.json"])
def test_a_disk_that_fills_up_at_any_file_costs_nothing(tmp_path, monkeypatch, failing):
    directory, whole = RunDirectory(tmp_path, SMALL), RunDirectory(tmp_path / "whole", SMALL)
    seen = []

    def full(path, content, *, durable=False):
        if path.name == failing and (failing != "checkpoint.safetensors" or len(seen) > 1):
            path.with_name(f".{path.name}.1.tmp").write_bytes(content[: len(content) // 2])
            raise files.unwritable(path, OSError(28, "No space left on device"))
        write_whole(path, content, durable=durable)

    monkeypatch.setattr("twofold.lab.runs.write_whole", full)
    with pytest.raises(UnwritableError, match=failing):
        train(SMALL, directory=directory, progress=seen.append)
    monkeypatch.undo()
    assert directory.result() is None
    assert load_runs(tmp_path) == []
    again = []
    train(SMALL, directory=directory, progress=again.append)
    assert len(again) == (1 if failing == "checkpoint.safetensors" else 0)  # the rest was in the checkpoint
    train(SMALL, directory=whole)
    for name in FILES[:3]:
        assert (directory.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnwritableError, match="file cannot be written to"):
        write_whole(path, b"new", durable=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_directory_is_told_and_what_it_holds_is_read(tmp_path):
    out = tmp_path / "out"
    sweep(CONFIGS[:2], out, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    line = ("sweep", "mnist1d", "--regularizers", "none", "--out", out, "--workers", 1, "--seeds")
    with read_only(out):
        for command in ((*line, 0, 1, 2), ("train", "mnist1d", "--out", out)):
            code, shown, told = called(*command)
            assert (code, shown) == (2, "")
            assert len(told) == 1
            assert told[0].startswith(f"twofold: {out} cannot be written to (")
            assert "Make it a place that can be written to" in told[0]
        code, shown, told = called(*line, 0, 1)
        assert (code, told) == (0, [])
        assert "0 computed, 2 reused" in shown
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("name", ["runs", "run", ".lock"])
def test_something_else_in_the_place_of_a_directory_is_told(tmp_path, name):
    directory = RunDirectory(tmp_path, SMALL)
    place = {"runs": directory.path.parent, "run": directory.path, ".lock": directory.path / ".lock"}[name]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if name == ".lock" else place.write_text("mine")
    with pytest.raises(UnwritableError, match="cannot be written to"):
        sweep([SMALL], tmp_path, workers=1)
    assert place.is_dir() if name == ".lock" else place.read_text() == "mine"


LONG = replace(SMALL, epochs=400)


@pytest.mark.parametrize(
    ("command", "stop", "said"),
    [
        ("train", signal.SIGHUP, "stopped by SIGHUP"),
        ("sweep", signal.SIGINT, "interrupted"),
        ("sweep", signal.SIGTERM, "stopped by SIGTERM"),
    ],
)
def test_a_stopped_command_says_so_in_a_line_and_goes_on_later(tmp_path, command, stop, said):
    line = (command, "mnist1d", "--out", tmp_path / "out")
    line += ("--seed", 1) if command == "train" else ("--regularizers", "none", "--seeds", 1, "--workers", 1)
    directory = RunDirectory(tmp_path / "out", replace(LONG, seed=1))
    arguments = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(twofold(*line, recipe=LONG), **arguments) as process:
        wait_until((directory.path / "checkpoint.safetensors").exists)
        (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)  # Ctrl-C reaches the whole group
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + stop
    assert complaints(err) == [f"twofold: {said}; finished runs are kept, the same command goes on."]
    wait_until(lambda: not directory.is_busy())
    epochs = directory.read_checkpoint()[1]["epoch"]
    computed = []
    metrics = train(directory.config, directory=directory, progress=computed.append)
    assert 0 < len(computed) == 400 - epochs
    assert metrics.equals(train(directory.config))


# two sweeps in one directory

SWEEP = """
import sys, time
from pathlib import Path
from twofold.lab.config import RunConfig
from twofold.lab.sweep import compute, sweep
configs = [RunConfig.from_dict(values) for values in {configs!r}]
out, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def logged(directory, data_dir):
    with log.open("a") as file:
        file.write(directory.id + " ")
    time.sleep(seconds)
    return compute(directory, data_dir)
sweep([], out)  # everything is imported
print("ready", flush=True)
sys.stdin.readline()
result = sweep(configs, out, workers=1, compute=logged)
print(len(result.finished), result.reused, flush=True)
"""


@contextmanager
def two_sweeps(tmp_path, seconds):
    script = SWEEP.format(configs=[config.to_dict() for config in CONFIGS])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path / "out", tmp_path / f"log-{i}", f"{s}"], **pipes)
        for i, s in enumerate(seconds)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_two_sweeps_share_the_work_and_do_no_run_twice(tmp_path):
    with two_sweeps(tmp_path, (0.5, 0.5)) as processes:
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        told = [tuple(map(int, process.stdout.readline().split())) for process in processes]
    logs = [(tmp_path / f"log-{i}").read_text().split() for i in range(2)]
    assert sorted(logs[0] + logs[1]) == sorted(IDS)
    assert all(logs)  # both did some
    assert told == [(4, 4 - len(log)) for log in logs]


def test_a_sweep_takes_over_what_a_killed_one_held(tmp_path):
    with two_sweeps(tmp_path, (1000, 0)) as (first, second):
        first.stdin.write("\n")
        first.stdin.flush()
        wait_until((tmp_path / "log-0").exists)
        second.stdin.write("\n")
        second.stdin.flush()
        held = (tmp_path / "log-0").read_text().strip()
        wait_until(lambda: len(load_runs(tmp_path / "out")) == 3)  # all but that
        first.kill()
        assert second.stdout.readline().split() == ["4", "0"]
    assert (tmp_path / "log-1").read_text().split()[-1] == held
    assert [run.status for run in load_runs(tmp_path / "out")] == ["finished"] * 4


def test_a_worker_that_is_killed_from_outside_costs_nothing(tmp_path):
    victim = tmp_path / "pid"

    def told(directory, data_dir):
        if directory.config.seed == 1 and not victim.exists():
            victim.with_name("new").write_text(str(os.getpid()))
            victim.with_name("new").rename(victim)
            time.sleep(1000)
        return compute(directory, data_dir)

    def kill():
        wait_until(victim.exists)
        os.kill(int(victim.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.warns(TwofoldWarning, match="A worker died: killed, out of memory, or crashed; .* tried once more"):
        result = sweep(CONFIGS, tmp_path, workers=2, compute=told)
    thread.join()
    assert result.finished == tuple(IDS)


# damaged files


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    train(SMALL, directory=directory)
    return directory


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_the_place_of_a_file_is_moved_aside(tmp_path, directory, name):
    path = directory.path / name
    path.unlink()
    path.mkdir()
    (path / "mine").write_text("kept")
    with pytest.raises(TwofoldError, match=name):
        load_run(directory.path)
    with pytest.warns(TwofoldWarning) as told:
        result = sweep([SMALL], tmp_path, workers=1)
    assert any(f"{name} is damaged: Is a directory. The run is computed anew." in str(w.message) for w in told)
    assert (result.finished, result.reused) == ((directory.id,), 0)
    assert (directory.path / f"{name}.moved-1" / "mine").read_text() == "kept"
    assert load_run(directory.path).metrics.equals(train(SMALL))


def test_a_directory_in_the_place_of_a_checkpoint_is_moved_aside(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    (directory.path / "checkpoint.safetensors" / "mine").mkdir(parents=True)
    with pytest.warns(TwofoldWarning, match=r"was a directory; it is checkpoint.safetensors.moved-1 now"):
        train(SMALL, directory=directory)
    assert (directory.path / "checkpoint.safetensors.moved-1" / "mine").is_dir()


def forge(directory: RunDirectory, name: str, content: bytes) -> None:
    """Put other content in a file, and its checksum in the status."""
    (directory.path / name).write_bytes(content)
    status = json.loads((directory.path / "status.json").read_text())
    status["sha256"][name] = sha256(content).hexdigest()
    (directory.path / "status.json").write_text(json.dumps(status))


FORGED = {
    "config.json": [
        *(b"", b"7", b"\xff\xfe", b"[" * 100_000, b'{"data": null}', b'{"model": {"name": []}}', b'{"seed": "x"}'),
        *(b'{"optimizer": {"lr": 1' + b"0" * 400 + b"}}", b'{"regularizer": {"options": 5}}'),
    ],
    "metrics.csv": [b"", b"epoch,step\n1\n", b"epoch\nx\n", b"epoch\nnan\n", b"epoch\n\x00\n", b"\xff"],
    "weights.safetensors": [b"", b"\xff" * 64, b"PK\x03\x04", (8).to_bytes(8, "little") + b"{}      "],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in FORGED.items() for content in contents],
    ids=[f"{name}-{i}" for name, contents in FORGED.items() for i in range(len(contents))],
)
def test_files_of_other_content_with_a_right_checksum_are_told(tmp_path, directory, name, content):
    forge(directory, name, content)
    with pytest.raises(TwofoldError, match=name):
        load_model(directory.path)
    if name != "weights.safetensors":  # weights are read where they are needed
        with pytest.warns(TwofoldWarning, match=rf"{name}(.|\n)*left out"):
            assert load_runs(tmp_path) == []


STATUSES = ["7", "null", '{"status": ["finished"], "sha256": {}}', '{"status": "finished", "sha256": []}']
STATUSES += ['{"status": "finished", "sha256": {"config.json": 5}}', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]


@pytest.mark.parametrize("number", range(len(STATUSES)))
def test_a_status_of_wrong_types_is_told_and_the_run_computed_anew(tmp_path, directory, number):
    (directory.path / "status.json").write_text(STATUSES[number])
    with pytest.warns(TwofoldWarning, match=r"damaged(.|\n)*computed anew"):
        assert sweep([SMALL], tmp_path, workers=1).reused == 0
    assert load_run(directory.path).status == "finished"


def test_odd_details_of_a_status_do_no_harm(directory):
    (directory.path / "status.json").write_text('{"status": "failed", "sha256": {}, "error": [1], "tracking": "x"}')
    run = load_run(directory.path)
    assert (run.error, run.tracking) == ("[1]", {})


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_and_checkpoints_are_never_unpickled(tmp_path, directory):
    sign = tmp_path / "executed"
    content = pickle.dumps(Hostile(sign))
    pickle.loads(content)
    sign.rmdir()  # it would have worked
    forge(directory, "weights.safetensors", content)
    with pytest.raises(TwofoldError, match=r"weights\.safetensors is damaged"):
        load_model(directory.path)
    other = RunDirectory(tmp_path, CONFIGS[1])
    other.path.mkdir(parents=True)
    (other.path / "checkpoint.safetensors").write_bytes(content)
    with pytest.warns(TwofoldWarning, match="starts over"):
        train(CONFIGS[1], directory=other)
    assert not sign.exists()
