"""The training loop, readable from top to bottom.

Shuffling is seeded from (seed, epoch), everything random inside a step from (seed, epoch, step). So a run that is
killed goes on from the last epoch's checkpoint and ends with the same weights, bit for bit, as one that never stopped.
"""

import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from twofold.distributed import rank, together
from twofold.errors import NotFiniteError, TwofoldError, TwofoldWarning
from twofold.lab import checkpoint, ranks
from twofold.lab.building import build_backward, build_optimizer, build_regularizer
from twofold.lab.config import RunConfig
from twofold.lab.data import Dataset, augment, load
from twofold.lab.evaluation import build_tracker, evaluate, measure_curvature, measure_live_fraction
from twofold.lab.files import UnreadableError, UnwritableError
from twofold.lab.loggers import Log, opened
from twofold.lab.models import build
from twofold.lab.runs import Row, RunDirectory
from twofold.lab.seeding import derive_generator, derive_seed
from twofold.regularizers import Regularizer
from twofold.types import ProcessGroup


def train(
    config: RunConfig,
    *,
    data_dir: Path | None = None,
    directory: RunDirectory | None = None,
    progress: Callable[[Row], None] | None = None,
    loggers: Sequence[str] = (),
) -> pd.DataFrame:
    """Train as `config` says and return the metrics: one row an epoch, from epoch 0 (before training) on.

    A loss or a gradient that becomes infinite or NaN ends the run there; that is a result, with status "diverged".

    Columns: epoch, step, lr; loss and accuracy (from 0 to 1) as "train/loss", "validation/accuracy", ..., where train
    has the noisy labels that are trained on, and at most its first 10000 examples, which are random ones. Where
    curvature is measured, "curvature/<matrix>/<quantity>": matrix is hessian, gauss_newton, nme, activation_nme or
    rest, quantity is along_gradient (g'Ag / g'g), trace or frobenius_norm, the latter two with "_stderr" beside them,
    and "frobenius_norm/<module>", the norm of a module's rows; and "activation/live_fraction", the fraction of
    activation inputs at which phi'' is not 0; with `fidelity_rho` also "fidelity/<curvature>/cosine" and
    ".../relative_error". Where curvature is measured, a run that diverged is measured once more where it
    ended. These columns are missing where the curvature is not finite. "regularizer/<name>" are its diagnostics in the
    last step.

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
        TwofoldError: the data cannot be had, parts of the configuration do not fit each other, there is no directory
            to write what is tracked into, it is that of another run, or it cannot be written to or read.

    Example:
        >>> from dataclasses import replace
        >>> from twofold.lab.config import mnist1d
        >>> metrics = train(replace(mnist1d(), max_steps=4))
        >>> list(metrics["step"])
        [0, 4]
    """
    group = ranks.join(config.ranks, config.device)
    if directory is None and config.track_every:
        raise TwofoldError(f"RunConfig.track_every is {config.track_every}: pass directory=, where the table goes.")
    if directory is not None and directory.config != config:
        raise TwofoldError(f"{directory.path} is that of another run; make one of this: RunDirectory(out, config).")
    own = directory if rank(group) == 0 else None  # one rank writes; the others hear from it what is there
    with together(group), nullcontext() if own is None else own.lock():
        run = None if own is None else own.result()
        if (metrics := ranks.from_first(None if run is None else run.metrics, group)) is not None:
            return metrics
        with opened(loggers if rank(group) == 0 else (), None if own is None else own.path, config) as log:
            if own is not None:
                own.begin()
            try:
                rows = _train(config, data_dir, own, progress=progress, log=log, group=group)
            except (UnwritableError, UnreadableError, BrokenPipeError):
                raise  # no fault of this run: nowhere to tell it, or nobody who reads
            except Exception:
                if own is not None:
                    own.fail(traceback.format_exc())
                raise
            return pd.DataFrame(ranks.from_first(rows, group))


def _train(
    config: RunConfig,
    data_dir: Path | None,
    directory: RunDirectory | None,
    *,
    progress: Callable[[Row], None] | None,
    log: Log,
    group: ProcessGroup,
) -> list[Row]:
    with _process_as_found(config) as seed_step:
        started = time.monotonic()
        data = load(config.data, data_dir).to(config.device)
        model = _build_model(config, data)
        optimizer = build_optimizer(config.optimizer, model)
        regularizer = build_regularizer(config.regularizer, group)
        if regularizer is not None:
            regularizer.attach(optimizer)
        backward = build_backward(config.regularizer, regularizer, group)
        tracker = build_tracker(config, model, data.train) if config.track_every else None

        crops = config.data.augmentation == "random_resized_crop"
        steps_per_epoch = ranks.num_batches(len(data.train.targets), config.batch_size, config.ranks)
        num_steps = config.epochs * steps_per_epoch
        if config.max_steps is not None:
            num_steps = min(num_steps, config.max_steps)
        num_epochs = math.ceil(num_steps / steps_per_epoch)
        epoch, step, diverged, rows = 0, 0, False, []

        def end_epoch() -> bool:
            """Evaluate, report and keep the state; True where the run has diverged."""
            ranks.average_statistics(model, group)
            with _autocast(config):
                found = evaluate(model, data, group)
            row = {"epoch": epoch, "step": step, "lr": optimizer.param_groups[0]["lr"], **found}
            finite = math.isfinite(row["train/loss"]) and not diverged
            every = config.curvature_every
            if every and (epoch % every == 0 or epoch == num_epochs or not finite):
                for measure in (measure_live_fraction, measure_curvature):
                    with suppress(NotFiniteError):  # a loss may be finite where its curvature is not
                        row |= measure(config, model, data.train)
            if regularizer is not None:
                row |= {f"regularizer/{name}": value for name, value in regularizer.diagnostics.items()}
            rows.append(row)
            log(row, step)
            if directory is not None:
                state = {"epoch": epoch, "step": step, "diverged": not finite, "rows": rows}
                checkpoint.keep(directory, model, optimizer, regularizer, tracker=tracker, state=state)
            if progress is not None:
                progress(row)
            return not finite

        def follow() -> None:
            if tracker is not None and (step % config.track_every == 0 or step == num_steps):
                log(tracker.measure(step), step)

        kept = ranks.from_first(None if directory is None else directory.read_checkpoint(), group)
        if kept is None:
            follow()
            diverged = end_epoch()
        else:
            state = checkpoint.restore(kept, model, optimizer, regularizer, tracker)
            epoch, step, diverged, rows = state["epoch"], state["step"], state["diverged"], state["rows"]

        while step < num_steps and not diverged:
            epoch += 1
            order = torch.randperm(len(data.train.targets), generator=derive_generator("shuffle", config.seed, epoch))
            batches = order.split(config.batch_size)[: min(steps_per_epoch, num_steps - step)]
            crop_seed = derive_seed("crop", config.seed, epoch) if crops else None
            for inputs, targets in data.train.batches([ranks.share(b, group) for b in batches], crop_seed=crop_seed):
                seed_step(derive_seed("step", config.seed, epoch, step, *_if_not_first(group)))
                for parameters in optimizer.param_groups:
                    parameters["lr"] = learning_rate(config, step, steps_per_epoch, num_steps)
                optimizer.zero_grad()
                with _autocast(config):
                    batch = (augment(config.data.augmentation, _laid_out(config, inputs)), targets)
                    loss = ranks.mean(float(backward(model, F.cross_entropy, batch)), group)
                diverged = not math.isfinite(loss) or not _has_finite_gradient(optimizer, regularizer)
                if diverged:
                    break
                optimizer.step()
                step += 1
                follow()
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


def _build_model(config: RunConfig, data: Dataset) -> nn.Module:
    """The model on its device, in its memory format, compiled where that is asked for."""
    model = build(config.model, data.input_shape, data.num_classes, derive_seed("model", config.seed))
    model.to(config.device)
    if config.channels_last:
        if len(data.input_shape) != 3:
            raise TwofoldError(
                f"RunConfig.channels_last needs images [channels, height, width]; inputs of {config.data.name} have "
                f"shape {list(data.input_shape)}: set it to False."
            )
        model.to(memory_format=torch.channels_last)  # pyrefly: ignore
    if config.compile:
        model.compile()  # in place: a wrapper would be looked through by what differentiates twice
    return model


def _laid_out(config: RunConfig, inputs: torch.Tensor) -> torch.Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if config.channels_last else inputs


def _autocast(config: RunConfig) -> torch.autocast:
    """Around each step and each evaluation; a cache of cast weights would outlive the step that changes them."""
    kind = config.device.partition(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bfloat16", cache_enabled=False)


def _has_finite_gradient(optimizer: torch.optim.Optimizer, regularizer: Regularizer | None) -> bool:
    if regularizer is not None:
        return not regularizer.skipped  # what is not finite it does not hand on
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients, math.inf).isfinite())


def _if_not_first(group: ProcessGroup) -> tuple[int, ...]:
    """What tells a rank's seed from those of the others; one process, and the first of several, has no addition."""
    return () if rank(group) == 0 else (rank(group),)


def learning_rate(config: RunConfig, step: int, steps_per_epoch: int, num_steps: int) -> float:
    """The rate of step 0, 1, ...: linear up to lr over the warm-up, then constant, or lr (1 + cos(pi t)) / 2."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.optimizer.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.optimizer.lr
    return config.optimizer.lr * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


def reproducible_convolutions() -> Any:
    """On GPUs, the convolutions that give the same bits each time, and float32 where it says float32."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)  # the defaults turn it off


def seed_generators(seed: int, *, cuda: bool) -> None:
    """Seed torch's generator of the CPU, where regularizers draw too, and that of the present GPU.

    torch.manual_seed would seed every device, at a hundred times the cost.
    """
    torch.default_generator.manual_seed(seed)
    if cuda:
        torch.cuda.manual_seed(seed)


@contextmanager
def _process_as_found(config: RunConfig) -> Iterator[Callable[[int], Any]]:
    """Set threads, modes and RNG for the run, and put back what was found; yields what seeds one step."""
    cuda = config.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise TwofoldError(f"RunConfig.device is {config.device!r}, but torch sees no CUDA device here.")
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with ExitStack() as stack:
        if cuda:
            stack.enter_context(torch.cuda.device(config.device))
        stack.enter_context(torch.random.fork_rng([torch.device(config.device)] if cuda else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(config.device.partition(":")[0], enabled=False))
        stack.enter_context(reproducible_convolutions())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".* the gradient is not finite", TwofoldWarning)  # the run's status tells
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_num_threads(config.threads)
        torch.set_default_dtype(torch.float32)
        yield partial(seed_generators, cuda=cuda)
