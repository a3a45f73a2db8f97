"""Callbacks for Lightning: a regularizer under automatic optimisation, and curvature in the loggers.

trainer = Trainer(callbacks=[RegularizerCallback(twofold.SAM(rho=0.05))])
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from twofold.errors import TwofoldError
from twofold.integrations.metrics import CurvatureMetrics
from twofold.integrations.steps import regularized
from twofold.regularizers import Regularizer, SharpnessAware
from twofold.regularizers.base import check_count
from twofold.types import Forward, LossFn, Mode, Params

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise TwofoldError("twofold.integrations.lightning needs Lightning: pip install 'twofold[lightning]'.") from error


class RegularizerCallback(Callback):
    """Train with a regularizer under automatic optimisation; the LightningModule stays as it is.

    `training_step` then returns a loss whose backward pass hands on the regularizer's gradient, so that accumulation,
    clipping, precision plugins, schedulers and loggers work as they do without. It runs once for each pass that the
    method makes; what it logs, it logs in the first. `regularizer.diagnostics` are logged as "regularizer/<name>". The
    regularizer's state is part of the checkpoints.

    Works in all precisions ("32-true", "bf16-mixed", "16-mixed", ...) and with accumulate_grad_batches: each batch has
    a perturbation of its own. Under DDP each process perturbs by its own gradient, and Lightning averages what is
    handed on.

    Methods that tell GN from NME (GaussNewtonTrace, GradientPenalty with curvature="gauss_newton" or "nme") need a
    `training_step` whose loss is what one of torch's losses returned, or a multiple of it.

    Args:
        regularizer: any of twofold's; it is attached to the trainer's optimiser.

    Raises:
        TwofoldError: for what is no regularizer, and when fitting starts for what cannot work: manual optimisation,
            microbatches, a `SharpnessAware` optimiser.

    Example:
        >>> trainer = Trainer(max_epochs=3, callbacks=[RegularizerCallback(twofold.SAM(rho=0.05))])
    """

    def __init__(self, regularizer: Regularizer) -> None:
        if not isinstance(regularizer, Regularizer):
            raise TwofoldError(f"RegularizerCallback takes a regularizer such as SAM(rho=0.05); {regularizer!r} came.")
        self.regularizer = regularizer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the regularizer and put it around `training_step`."""
        if not pl_module.automatic_optimization:
            raise TwofoldError(
                "RegularizerCallback works under automatic optimisation. In a training_step with manual optimisation "
                "call regularizer.backward(self, loss_fn, batch) in place of self.manual_backward(loss)."
            )
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, SharpnessAware):
            raise TwofoldError(
                "configure_optimizers returned a SharpnessAware, which would regularise a second time. Return its base "
                "optimiser: RegularizerCallback does the rest."
            )
        self.regularizer.attach(optimizer)
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._step(trainer, pl_module, functools.partial(original, *args, **kwargs))

        pl_module.training_step = training_step

    def _step(self, trainer: Trainer, module: LightningModule, original: functools.partial) -> Any:
        extras: dict[str, Any] = {}

        def step(first: bool) -> Tensor:
            if first:
                output = original()
            else:
                with _silent(module):
                    output = original()
            if output is None:
                raise _NoLoss
            if isinstance(output, Mapping):
                if first:
                    extras.update(output)
                return output["loss"]
            return output

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        try:
            loss = regularized(self.regularizer, module, step, (original.args, original.keywords), scaler=scaler)
        except _NoLoss:
            return None
        if trainer.loggers and trainer.global_step % trainer.log_every_n_steps == 0:
            module.log_dict({f"regularizer/{name}": value for name, value in self.regularizer.diagnostics.items()})
        if not extras:
            return loss
        return {**tree_map_only(Tensor, Tensor.detach, extras), "loss": loss}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own `training_step` back."""
        vars(pl_module).pop("training_step", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own `training_step` back."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The regularizer's own."""
        return self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.regularizer.load_state_dict(state_dict)


class CurvatureMonitor(Callback):
    """Measure both halves of the Hessian on a fixed batch while training, and log them.

    All of the trainer's loggers get "curvature/<matrix>/<quantity>" as `twofold.track` gives them, and with `rho`
    "fidelity/<curvature>/cosine" and ".../relative_error"; at the end of an epoch they are `callback_metrics` too.
    Measuring changes nothing in the training: neither weights nor statistics, nor random states.

    Args:
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: the fixed batch (inputs, targets), or a re-iterable of batches.
        every_n_steps: measure after every so many optimiser steps; None measures at the end of each epoch.
        params: names or glob patterns of parameters; None for all that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is.
        num_probes: Rademacher probes for traces and norms; each takes about three gradients.
        rho: length of SAM's step in `twofold.fidelity`; None leaves it out (weights in half precision are refused).

    Raises:
        TwofoldError: every_n_steps is no positive integer; when measuring, what `twofold.Curvature` refuses.

    Example:
        >>> monitor = CurvatureMonitor(nn.CrossEntropyLoss(), batch, every_n_steps=100)  # doctest: +SKIP
    """

    def __init__(
        self,
        loss_fn: LossFn,
        data: Any,
        *,
        every_n_steps: int | None = None,
        params: Params = None,
        forward: Forward | None = None,
        mode: Mode = "eval",
        num_probes: int = 4,
        rho: float | None = None,
    ) -> None:
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self._metrics = CurvatureMetrics(
            loss_fn, data, params=params, forward=forward, mode=mode, num_probes=num_probes, rho=rho
        )
        self._measured_at = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure if a step was made and its turn has come."""
        step = trainer.global_step
        if self.every_n_steps is not None and step != self._measured_at and step % self.every_n_steps == 0:
            self._measured_at = step
            metrics = self._metrics.measure(pl_module, step)
            for logger in trainer.loggers:  # log_dict would repeat the values at every step
                logger.log_metrics(metrics, step=step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of an epoch."""
        if self.every_n_steps is None:
            pl_module.log_dict(self._metrics.measure(pl_module, trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        """The eigenvectors that the next measurement starts from."""
        return self._metrics.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._metrics.load_state_dict(state_dict)


class _NoLoss(Exception):  # noqa: N818 - no error
    """training_step returned None: Lightning skips the batch."""


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Let `training_step` log nothing."""
    own = vars(module)
    before = own.get("log")
    own["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del own["log"]
        if before is not None:
            own["log"] = before
