"""The Hugging Face Trainer: training with a regularizer, and curvature in its logs.

class MyTrainer(RegularizedMixin, Trainer): ...
trainer = MyTrainer(model, args, train_dataset=data, regularizer=twofold.SAM(rho=0.05))
watch_curvature(trainer, batch, every=100)
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from twofold.curvature.differentiable import unwrap
from twofold.errors import TwofoldError
from twofold.integrations.metrics import CurvatureMetrics
from twofold.integrations.steps import StepLoss, regularized, seen_from_outputs
from twofold.regularizers import Regularizer, SharpnessAware
from twofold.regularizers.base import check_count
from twofold.types import Forward, LossFn, Mode, Params

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise TwofoldError(
        "twofold.integrations.transformers needs transformers and accelerate: pip install 'twofold[transformers]'."
    ) from error


class RegularizedMixin:
    """Train with a regularizer in the Hugging Face Trainer; put it before Trainer among the bases.

    `training_step` is the Trainer's own, with a loss whose backward pass hands on the regularizer's gradient, so that
    accumulation, clipping, mixed precision, label smoothing, `compute_loss_func` and an overridden `compute_loss` work
    as they do without. `compute_loss` runs once for each pass that the method makes. With accumulation each batch has a
    perturbation of its own; processes under DDP share one, or have their own with the regularizer's ascent="local".
    `regularizer.diagnostics` go into the logs as "regularizer/<name>".

    Methods that tell GN from NME (GaussNewtonTrace, GradientPenalty with curvature="gauss_newton" or "nme") need a loss
    that comes from one of torch's losses, as those of transformers' models do; the Trainer's own label smoothing does
    not.

    Args:
        *args: the Trainer's own.
        regularizer: any of twofold's; None trains plainly.
        **kwargs: the Trainer's own.

    Raises:
        TwofoldError: for what is no regularizer, and in training for what cannot work: microbatches, a `SharpnessAware`
            optimiser, DeepSpeed and FSDP.

    Example:
        >>> class MyTrainer(RegularizedMixin, Trainer):
        ...     pass
    """

    def __init__(self, *args: Any, regularizer: Regularizer | None = None, **kwargs: Any) -> None:
        if regularizer is not None and not isinstance(regularizer, Regularizer):
            raise TwofoldError(f"regularizer must be one of twofold's, such as SAM(rho=0.05); {regularizer!r} came.")
        super().__init__(*args, **kwargs)
        self.regularizer = regularizer
        self._attached_to: Any = None

    def training_step(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's own step, with the regularizer's gradient in the place of the loss's."""
        if self.regularizer is None:
            return super().training_step(model, *args, **kwargs)  # pyrefly: ignore
        self._attach()
        # Shadows the method for this step only: evaluation keeps the plain loss.
        self.compute_loss = functools.partial(self._regularized_loss, self.compute_loss)
        try:
            return super().training_step(model, *args, **kwargs)  # pyrefly: ignore
        finally:
            del self.compute_loss

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the regularizer's diagnostics beside the training loss."""
        if self.regularizer is not None and "loss" in logs:
            logs |= {f"regularizer/{name}": value for name, value in self.regularizer.diagnostics.items()}
        super().log(logs, *args, **kwargs)  # pyrefly: ignore

    def _attach(self: Any) -> None:
        """Count the steps of the optimiser inside Accelerate's wrapper."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if optimizer is self._attached_to:
            return
        if isinstance(optimizer, SharpnessAware):
            raise TwofoldError(
                "The Trainer's optimiser is a SharpnessAware, which needs a closure; the Trainer gives none. Pass its "
                "base optimiser and regularizer=."
            )
        self.regularizer.attach(optimizer)
        self._attached_to = optimizer

    def _regularized_loss(
        self: Any,
        compute_loss: Any,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if hasattr(model, "backward"):
            raise TwofoldError(
                f"{type(model).__name__} runs the backward pass itself (DeepSpeed); a regularizer needs a plain torch "
                "model. Train without it, on one device."
            )
        # A loss over all batches of a step is the part of one; times their number it is of the size of a mean.
        share = self.current_gradient_accumulation_steps if self._is_scaled(num_items_in_batch) else 1
        # Passes must not start DistributedDataParallel's own averaging; the regularizer averages what it hands on.
        plain = unwrap(model)
        first_outputs: list[Any] = []
        # Accelerate hides its autocast inside of the model's forward; the regularizer must know of it.
        device = self.args.device.type
        dtype, outside = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def step(first: bool) -> Tensor:
            options = {"return_outputs": True} if return_outputs else {}
            with torch.autocast(device, dtype, enabled=outside):
                loss = compute_loss(plain, dict(inputs), num_items_in_batch=num_items_in_batch, **options)
            if return_outputs:
                loss, outputs = loss
                if first:
                    first_outputs.append(outputs)
            return loss * share

        with self.accelerator.autocast():
            loss = regularized(self.regularizer, model, step, (dict(inputs),), scaler=self.accelerator.scaler)
        return (loss / share, first_outputs[0]) if return_outputs else loss / share

    def _is_scaled(self: Any, num_items_in_batch: Any) -> bool:
        """Whether `compute_loss` has divided by the terms of all accumulated batches, as Trainer.training_step asks."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None


def watch_curvature(
    trainer: Trainer,
    batch: Any,
    *,
    every: int = 100,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    params: Params = None,
    mode: Mode = "eval",
    num_probes: int = 4,
    rho: float | None = None,
) -> TrainerCallback:
    """Measure both halves of the Hessian on a fixed batch while a Trainer trains, and log them.

    `trainer.log` gets "curvature/<matrix>/<quantity>" as `twofold.track` gives them, and with `rho`
    "fidelity/<curvature>/cosine" and ".../relative_error". Measured in the weights' own precision, outside of autocast;
    nothing in the training changes.

    Args:
        trainer: any Trainer, before or during training.
        batch: a mapping as the model takes it, labels among it.
        every: measure after every so many optimiser steps.
        loss_fn: loss_fn(outputs, targets) -> scalar; None takes the Trainer's `compute_loss`.
        forward: forward(model, batch) -> (outputs, targets), for a loss_fn.
        params: names or glob patterns of parameters; None for all that require a gradient.
        mode: "train", "eval", or None for the model as it is.
        num_probes: Rademacher probes for traces and norms; each takes about three gradients.
        rho: length of SAM's step in `twofold.fidelity`; None leaves it out (weights in half precision are refused).

    Returns:
        The callback that was added; trainer.remove_callback takes it away.

    Raises:
        TwofoldError: when measuring, for a loss that cannot be seen as a function of the model's outputs.
    """
    check_count("every", every)
    if loss_fn is None:
        loss_fn, forward = StepLoss(), functools.partial(_computed_loss, trainer)
    metrics = CurvatureMetrics(
        loss_fn, batch, params=params, forward=forward, mode=mode, num_probes=num_probes, rho=rho
    )
    callback = _CurvatureCallback(trainer, every, metrics)
    trainer.add_callback(callback)
    return callback


def _computed_loss(trainer: Any, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    return seen_from_outputs(lambda: trainer.compute_loss(model, dict(batch)), why="watch_curvature")


class _CurvatureCallback(TrainerCallback):
    def __init__(self, trainer: Any, every: int, metrics: CurvatureMetrics) -> None:
        self.trainer = trainer
        self.every = every
        self.metrics = metrics

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            plain = unwrap(model)
            with _without_autocast(plain):
                metrics = self.metrics.measure(plain, state.global_step)
            wanted = control.should_log
            self.trainer.log(metrics)
            control.should_log = wanted  # logging would cancel the training loss's own turn


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Take Accelerate's autocast off the model's forward."""
    own = vars(model)
    if "_original_forward" not in own:
        yield
        return
    wrapped = own["forward"]
    own["forward"] = own["_original_forward"]
    try:
        yield
    finally:
        own["forward"] = wrapped
