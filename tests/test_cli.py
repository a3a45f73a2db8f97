import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import twofold
from twofold import cli
from twofold.lab import config as lab_config
from twofold.lab import sweep as lab_sweep
from twofold.lab.figures import figure_conv, figure_transformer
from twofold.lab.figures.scales import SCALES
from twofold.lab.recipes import RECIPES

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "sweep", "reproduce", "report", "measure", "data")
TINY = replace(
    lab_config.mnist1d(),
    data=lab_config.DataConfig(num_train=60, num_validation=30, num_test=40, label_noise=0.3),
    model=lab_config.ModelConfig(width=4, depth=1),
    epochs=1,
    batch_size=30,
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every command starts in an empty directory, with tiny recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TWOFOLD_DATA", raising=False)
    monkeypatch.setitem(RECIPES, "mnist1d", lambda: TINY)
    for module, recipe in ((figure_transformer, "transformer"), (figure_conv, "conv")):
        monkeypatch.setattr(module, recipe, lambda: TINY)  # the real ones start from mnist1d
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], recipes={"mnist1d": lambda: TINY}, seeds=(100,)))


@pytest.fixture
def run(capsys):
    """Run a command line; gives exit code, stdout and stderr."""

    def run(line: str):
        try:
            code = cli.main(line.split())
        except SystemExit as leaving:
            code = leaving.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, shown, _ = run(f"{command} --help")
    assert code == 0
    on_screen = [piece for line in shown.splitlines() for piece in (re.findall(".{1,80}", line) or [""])]
    assert len(on_screen) <= 24
    boxes = [line for line in shown.splitlines() if "show this help message" in line or "options" in line]
    assert boxes
    assert all(len(line) <= 80 for line in boxes)


def test_version_and_no_arguments(run):
    assert run("--version") == (0, f"twofold {twofold.__version__}\n", "")
    code, out, _ = run("")
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("reproduce 99", "no figure '99'"),
        ("reproduce one", "no figure 'one'"),
        ("reproduce --data cifar10", "does not run 'cifar10'"),
        ("reproduce --scale paper --data mnist1d", "does not run 'mnist1d'"),
        ("reproduce --scale smoke --workers 0", "workers"),
        ("reproduce --scale smoke --out file/out", "cannot be written"),
        ("report .", "no reproduction"),
        ("report missing", "no reproduction"),
        ("measure .", "no run directory"),
        ("train svhn", "no recipe 'svhn'; known: mnist1d"),
        ("train mnist1d --activation cubic", "cubic"),
        ("train mnist1d --regularizer magic", "magic"),
        ("train mnist1d --regularizer sam --strength -1", "strength"),
        ("train mnist1d --regularizer sam --strength nan", "strength"),
        ("train mnist1d --epochs 0", "epochs"),
        ("train mnist1d --out file", "cannot be written"),
        ("sweep mnist1d --seeds", "nothing to run"),
        ("data fetch svhn", "no data set 'svhn'"),
    ],
)
def test_errors_are_one_clear_line(run, tmp_path, line, said):
    (tmp_path / "file").write_text("kept")
    code, out, err = run(line)
    assert code == 2
    assert out == ""
    assert err.startswith("twofold: ")
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3
    assert [path.name for path in tmp_path.rglob("status.json")] == []
    assert (tmp_path / "file").read_text() == "kept"


def test_a_run_that_diverges_is_told(run):
    line = "train mnist1d --regularizer sam --strength 1e30 --epochs 1 --out out"
    for start in ("diverged: out", "already there, diverged: out"):
        code, out, err = run(line)
        assert (code, err) == (0, "")
        assert out.splitlines()[-1].startswith(start)


@pytest.mark.parametrize("line", ["reproduce --scale huge", "unknown", "train", "train mnist1d --seed x", "report"])
def test_wrong_usage(run, line):
    code, out, err = run(line)
    assert code == 2
    assert out == ""
    assert "--help" in err
    assert "Traceback" not in err


def test_missing_data_is_refused_before_any_run(run, tmp_path, monkeypatch):
    from twofold.lab.data import fashion_mnist

    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    for line in ("reproduce --data fashion-mnist --out out", "train fashion-mnist --out out"):
        code, _, err = run(line)
        assert code == 2
        assert "twofold data fetch fashion-mnist" in err
        assert not list(tmp_path.glob("out/runs/*"))
    assert run("data fetch imagenet")[0] == 1
    code, out, _ = run("data list")
    assert code == 0
    assert "mnist1d: ready, 4000 training" in out
    assert "fashion-mnist: Fashion-MNIST was not found" in out


def test_debug_shows_the_traceback(run):
    code, _, err = run("train svhn --debug")
    assert code == 2
    assert "Traceback" in err
    assert "no recipe 'svhn'" in err


def test_an_unexpected_error_is_short_too(run, monkeypatch):
    monkeypatch.setitem(RECIPES, "mnist1d", lambda: 1 / 0)
    code, _, err = run("train mnist1d")
    assert (code, err) == (2, "twofold: ZeroDivisionError: division by zero (--debug shows where)\n")


def test_interrupt(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(RECIPES, "mnist1d", interrupted)
    code, out, err = run("train mnist1d")
    assert (code, out) == (130, "")
    assert len(err.splitlines()) == 1
    assert "interrupted" in err


@pytest.mark.parametrize(("scale", "unit"), [("smoke", "core-minutes"), ("paper", "GPU-hours")])
def test_a_dry_run_tells_costs_and_runs_nothing(run, tmp_path, scale, unit):
    code, out, err = run(f"reproduce 1 3 --scale {scale} --dry-run --out there")
    assert (code, err) == (0, "")
    assert unit in out
    assert "TFLOP/s" in out
    assert [line.split()[0] for line in out.splitlines() if re.match(r" (1|3|all) ", line)] == (
        ["1", "3", "all"] if scale == "smoke" else ["1", "1", "1", "3", "all"]
    )
    assert not list(tmp_path.iterdir())
    if scale == "smoke":
        run("reproduce 1 --scale smoke --out there")
        _, after, _ = run(f"reproduce 1 --scale {scale} --dry-run --out there")
        runs, there, hours = next(line for line in after.splitlines() if line.startswith(" all ")).split()[-3:]
        assert (there, hours) == (runs, "0")


def test_train_then_measure(run):
    code, out, err = run(
        "train mnist1d --regularizer sam --strength 0.1 --seed 7 --activation relu --epochs 2 --out here"
    )
    assert (code, err) == (0, "")
    assert "epoch   2" in out
    directory = Path(out.splitlines()[-1].removeprefix("done: "))
    config = json.loads((directory / "config.json").read_text())
    assert config["regularizer"]["name"] == "sam"
    assert (config["seed"], config["epochs"], config["model"]["activation"]) == (7, 2, "relu")
    code, again, _ = run(
        "train mnist1d --regularizer sam --strength 0.1 --seed 7 --activation relu --epochs 2 --out here"
    )
    assert code == 0
    assert f"already there: {directory}" in again
    assert [line for line in again.splitlines() if line.startswith("epoch   2")] == [
        line for line in out.splitlines() if line.startswith("epoch   2")
    ]

    code, out, err = run(f"measure {directory} --num-probes 8 --out run.json")
    assert code == 0
    assert "60 of 60 training examples (labels as trained on)" in out
    loaded = twofold.CurvatureReport.load("run.json")
    assert str(loaded) in out
    assert loaded.policy["mode"] == "eval mode"
    assert loaded.traces["hessian"].num_matvecs == 8
    assert run(f"measure {directory} --num-examples 0")[0] == 2
    code, out, _ = run(f"measure {directory} --num-probes 2 --num-examples 20 --mode train")
    assert code == 0
    assert "20 of 60 training examples" in out
    assert "train mode" in out


OWN = """
import torch
from torch import nn
torch.manual_seed(0)
X, Y = torch.randn(6, 3), torch.randint(2, (6,))
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
def good(): return MODEL, nn.CrossEntropyLoss(), [(X[:4], Y[:4]), (X[4:], Y[4:])]
def mapped(): return MODEL, nn.CrossEntropyLoss(), {"x": X, "y": Y}, {"forward": lambda m, b: (m(b["x"]), b["y"])}
def two(): return MODEL, nn.CrossEntropyLoss()
def swapped(): return nn.functional.mse_loss, MODEL, (X, Y)
def nothing(): pass
def broken(): return 1 / 0
def needy(x): return x
NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "bad.py").write_text("import nowhere_to_be_found")
    (tmp_path / "worse.py").write_text("1 / 0")
    (tmp_path / "json.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("own", "bad", "worse"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("target", ["own.py:good", "own:good", "./json.py:good", "own:mapped"])
def test_measure_a_model_of_ones_own(run, own, target):
    code, out, err = run(
        f"measure {target} --num-probes 4 --out report.json --plot figure.png --params 2.* --mode eval"
    )
    assert code == 0, err
    assert target in out
    loaded = twofold.CurvatureReport.load("report.json")
    assert str(loaded) in out
    assert "report: report.json" in out
    assert loaded.num_parameters == 10
    assert loaded.policy["num_batches"] == (1 if "mapped" in target else 2)
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")
    assert "measuring: probes" in err
    assert "peak memory" in out
    assert json.dumps({}) == "{}"  # a file called json.py shadows nothing


def test_measure_the_example(run, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, out, err = run(f"measure {ROOT / 'examples' / 'measure_gpt2.py'}:tiny --budget 3s --num-probes 2")
    assert code == 0, err
    assert "29,696 parameters" in out
    example = sys.modules["twofold_target_measure_gpt2"]
    with torch.device("meta"):
        model = example.GPT(example.VOCABULARY, example.LENGTH, example.LAYERS, example.HEADS, example.WIDTH)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808  # GPT-2 small


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("missing.py:good", "missing.py does not exist"),
        ("missing:good", "no module 'missing'"),
        ("own.deeper:good", "own.deeper"),
        ("own.py:absent", "no function 'absent'; it defines good, mapped"),
        ("own.py:NUMBER", "no function 'NUMBER'"),
        ("own.py:two", "expected (model, loss_fn, data)"),
        ("own.py:swapped", "expected (model, loss_fn, data)"),
        ("own.py:nothing", "returned NoneType"),
        ("own.py:broken", "raised ZeroDivisionError"),
        ("own.py:needy", "missing 1 required positional argument"),
        ("own.py:", "'own.py:' names no function; expected a run's directory, module:function or file.py:function"),
        (":good", "':good' names no module"),
        ("bad.py:f", "No module named 'nowhere_to_be_found'"),
        ("worse.py:f", "ZeroDivisionError"),
        ("nowhere", "nowhere does not exist"),
        ("own.py:good --budget soon", "budget is a positive time"),
        ("own.py:good --params nothing.*", "'nothing.*' matches no parameter"),
        ("own.py:good --num-examples 3", "--num-examples is for runs"),
        ("own.py:good --num-probes 1", "num_probes"),
        ("own.py:good --out missing/report.json", "there is no directory missing"),
        ("own.py:good --plot figure.xyz", "ends in .png"),
    ],
)
def test_measure_says_what_cannot_be_measured(run, own, line, said):
    code, out, err = run(f"measure {line}")
    assert (code, out) == (2, "")
    errors = [shown for shown in err.splitlines() if not shown.startswith("measuring")]
    assert errors[0].startswith("twofold: ")
    assert said in " ".join(errors)
    assert "Traceback" not in err
    assert len(errors) <= 3


def test_sweep(run):
    code, out, err = run("sweep mnist1d --regularizers none sam --strengths 0.1 0.2 --seeds 1 2 --out here --workers 1")
    assert code == 0
    assert "6/6 runs" in err
    assert "runs: 6 computed, 0 reused" in out
    for row in ("gelu none 0", "gelu sam 0.1", "gelu sam 0.2"):
        assert row in out
    code, out, _ = run("sweep mnist1d --regularizers sam --strengths 0.1 --seeds 1 2 3 --out here --workers 1")
    assert "runs: 1 computed, 2 reused" in out


def test_reproduce_then_report(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["twofold", *["reproduce", "1", "--scale", "smoke", "--out"], "my out", "--debug"])
    code = cli.main()
    assert code == 0
    out = tmp_path / "my out"
    html = (out / "report.html").read_text()
    assert "twofold reproduce 1 --scale smoke --out &#39;my out&#39;" in html
    code, text, err = run("reproduce 1 --scale smoke --out my_out")
    assert code == 0
    assert "PSAM follows SAM" in text
    assert "undecided" in text
    assert "page: my_out/report.html" in text
    assert "10/10 runs" in err
    first = (out / "verdicts.json").read_bytes()
    assert first == (tmp_path / "my_out" / "verdicts.json").read_bytes()
    code, text, _ = run("report my_out")
    assert code == 0
    assert "page: my_out/report.html" in text


def test_a_failed_run_is_told_and_the_report_written(run, tmp_path, monkeypatch):
    def no_luck(compute, task, data_dir):
        task.directory.fail("RuntimeError: no luck")
        return lab_sweep._Outcome("failed", "RuntimeError: no luck")

    monkeypatch.setattr(lab_sweep, "_work", no_luck)
    code, out, err = run("reproduce 1 --scale smoke --workers 1 --out here")
    assert code == 1
    assert "failed: RuntimeError: no luck" in err
    assert "undecided" in out
    assert "10 runs failed" in (tmp_path / "here" / "report.html").read_text()


def test_importing_twofold_loads_no_command_line_or_lab():
    unwanted = ("twofold.cli", "twofold.lab", "tyro", "rich", "matplotlib")
    code = f"import sys, twofold; print([name for name in {unwanted} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
