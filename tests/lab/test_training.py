import json
import math
import os
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import twofold
from twofold.errors import NotFiniteError, TwofoldError
from twofold.lab import training
from twofold.lab.building import build_backward, build_regularizer
from twofold.lab.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RegularizerConfig,
    RunConfig,
    mnist1d,
)
from twofold.lab.data import load
from twofold.lab.evaluation import PARTS, evaluate
from twofold.lab.models import build
from twofold.lab.runs import RunDirectory, load_model, load_run
from twofold.lab.seeding import derive_generator, derive_seed
from twofold.lab.training import learning_rate, train

SMALL = RunConfig(
    data=DataConfig(num_train=200, num_validation=50, num_test=60, label_noise=0.2),
    model=ModelConfig(width=16, depth=2, norm="batch"),
    epochs=4,
    batch_size=64,
)
STEPS = 16  # 4 epochs of 4 steps, the last of each with 8 examples


@contextmanager
def raising(error: BaseException, step: int):
    """Training that raises just before this step."""

    def rate(config: RunConfig, at: int, *rest: int) -> float:
        if at == step:
            raise error
        return learning_rate(config, at, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "learning_rate", rate)
        yield


def weights(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return load_model(directory.path)[0].state_dict()


def assert_same_weights(first: RunDirectory, second: RunDirectory) -> None:
    expected = weights(second)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, expected[name]), name


def test_is_sgd_with_cosine_decay_on_the_shuffled_data():
    config = replace(SMALL, model=ModelConfig(width=8, depth=1), warmup_epochs=1)
    data = load(config.data)
    model = build(config.model, data.input_shape, 10, derive_seed("model", config.seed))
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    for step in range(STEPS):
        epoch, i = divmod(step, 4)
        order = torch.randperm(200, generator=derive_generator("shuffle", config.seed, epoch + 1))
        chosen = order[64 * i : 64 * (i + 1)]
        loss = F.cross_entropy(model(data.train.inputs[chosen]), data.train.targets[chosen])
        lr = 0.05 * (step + 1) / 4 if step < 4 else 0.05 * (1 + math.cos(math.pi * (step - 4) / 12)) / 2
        with torch.no_grad():
            for p, m, g in zip(parameters, momenta, torch.autograd.grad(loss, parameters), strict=True):
                m.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(lr * m)
    final = train(config).iloc[-1]
    for name in ("train", "validation", "test"):
        inputs, targets = getattr(data, name)
        outputs = model(inputs)
        assert final[f"{name}/loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-5)
        assert final[f"{name}/accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item())


def test_metrics_have_a_row_an_epoch_from_before_training_on():
    seen = []
    metrics = train(SMALL, progress=seen.append)
    assert metrics["epoch"].tolist() == [0, 1, 2, 3, 4]
    assert metrics["step"].tolist() == [0, 4, 8, 12, 16]
    assert seen == metrics.to_dict("records")
    assert metrics["train/loss"].iloc[-1] < metrics["train/loss"].iloc[0]


@pytest.mark.parametrize(("max_steps", "steps"), [(3, [0, 3]), (4, [0, 4]), (6, [0, 4, 6]), (100, [0, 4, 8, 12, 16])])
def test_max_steps_ends_run_and_schedule(max_steps, steps):
    config = replace(SMALL, max_steps=max_steps)
    metrics = train(config)
    assert metrics["step"].tolist() == steps
    last = steps[-1]
    assert (
        metrics["lr"].iloc[-1]
        == learning_rate(config, last - 1, 4, last)
        == pytest.approx(0.05 * (1 + math.cos(math.pi * (last - 1) / last)) / 2)
    )


def test_a_constant_schedule_is_constant_after_its_warm_up():
    config = replace(SMALL, schedule="constant", warmup_epochs=2)
    rates = [learning_rate(config, step, 4, STEPS) for step in range(STEPS)]
    np.testing.assert_allclose(rates, [0.05 * min(step + 1, 8) / 8 for step in range(STEPS)])


@pytest.mark.parametrize("optimizer", [OptimizerConfig("sgd"), OptimizerConfig("adamw", lr=1e-3)], ids=str)
@pytest.mark.parametrize("step", [0, 1, 5, 12, 15])
def test_stopped_at_any_step_it_ends_with_the_same_bits(tmp_path, step, optimizer):
    config = replace(SMALL, optimizer=optimizer)
    whole, resumed = RunDirectory(tmp_path / "whole", config), RunDirectory(tmp_path / "resumed", config)
    expected = train(config, directory=whole)
    with raising(KeyboardInterrupt(), step), pytest.raises(KeyboardInterrupt):
        train(config, directory=resumed)
    assert resumed.result() is None
    torch.manual_seed(1234)
    computed = []
    metrics = train(config, directory=resumed, progress=computed.append)
    assert len(computed) == 4 - step // 4  # the epochs before are not computed again
    assert metrics.equals(expected)
    assert_same_weights(whole, resumed)
    for name in ("metrics.csv", "weights.safetensors", "config.json"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_killed_without_warning_it_ends_with_the_same_bits(tmp_path):
    config = replace(SMALL, epochs=100)
    script = (
        "import json, sys; from twofold.lab.config import RunConfig; from twofold.lab.runs import RunDirectory\n"
        "from twofold.lab.training import train; from pathlib import Path\n"
        "config = RunConfig.from_dict(json.loads(sys.argv[2]))\n"
        "train(config, directory=RunDirectory(Path(sys.argv[1]), config),"
        " progress=lambda row: print(row['epoch'], flush=True))"
    )
    killed = RunDirectory(tmp_path / "killed", config)
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), json.dumps(config.to_dict())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 7:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    computed = []
    metrics = train(config, directory=killed, progress=computed.append)
    assert 0 < len(computed) <= 100 - 7
    whole = RunDirectory(tmp_path / "whole", config)
    assert metrics.equals(train(config, directory=whole))
    assert_same_weights(whole, killed)


def test_a_finished_run_is_read_and_not_computed(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    first = train(SMALL, directory=directory)
    times = {path.name: path.stat().st_mtime_ns for path in directory.path.iterdir()}
    computed = []
    assert train(SMALL, directory=directory, progress=computed.append).equals(first)
    assert not computed
    assert {path.name: path.stat().st_mtime_ns for path in directory.path.iterdir()} == times


def test_the_caller_finds_its_process_as_it_was():
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            odd = train(replace(SMALL, threads=2))
            assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(torch.tensor(odd.values), torch.tensor(train(SMALL).values), rtol=1e-4, atol=0)


def test_the_caller_finds_its_process_as_it_was_after_an_error():
    random_state = torch.get_rng_state()
    threads = torch.get_num_threads()
    with pytest.raises(TwofoldError):
        train(replace(SMALL, data=replace(SMALL.data, num_train=10**6), threads=3))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_step_seeds_every_generator_that_it_may_draw_from(monkeypatch, cuda):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    with torch.random.fork_rng(devices=[]):
        training.seed_generators(7, cuda=cuda)
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert seeded == ([7] if cuda else [])


def test_convolutions_on_gpus_stay_with_cudnn():
    before = torch.backends.cudnn.deterministic
    with training.reproducible_convolutions():
        assert torch.backends.cudnn.enabled
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic == before


def test_a_loss_that_is_not_finite_is_a_result(tmp_path):
    config = replace(SMALL, model=ModelConfig(width=16, depth=2), optimizer=OptimizerConfig(lr=1e20))
    directory = RunDirectory(tmp_path, config)
    metrics = train(config, directory=directory)
    run = load_run(directory.path)
    assert run.status == "diverged"
    assert len(metrics) == 2
    assert not math.isfinite(run.final["train/loss"])
    assert 0 <= run.final["test/accuracy"] <= 1
    assert run.final["step"] < STEPS
    assert (run.metrics.fillna(-1) == metrics.fillna(-1)).all(axis=None)


def test_an_error_is_recorded_and_the_next_attempt_goes_on(tmp_path):
    directory = RunDirectory(tmp_path, SMALL)
    with raising(RuntimeError("the cause"), step=9), pytest.raises(RuntimeError, match="the cause"):
        train(SMALL, directory=directory)
    run = load_run(directory.path)
    assert run.status == "failed"
    assert "Traceback" in run.error
    assert "the cause" in run.error
    assert len(run.metrics) == 0
    computed = []
    train(SMALL, directory=directory, progress=computed.append)
    assert [row["epoch"] for row in computed] == [3, 4]
    assert load_run(directory.path).status == "finished"


def test_augmentation_is_drawn_anew_every_step_and_needs_images():
    with pytest.raises(TwofoldError, match="needs images"):
        train(replace(SMALL, data=replace(SMALL.data, augmentation="flip_crop")))


def test_a_device_that_is_not_there_is_told():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(TwofoldError, match="no CUDA"):
        train(replace(SMALL, device="cuda"))


REGULARIZERS = [
    RegularizerConfig("sam", 0.1),
    RegularizerConfig("usam", 0.1),
    RegularizerConfig("asam", 0.5),
    RegularizerConfig("wsam", 0.1),
    RegularizerConfig("wsam", 0.1, {"decoupled": False}),
    RegularizerConfig("eigen_sam", 0.1, {"interval": 3}),
    RegularizerConfig("gsam", 0.1),
    RegularizerConfig("friendly_sam", 0.1),
    RegularizerConfig("look_sam", 0.1, {"interval": 3}),
    RegularizerConfig("gradient_penalty", 0.1),
    RegularizerConfig("gradient_penalty", 0.1, {"p": 2, "curvature": "gauss_newton"}),
    RegularizerConfig("gradient_penalty", 0.1, second_derivative="0"),
    RegularizerConfig("gradient_penalty", 0.1, second_derivative="gaussian:2"),
    RegularizerConfig("gradient_penalty", 0.1, second_derivative="listing:2"),
    RegularizerConfig("weight_noise", 0.01),
    RegularizerConfig("exact_trace", 1e-3, {"matrix": "hessian"}),
    RegularizerConfig("exact_trace", 1e-3, {"matrix": "gauss_newton"}),
    RegularizerConfig("hessian_trace", 1e-3),
    RegularizerConfig("gauss_newton_trace", 1e-3),
]


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=str)
def test_every_regularizer_trains_and_resumes_with_the_same_bits(tmp_path, regularizer):
    plain = replace(SMALL, model=ModelConfig(width=16, depth=2), epochs=2)
    config = replace(plain, regularizer=regularizer)
    whole, resumed = RunDirectory(tmp_path / "whole", config), RunDirectory(tmp_path / "resumed", config)
    metrics = train(config, directory=whole)
    assert metrics["train/loss"].iloc[-1] != train(plain)["train/loss"].iloc[-1]
    with raising(KeyboardInterrupt(), step=6), pytest.raises(KeyboardInterrupt):
        train(config, directory=resumed)
    assert train(config, directory=resumed).equals(metrics)
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("regularizer", [r for r in REGULARIZERS if r.second_derivative is None], ids=str)
def test_strength_zero_is_plain_training(regularizer):
    plain = replace(SMALL, model=ModelConfig(width=16, depth=2), epochs=1)
    expected = train(plain)
    found = train(replace(plain, regularizer=replace(regularizer, strength=0.0)))
    assert found[expected.columns].equals(expected)


def test_phi_second_is_swapped_in_the_penalty_alone():
    config = replace(SMALL, model=ModelConfig(width=16, depth=2, activation="relu"), epochs=1)
    penalty = RegularizerConfig("gradient_penalty", 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a Hessian penalty does not see the curvature of a ReLU
        plain, zero, synthetic = (
            train(replace(config, regularizer=replace(penalty, second_derivative=value)))["train/loss"].iloc[-1]
            for value in (None, "0", "gaussian:2")
        )
    assert zero == plain
    assert synthetic != plain


def test_the_listings_bell_is_narrower_than_that_of_the_equation():
    x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def bend(model, loss_fn, batch):
        (slope,) = torch.autograd.grad(torch.relu(x), x, create_graph=True)
        return torch.autograd.grad(slope, x)[0]

    values = {"0": 0.0, "gaussian:2": math.exp(-0.18), "listing:2": math.exp(-0.36)}
    for name, value in values.items():
        config = RegularizerConfig("gradient_penalty", 0.1, second_derivative=name)
        regularizer = build_regularizer(config)
        regularizer.backward = bend
        found = build_backward(config, regularizer)(None, None, None)
        assert found.item() == pytest.approx(2 / math.sqrt(2 * math.pi) * value)


def test_a_gradient_that_is_not_finite_ends_the_run_and_what_is_finite_is_measured(tmp_path):
    config = replace(SMALL, regularizer=RegularizerConfig("sam", 1e30), curvature_every=100, curvature_probe=16)
    directory = RunDirectory(tmp_path, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = train(config, directory=directory)
    run = load_run(directory.path)
    assert run.status == "diverged"
    assert metrics["step"].tolist() == [0, 0]
    assert metrics["train/loss"].map(math.isfinite).all()
    assert metrics["curvature/hessian/trace"].notna().all()
    assert train(config, directory=directory).equals(metrics)


@pytest.mark.parametrize("name", ["none", "exact_trace"])
def test_a_gradient_that_is_not_finite_ends_a_run_without_a_regularizer_object(name, monkeypatch):
    config = replace(SMALL, model=ModelConfig(width=8, depth=2))
    config = replace(config, regularizer=RegularizerConfig(name, 0.1 if name == "exact_trace" else 0.0))
    built = training.build_backward

    def spoiled(*arguments):
        backward, steps = built(*arguments), iter(range(100))

        def spoil(model, loss_fn, batch):
            loss = backward(model, loss_fn, batch)
            if next(steps) == 2:
                next(model.parameters()).grad[0] = math.inf
            return loss

        return spoil

    monkeypatch.setattr(training, "build_backward", spoiled)
    metrics = train(config)
    assert metrics["step"].iloc[-1] == 2
    assert math.isfinite(metrics["train/loss"].iloc[-1])


def test_options_that_do_not_fit_are_told():
    config = replace(SMALL, regularizer=RegularizerConfig("sam", 0.1, {"radius": 2}))
    with pytest.raises(TwofoldError, match=r"options do not fit sam.*radius"):
        train(config)


def test_curvature_is_measured_on_the_probe_every_so_many_epochs():
    config = replace(
        SMALL, model=ModelConfig(width=4, depth=1), curvature_every=3, curvature_probe=32, curvature_matvecs=200
    )
    metrics = train(config)
    measured = metrics.filter(like="curvature/")
    assert measured.notna().all(axis=1).tolist() == [True, False, False, True, True]
    assert measured.notna().any(axis=1).tolist() == [True, False, False, True, True]
    assert metrics["activation/live_fraction"].dropna().tolist() == [1.0, 1.0, 1.0]  # GELU near its bend
    data = load(config.data)
    model = build(config.model, data.input_shape, 10, derive_seed("model", config.seed))
    inputs, targets = (tensor[:32] for tensor in data.train)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (inputs,)), targets)

    hessian = torch.func.hessian(loss)(parameters)
    trace = sum(hessian[n][n].reshape(p.numel(), p.numel()).trace().item() for n, p in parameters.items())
    norm = math.sqrt(sum(block.square().sum().item() for row in hessian.values() for block in row.values()))
    first = metrics.iloc[0]
    for quantity, exact in (("trace", trace), ("frobenius_norm", norm)):
        value, stderr = first[f"curvature/hessian/{quantity}"], first[f"curvature/hessian/{quantity}_stderr"]
        assert abs(value - exact) <= 5 * stderr
        assert stderr < 0.2 * abs(value)
    for quantity in ("trace", "along_gradient"):
        h, gn, nme, phi, rest = (first[f"curvature/{part}/{quantity}"] for part in PARTS)
        assert gn + nme == pytest.approx(h, rel=1e-4)
        assert phi + rest == pytest.approx(nme, rel=1e-4, abs=1e-5)
    gradient = torch.func.grad(loss)(parameters)
    along = sum(
        torch.einsum("i,ij,j", gradient[a].flatten(), block.reshape(gradient[a].numel(), -1), gradient[b].flatten())
        for a, row in hessian.items()
        for b, block in row.items()
    )
    square = sum(g.square().sum() for g in gradient.values())
    assert first["curvature/hessian/along_gradient"] == pytest.approx((along / square).item(), rel=1e-4)
    rows = metrics.filter(regex=r"^curvature/hessian/frobenius_norm/\w+(?<!_stderr)$").iloc[0]
    assert list(rows.index.str.removeprefix("curvature/hessian/frobenius_norm/")) == ["linear0", "head"]
    for module in ("linear0", "head"):
        own = sum(b.square().sum() for n, row in hessian.items() if n.startswith(module) for b in row.values())
        stderr = first[f"curvature/hessian/frobenius_norm/{module}_stderr"]
        assert abs(first[f"curvature/hessian/frobenius_norm/{module}"] - math.sqrt(own)) <= 5 * stderr


def test_a_loss_that_is_finite_where_its_curvature_is_not_goes_on(monkeypatch):
    config = replace(SMALL, curvature_every=1)
    plain = train(SMALL)

    def overflow(*_):
        raise NotFiniteError("phi'' is NaN")

    monkeypatch.setattr(training, "measure_curvature", overflow)
    found = train(config)
    assert found[plain.columns].equals(plain)
    assert set(found) - set(plain) == {"activation/live_fraction"}


def test_measuring_curvature_does_not_change_the_training():
    measured = train(replace(SMALL, curvature_every=1, curvature_probe=32, curvature_matvecs=2))
    plain = train(SMALL)
    assert measured[plain.columns].equals(plain)


TRACKED = replace(SMALL, track_every=3, curvature_probe=32)


def test_curvature_is_tracked_from_step_to_step(tmp_path):
    directory = RunDirectory(tmp_path, TRACKED)
    metrics = train(TRACKED, directory=directory)
    assert metrics.equals(train(SMALL))
    run = load_run(directory.path)
    assert run.tracked["step"].tolist() == [0, 3, 6, 9, 12, 15, 16]
    assert run.tracked.notna().all(axis=None)
    first = run.tracked.iloc[0]
    data = load(SMALL.data)
    model = build(SMALL.model, data.input_shape, 10, derive_seed("model", SMALL.seed))
    curvature = twofold.Curvature(model, F.cross_entropy, tuple(t[:32] for t in data.train), mode="eval")
    for matrix, estimate in curvature.traces(4).items():
        assert first[f"curvature/{matrix}/trace"] == pytest.approx(estimate.value, rel=1e-4, abs=1e-5)
    assert run.tracking["num_records"] == 7
    assert run.tracking["num_matvecs"] >= 7 * 5
    assert 0 < run.tracking["share"] < 1
    assert load_run(directory.path).tracked.equals(run.tracked)
    assert "seconds" not in "".join(run.tracked.columns)


@pytest.mark.parametrize("step", [7, 8])
def test_a_tracked_run_that_is_interrupted_ends_with_the_same_table(tmp_path, step):
    whole, broken = (RunDirectory(tmp_path / name, TRACKED) for name in ("whole", "broken"))
    train(TRACKED, directory=whole)
    with raising(KeyboardInterrupt(), step), pytest.raises(KeyboardInterrupt):
        train(TRACKED, directory=broken)
    train(TRACKED, directory=broken)
    assert (whole.path / "curvature.csv").read_bytes() == (broken.path / "curvature.csv").read_bytes()
    first, second = load_run(whole.path).tracking, load_run(broken.path).tracking
    assert first["num_records"] == second["num_records"]
    assert first["num_matvecs"] == second["num_matvecs"]


def test_a_damaged_table_is_told(tmp_path):
    directory = RunDirectory(tmp_path, TRACKED)
    train(replace(TRACKED), directory=directory)
    for spoil in (lambda path: path.write_text("step\n1\n"), lambda path: path.unlink()):
        spoil(directory.path / "curvature.csv")
        with pytest.raises(TwofoldError, match=r"curvature\.csv"):
            load_run(directory.path)


def test_a_run_that_diverges_is_tracked_to_its_end(tmp_path):
    config = replace(TRACKED, track_every=1, optimizer=OptimizerConfig(lr=1e20))
    directory = RunDirectory(tmp_path, config)
    train(config, directory=directory)
    run = load_run(directory.path)
    assert run.status == "diverged"
    assert run.tracked["step"].tolist() == list(range(len(run.tracked)))
    assert run.tracked.iloc[0].notna().all()


def test_tracking_needs_a_directory():
    with pytest.raises(TwofoldError, match="track_every"):
        train(TRACKED)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluating_moves_neither_statistics_nor_mode(mode):
    model = build(SMALL.model, (40,), 10, 0).train(mode)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, load(SMALL.data))
    assert model.training is mode
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_recipe_of_the_protocol_runs():
    assert train(replace(mnist1d(), max_steps=40))["step"].tolist() == [0, 32, 40]
