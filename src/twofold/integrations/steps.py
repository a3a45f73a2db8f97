"""A framework's own training step as what the library takes: forward, loss function, batch.

A step computes a loss from a batch in any way it likes. Most methods need no more than that loss on its graph. What
tells GN from NME needs the loss as a function of the model's outputs: it is found by watching which of torch's losses
the step calls, and kept only where the step's loss is that call's result, or a multiple of it.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from twofold.curvature.losses import Loss, OutputProduct, Residual
from twofold.curvature.torch_losses import as_loss, is_torch_loss
from twofold.errors import TwofoldError
from twofold.regularizers import Regularizer

Step: TypeAlias = Callable[[bool], Tensor]
"""step(first) -> the loss of a batch; `first` is False in every pass that is not the real one."""


def regularized(reg: Regularizer, model: nn.Module, step: Step, batch: Any = (), *, scaler: Any = None) -> Tensor:
    """Return the loss of a training step, such that its backward pass hands on the regularizer's gradient.

    Args:
        reg: any regularizer.
        model: what the step trains.
        step: runs the model; it is called once for each pass.
        batch: a tuple of what the step reads, for methods that measure the Hessian.
        scaler: the torch.amp.GradScaler that will scale the loss.

    Raises:
        TwofoldError: what the regularizer refuses, or a loss that it cannot see as a function of the outputs.
    """
    if reg.microbatches != 1:
        raise TwofoldError(
            f"microbatches={reg.microbatches} cannot split the batch of a training step. Accumulate gradients over "
            "that many batches in the trainer: each has a perturbation of its own, which is the same."
        )
    passes = 0

    def forward(_: nn.Module, __: Any) -> tuple[Any, Any]:
        nonlocal passes
        passes += 1
        run = functools.partial(step, passes == 1)
        return seen_from_outputs(run, why=f"{reg!r}") if reg.splits_hessian else (run(), None)

    loss_fn = StepLoss() if reg.splits_hessian else _itself
    return reg.loss(model, loss_fn, batch, forward=forward, scaler=scaler)


def _itself(loss: Tensor, _: Any) -> Tensor:
    return loss


def seen_from_outputs(run: Callable[[], Tensor], why: str) -> tuple[Tensor, "Seen"]:
    """Run a step and return the outputs that its loss is a function of, and that function; to be used with `StepLoss`.

    Args:
        run: returns the loss on its graph.
        why: who needs it, for the message.

    Raises:
        TwofoldError: the loss is not a multiple of one call of a torch loss.
    """
    with _Watch() as watch:
        loss = run()
    for call in reversed(watch.calls):
        factor = _factor(loss, call.result)
        if factor is not None:
            return call.outputs, Seen(as_loss(call.loss_fn), call.targets, factor)
    calls = ", ".join(call.loss_fn.func.__name__ for call in watch.calls) or "none"
    raise TwofoldError(_NOT_SEEN.format(why=why, calls=calls))


_NOT_SEEN = """\
{why} tells GN from NME, so it must see the loss as a function of the model's outputs. That is possible where the
training step returns what one of torch's losses gave (F.cross_entropy, nn.MSELoss(), ...), or a multiple of it; this
step's loss is something else (torch losses called: {calls}).
Compute the loss so (cross_entropy has label_smoothing= and weight=), or take what needs the loss alone: the SAM family,
WeightNoise, HessianTrace, GradientPenalty(curvature="hessian")."""


@dataclass(frozen=True)
class Seen:
    """What stands in the place of targets: the loss of one step as a function of its outputs.

    Attributes:
        loss: the recognised loss.
        targets: its targets.
        factor: the step's loss is this times it.
    """

    loss: Loss
    targets: Any
    factor: float


class StepLoss(Loss):
    """The loss of any step, as `Seen` describes it."""

    tensors_only = True

    def __init__(self) -> None:
        super().__init__(self._value)

    @staticmethod
    def _value(outputs: Tensor, seen: Seen) -> Tensor:
        # A model under autocast may hand half precision to a loss that autocast computes in float32.
        wide = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
        return seen.factor * seen.loss(wide, seen.targets)

    def count(self, outputs: Tensor, targets: Seen) -> float:
        """Return how many terms the step's loss averages."""
        return targets.loss.count(outputs, targets.targets)

    def output_hessian(self, outputs: Tensor, targets: Seen) -> OutputProduct:
        """Return t -> H_z t."""
        product = targets.loss.output_hessian(outputs, targets.targets)
        return lambda tangents: [targets.factor * h for h in product(tangents)]

    def residual(self, outputs: Tensor, targets: Seen, kind: Residual, generator: torch.Generator | None) -> Tensor:
        """Draw r with covariance H_z."""
        return targets.factor**0.5 * targets.loss.residual(outputs, targets.targets, kind, generator)


@dataclass(frozen=True)
class _Call:
    loss_fn: functools.partial
    outputs: Tensor
    targets: Any
    result: Tensor


@dataclass
class _Watch(TorchFunctionMode):
    """Remembers each call of a torch loss."""

    calls: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_torch_loss(func) and result.numel() == 1:
            options = inspect.signature(func).bind(*args, **kwargs).arguments
            outputs, targets = options.pop("input"), options.pop("target")
            self.calls.append(_Call(functools.partial(func, **options), outputs, targets, result))
            return result.clone()  # the step may go on in place
        return result


def _factor(loss: Tensor, part: Tensor) -> float | None:
    """Return a > 0 where loss = a part; None where the loss is anything else."""
    if part.grad_fn is None or loss.grad_fn is None:
        return None
    inner, nodes, seen = part.grad_fn, [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node is inner or node in seen:
            continue
        if not node.next_functions or hasattr(node, "variable") or len(seen) > 100:
            return None
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    (slope,) = torch.autograd.grad(loss, part, create_graph=True, allow_unused=True)
    if slope is None or slope.requires_grad or not slope > 0:
        return None
    return float(slope) if torch.isclose(slope * part, loss, equal_nan=True) else None
