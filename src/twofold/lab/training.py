"""The training loop, readable from top to bottom.

Shuffling is seeded from (seed, epoch), everything random inside a step from (seed, epoch, step). So a run that is
killed goes on from the last epoch's checkpoint and ends with the same weights, bit for bit, as one that never stopped.
"""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twofold.activations import gaussian, second_derivative
from twofold.curvature.curvature import Curvature
from twofold.curvature.fidelity import fidelity
from twofold.curvature.liveness import live_fraction
from twofold.curvature.track import Tracker, track
from twofold.errors import TwofoldError
from twofold.lab.config import OptimizerConfig, RegularizerConfig, RunConfig
from twofold.lab.data import Dataset, TensorPair, augment, load
from twofold.lab.loggers import Log, opened
from twofold.lab.models import build
from twofold.lab.runs import Row, RunDirectory
from twofold.lab.seeding import derive_generator, derive_seed
from twofold.regularizers import (
    ASAM,
    GSAM,
    SAM,
    USAM,
    WSAM,
    EigenSAM,
    FriendlySAM,
    GaussNewtonTrace,
    GradientPenalty,
    HessianTrace,
    LookSAM,
    Regularizer,
    WeightNoise,
)

Backward = Callable[[nn.Module, Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]], Tensor]
"""backward(model, loss_fn, (inputs, targets)) -> loss: adds its gradient to .grad, as `Regularizer.backward` does."""

_EVALUATION_BATCH = 1000

_CONSTRUCTORS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "sam": (SAM, "rho"),
    "usam": (USAM, "rho"),
    "asam": (ASAM, "rho"),
    "wsam": (WSAM, "rho"),
    "eigen_sam": (EigenSAM, "rho"),
    "gsam": (GSAM, "rho"),
    "friendly_sam": (FriendlySAM, "rho"),
    "look_sam": (LookSAM, "rho"),
    "gradient_penalty": (GradientPenalty, "rho"),
    "weight_noise": (WeightNoise, "sigma"),
    "hessian_trace": (HessianTrace, "strength"),
    "gauss_newton_trace": (GaussNewtonTrace, "strength"),
}
"""Every regularizer by name, and which argument the configuration's strength is."""


def train(
    config: RunConfig,
    *,
    data_dir: Path | None = None,
    directory: RunDirectory | None = None,
    progress: Callable[[Row], None] | None = None,
    loggers: Sequence[str] = (),
) -> pd.DataFrame:
    """Train as `config` says and return the metrics: one row an epoch, from epoch 0 (before training) on.

    A loss that becomes infinite or NaN ends the run there; that is a result, with status "diverged".

    Columns: epoch, step, lr; loss and accuracy (from 0 to 1) as "train/loss", "validation/accuracy", ..., where train
    has the noisy labels that are trained on. Where curvature is measured, "curvature/<matrix>/<quantity>" and the same
    with "_stderr": matrix is hessian, gauss_newton or nme, quantity is trace or frobenius_norm; and
    "activation/live_fraction", the fraction of activation inputs at which phi'' is not 0; with `fidelity_rho` also
    "fidelity/<curvature>/cosine" and ".../relative_error". "regularizer/<name>" are its diagnostics in the last step.

    With `track_every` the curvature is followed step by step with `twofold.track`, in a table of its own in the run's
    directory: curvature.csv, `Run.tracked`; what that took is in status.json, `Run.tracking`.

    Args:
        config: what to run.
        data_dir: where data files lie.
        directory: where to keep the run. A run with a result there is read, not computed; an interrupted one goes on;
            while another process computes it, this one waits.
        progress: called with every new row.
        loggers: "tensorboard", "wandb" or both get every row and what is tracked; they write into the directory.

    Raises:
        TwofoldError: the data cannot be had, parts of the configuration do not fit each other, or there is no directory
            to write what is tracked into.

    Example:
        >>> from dataclasses import replace
        >>> from twofold.lab.config import mnist1d
        >>> metrics = train(replace(mnist1d(), max_steps=4))
        >>> list(metrics["step"])
        [0, 4]
    """
    if directory is None:
        if config.track_every:
            raise TwofoldError(f"RunConfig.track_every is {config.track_every}: pass directory=, where the table goes.")
        with opened(loggers, None, config) as log:
            return pd.DataFrame(_train(config, data_dir, None, progress, log))
    with directory.lock():
        if (run := directory.result()) is not None:
            return run.metrics
        directory.begin()
        try:
            with opened(loggers, directory.path, config) as log:
                return pd.DataFrame(_train(config, data_dir, directory, progress, log))
        except Exception:
            directory.fail(traceback.format_exc())
            raise


def _train(
    config: RunConfig,
    data_dir: Path | None,
    directory: RunDirectory | None,
    progress: Callable[[Row], None] | None,
    log: Log,
) -> list[Row]:
    with _process_as_found(config) as seed_step:
        started = time.monotonic()
        data = _on_device(load(config.data, data_dir), config.device)
        model = build(config.model, data.input_shape, data.num_classes, derive_seed("model", config.seed))
        model.to(config.device)
        optimizer = build_optimizer(config.optimizer, model)
        regularizer = build_regularizer(config.regularizer)
        if regularizer is not None:
            regularizer.attach(optimizer)
        backward = build_backward(config.regularizer, regularizer)
        tracker = build_tracker(config, model, data.train) if config.track_every else None

        steps_per_epoch = math.ceil(len(data.train.targets) / config.batch_size)
        num_steps = config.epochs * steps_per_epoch
        if config.max_steps is not None:
            num_steps = min(num_steps, config.max_steps)
        num_epochs = math.ceil(num_steps / steps_per_epoch)
        epoch, step, diverged, rows = 0, 0, False, []

        def end_epoch() -> bool:
            """Evaluate, report and keep the state; True where the run has diverged."""
            row = {"epoch": epoch, "step": step, "lr": optimizer.param_groups[0]["lr"], **evaluate(model, data)}
            finite = math.isfinite(row["train/loss"]) and not diverged
            every = config.curvature_every
            if finite and every and (epoch % every == 0 or epoch == num_epochs):
                row |= measure_curvature(config, model, data.train)
            if regularizer is not None:
                row |= {f"regularizer/{name}": value for name, value in regularizer.diagnostics.items()}
            rows.append(row)
            log(row, step)
            if directory is not None:
                state = {"epoch": epoch, "step": step, "diverged": not finite, "rows": rows}
                _keep(directory, model, optimizer, regularizer, tracker=tracker, state=state)
            if progress is not None:
                progress(row)
            return not finite

        def follow() -> None:
            if tracker is not None and (step % config.track_every == 0 or step == num_steps):
                log(tracker.measure(step), step)

        kept = directory.read_checkpoint() if directory is not None else None
        if kept is None:
            follow()
            diverged = end_epoch()
        else:
            state = _restore(kept, model, optimizer, regularizer, tracker)
            epoch, step, diverged, rows = state["epoch"], state["step"], state["diverged"], state["rows"]

        while step < num_steps and not diverged:
            epoch += 1
            order = torch.randperm(len(data.train.targets), generator=derive_generator("shuffle", config.seed, epoch))
            for chosen in order.to(config.device).split(config.batch_size):
                seed_step(derive_seed("step", config.seed, epoch, step))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, steps_per_epoch, num_steps)
                inputs = augment(config.data.augmentation, data.train.inputs[chosen])
                optimizer.zero_grad()
                loss = backward(model, F.cross_entropy, (inputs, data.train.targets[chosen]))
                if not math.isfinite(loss):
                    diverged = True
                    break
                optimizer.step()
                step += 1
                follow()
                if step == num_steps:
                    break
            diverged = end_epoch()

        if directory is not None:
            directory.finish(
                status="diverged" if diverged else "finished",
                rows=rows,
                model=model,
                input_shape=data.input_shape,
                num_classes=data.num_classes,
                seconds=time.monotonic() - started,
                tracker=tracker,
            )
        return rows


def learning_rate(config: RunConfig, step: int, steps_per_epoch: int, num_steps: int) -> float:
    """The rate of step 0, 1, ...: linear up to lr over the warm-up, then constant, or lr (1 + cos(pi t)) / 2."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.optimizer.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.optimizer.lr
    return config.optimizer.lr * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The base optimiser over all parameters."""
    if config.name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def build_regularizer(config: RegularizerConfig) -> Regularizer | None:
    """The regularizer of `config`; None for plain training.

    Raises:
        TwofoldError: the regularizer does not take these options.
    """
    if config.name == "none":
        return None
    constructor, strength = _CONSTRUCTORS[config.name]
    try:
        return constructor(**{strength: config.strength}, **dict(config.options))
    except TypeError as error:
        raise TwofoldError(f"RegularizerConfig.options do not fit {config.name}: {error}.") from error


def build_backward(config: RegularizerConfig, regularizer: Regularizer | None) -> Backward:
    """What stands in place of `loss.backward()`: the regularizer, with phi'' as its configuration says."""
    if regularizer is None:
        return _plain_backward
    beta = config.second_derivative_beta
    if beta is None:
        return regularizer.backward
    replacement = 0 if beta == 0 else gaussian(beta=beta)

    def backward(model: nn.Module, loss_fn: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
        with second_derivative(replacement):
            return regularizer.backward(model, loss_fn, batch)

    return backward


def _plain_backward(model: nn.Module, loss_fn: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    loss = loss_fn(model(inputs), targets)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset) -> Row:
    """Mean cross-entropy and accuracy (0 to 1) on train, validation and test, in eval mode."""
    row: Row = {}
    training = model.training
    model.eval()
    for name in ("train", "validation", "test"):
        inputs, targets = getattr(data, name)
        loss, correct = 0.0, 0
        for x, y in zip(inputs.split(_EVALUATION_BATCH), targets.split(_EVALUATION_BATCH), strict=True):
            outputs = model(x)
            loss += float(F.cross_entropy(outputs, y, reduction="sum"))
            correct += int((outputs.argmax(1) == y).sum())
        row |= {f"{name}/loss": loss / len(targets), f"{name}/accuracy": correct / len(targets)}
    model.train(training)
    return row


def build_tracker(config: RunConfig, model: nn.Module, examples: TensorPair) -> Tracker:
    """What follows the curvature while the model trains: in eval mode, on the first `curvature_probe` examples."""
    return track(model, F.cross_entropy, tuple(tensor[: config.curvature_probe] for tensor in examples), mode="eval")


def measure_curvature(config: RunConfig, model: nn.Module, examples: TensorPair) -> Row:
    """Traces and Frobenius norms of H, GN and NME, the live fraction of phi'', and fidelity, in eval mode.

    All on the first `curvature_probe` of the examples.
    """
    batch = tuple(tensor[: config.curvature_probe] for tensor in examples)
    curvature = Curvature(model, F.cross_entropy, batch, mode="eval")
    row: Row = {"activation/live_fraction": live_fraction(model, batch, mode="eval")}
    for quantity, measure in (("trace", curvature.traces), ("frobenius_norm", curvature.frobenius)):
        for matrix, estimate in measure(num_matvecs=config.curvature_matvecs).items():
            key = f"curvature/{matrix}/{quantity}"
            row |= {key: estimate.value, f"{key}_stderr": estimate.stderr}
    if config.fidelity_rho:
        row |= fidelity(model, F.cross_entropy, batch, config.fidelity_rho, mode="eval").metrics()
    return row


@contextmanager
def _process_as_found(config: RunConfig) -> Iterator[Callable[[int], Any]]:
    """Set threads, modes and RNG for the run, and put back what was found; yields what seeds one step."""
    cuda = config.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise TwofoldError(f"RunConfig.device is {config.device!r}, but torch sees no CUDA device here.")
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([torch.device(config.device)] if cuda else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(config.device.partition(":")[0], enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(deterministic=True) if cuda else nullcontext())
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_num_threads(config.threads)
        torch.set_default_dtype(torch.float32)
        # torch.manual_seed would seed every device, at a hundred times the cost
        yield torch.cuda.manual_seed if cuda else torch.default_generator.manual_seed


def _on_device(data: Dataset, device: str) -> Dataset:
    pairs = [TensorPair(*(tensor.to(device) for tensor in pair)) for pair in (data.train, data.validation, data.test)]
    return Dataset(*pairs, num_classes=data.num_classes)


def _keep(
    directory: RunDirectory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
    *,
    tracker: Tracker | None,
    state: dict[str, Any],
) -> None:
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": value for name, value in values.items() if value is not None}
    if regularizer is not None:
        memory = regularizer.memory
        tensors |= {f"regularizer/{i}": tensor for i, tensor in enumerate(memory.kept or [])}
        state["regularizer"] = {
            "skipped": regularizer.skipped,
            "steps": regularizer.steps,
            "kept_at": memory.kept_at,
            "num_kept": None if memory.kept is None else len(memory.kept),
        }
    if tracker is not None:
        tracked = tracker.state_dict()
        tensors |= {f"tracker/{name}": vector for name, vector in tracked.pop("vectors").items()}
        state["tracker"] = tracked
    directory.write_checkpoint(tensors, state)


def _restore(
    kept: tuple[dict[str, Tensor], dict[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
    tracker: Tracker | None,
) -> dict[str, Any]:
    tensors, state = kept
    model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            i, _, key = rest.partition("/")
            moments.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if regularizer is not None:
        saved = state["regularizer"]
        regularizer.skipped, regularizer.steps = saved["skipped"], saved["steps"]
        if saved["kept_at"] is not None:
            num_kept = saved["num_kept"]
            found = None if num_kept is None else [tensors[f"regularizer/{i}"] for i in range(num_kept)]
            regularizer.memory.keep(found, saved["kept_at"])
    if tracker is not None:
        vectors = {n.removeprefix("tracker/"): t for n, t in tensors.items() if n.startswith("tracker/")}
        tracker.load_state_dict({**state["tracker"], "vectors": vectors})
    return state
