"""Regularizer: `backward(model, loss_fn, batch)` in place of `loss.backward()`."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from twofold.batches import describe
from twofold.curvature.differentiable import ModuleState, unwrap
from twofold.curvature.losses import as_loss
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.parameters import norm, select_parameters
from twofold.regularizers.gradients import Gradients, accumulate, add_scaled
from twofold.regularizers.passes import ModelPasses, Passes, RandomSources
from twofold.types import Forward, LossFn, Params

TINY = 1e-12
"""Added to a gradient's norm before dividing by it."""


@dataclass(frozen=True)
class Direction:
    """What an algorithm hands on for one batch.

    Attributes:
        loss: the loss to report, detached.
        gradients: what goes to the optimiser in place of the gradient.
        diagnostics: scalars by name.
    """

    loss: Tensor
    gradients: Gradients
    diagnostics: dict[str, Tensor | float]


def plain(passes: Passes) -> Direction:
    """Hand on the plain gradient."""
    loss, gradients = passes.gradient()
    return Direction(loss, gradients, {"gradient_norm": norm(passes.of_chosen(gradients)), "penalty": 0.0})


@dataclass(kw_only=True, eq=False)
class Regularizer(ABC):
    """What every regularizer shares; a subclass adds its fields and `direction`.

    Args:
        params: names or glob patterns of the parameters that are perturbed or penalised; None means all that are
            trained. Every trained parameter gets its gradient in any case.
        microbatches: split each batch along its first dimension into this many parts with a perturbation each
            (m-sharpness); their gradients are averaged with exact weights.
        share_masks: let all passes over a batch see the same random draws (dropout masks).
        generator: where noise, probes and labels are drawn from; None is torch's global generator. Its state is part
            of `state_dict`.

    Attributes:
        skipped: how many gradients were not finite and so were left out.
    """

    params: Params = field(default=None, repr=False)
    microbatches: int = field(default=1, repr=False)
    share_masks: bool = field(default=True, repr=False)
    generator: torch.Generator | None = field(default=None, repr=False)
    skipped: int = field(default=0, init=False, repr=False)
    _diagnostics: dict[str, Tensor | float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("microbatches", self.microbatches)
        if not isinstance(self.share_masks, bool):
            raise TwofoldError(f"share_masks must be True or False; {self.share_masks!r} came.")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TwofoldError(f"generator must be a torch.Generator or None; {describe(self.generator)} came.")

    @abstractmethod
    def direction(self, passes: Passes) -> Direction:
        """Return the loss of one batch and the gradient to hand on."""

    @property
    def diagnostics(self) -> dict[str, float]:
        """Scalars of the last backward by name: norms of gradient and perturbation, penalty, rise of the loss."""
        return {name: float(value) for name, value in self._diagnostics.items()}

    def backward(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Any,
        *,
        forward: Forward | None = None,
        weight: float = 1.0,
        scaler: Any = None,
        return_outputs: bool = False,
    ) -> Any:
        """Add this regularizer's gradient to .grad, in place of `loss.backward()`.

        Args:
            model: any module, in the mode in which it is to be trained; compiled and DDP wrappers are looked through.
            loss_fn: loss_fn(outputs, targets) -> scalar.
            batch: one batch (inputs, targets), or a mapping with "labels".
            forward: forward(model, batch) -> (outputs, targets), for batches of another form.
            weight: factor of the gradient; k calls with weight 1/k accumulate the mean of k batches.
            scaler: the torch.amp.GradScaler of the training loop; scaled gradients are left for its step.
            return_outputs: also return the outputs of the first pass, detached.

        Returns:
            The loss of the first pass, detached, without weight and scale; or (loss, outputs).

        Raises:
            TwofoldError: for what cannot be run. Then, as after any exception, weights, buffers, .grad, modes and
                random states are as they were.

        A gradient that is not finite is not handed on: .grad stays as found, `skipped` counts it and a warning tells
        once. With a scaler it is handed on, so that the scaler skips the step.
        """
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise TwofoldError(f"weight must be a finite number; {weight!r} came.")
        _refuse_parallel(model)
        model = unwrap(model)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        chosen = self._chosen_among(model, parameters)
        scale = 1.0 if scaler is None else _scale_of(scaler, next(iter(parameters.values())))
        pieces = [batch] if self.microbatches == 1 else _split(batch, self.microbatches)
        before = _Snapshot(model, self.generator)
        try:
            passes = [
                ModelPasses(
                    model,
                    loss_fn,
                    piece,
                    forward,
                    scale,
                    parameters=list(parameters.values()),
                    chosen=chosen,
                    source=self.generator,
                    share_masks=self.share_masks,
                    start=before.random.shared if piece is pieces[0] else None,
                )
                for piece in pieces
            ]
            direction = self._average(loss_fn, passes)
        except BaseException:
            before.restore()
            raise
        if scaler is not None or self.accepts(direction.gradients):
            accumulate(list(parameters.values()), direction.gradients, weight * scale)
        self.report(direction.diagnostics)
        if not return_outputs:
            return direction.loss
        return direction.loss, _joined([one.outputs for one in passes])

    def _chosen_among(self, model: nn.Module, trained: dict[str, nn.Parameter]) -> list[int]:
        if not trained:
            select_parameters(model)
        wanted = trained if self.params is None else select_parameters(model, self.params)
        chosen = [i for i, name in enumerate(trained) if name in wanted]
        if not chosen:
            raise TwofoldError(f"params={self.params!r} names only frozen parameters; nothing is left to perturb.")
        return chosen

    def _average(self, loss_fn: LossFn, passes: Sequence[ModelPasses]) -> Direction:
        """Run the algorithm on each part and average with the weights that the loss gives to the parts."""
        if len(passes) == 1:
            return self.direction(passes[0])
        loss = as_loss(loss_fn)
        sums: Gradients = [None for _ in passes[0].parameters]
        parts: list[tuple[float, Direction]] = []
        for one in passes:
            part = self.direction(one)
            count = loss.count(one.outputs, one.targets)
            if count > 0 or (one is passes[-1] and not parts):
                sums = [add_scaled(known, new, count) for known, new in zip(sums, part.gradients, strict=True)]
                parts.append((count, Direction(part.loss, [], part.diagnostics)))
        counted = sum(count for count, _ in parts) or 1.0
        total = counted if loss.averages else 1.0
        return Direction(
            torch.stack([count * part.loss for count, part in parts]).sum() / total,
            [None if gradient is None else gradient / total for gradient in sums],
            {
                name: sum(count * part.diagnostics[name] for count, part in parts) / counted
                for name in parts[0][1].diagnostics
                if all(name in part.diagnostics for _, part in parts)
            },
        )

    def report(self, diagnostics: dict[str, Tensor | float]) -> None:
        """Keep the scalars of a step for `diagnostics`."""
        self._diagnostics = diagnostics

    def accepts(self, gradients: Gradients) -> bool:
        """Tell whether a gradient is finite; one that is not is counted and warned of once."""
        known = [gradient for gradient in gradients if gradient is not None]
        # A norm is one fast reading; where it overflows the entries may still be finite.
        if not known or norm(known).isfinite() or all(gradient.isfinite().all() for gradient in known):
            return True
        self.skipped += 1
        if self.skipped == 1:
            warnings.warn(NOT_HANDED_ON.format(name=type(self).__name__), TwofoldWarning, stacklevel=3)
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit."""
        return {"skipped": self.skipped, "generator": None if self.generator is None else self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            TwofoldError: when the state is of another kind, or has a generator where this regularizer has none.
        """
        expected = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != expected:
            raise TwofoldError(
                f"{type(self).__name__} expects a state with {sorted(expected)}; {describe(state)} came."
            )
        if (state["generator"] is None) != (self.generator is None):
            raise TwofoldError("The state and the regularizer must both have a generator, or neither.")
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self.skipped = state["skipped"]


NOT_HANDED_ON = """\
{name}: the gradient is not finite, so it was not handed on and .grad stays as it was found. Later ones are counted in
.skipped without a warning. Look for a learning rate or a perturbation that is too large, or NaN in the data."""


class _Snapshot:
    """What a failed backward puts back: modules, buffers, random states. Weights and .grad need none of it."""

    def __init__(self, model: nn.Module, generator: torch.Generator | None) -> None:
        self.random = RandomSources(generator)
        self._modules = ModuleState(model)
        self._tensors = [(tensor, tensor.clone()) for module in model.modules() for tensor in _held(module)]

    def restore(self) -> None:
        self.random.restore()
        self._modules.restore()
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)


def _held(module: nn.Module) -> list[Tensor]:
    """Buffers, and tensors kept as plain attributes, off the graph."""
    held = [*module._buffers.values(), *(value for value in module.__dict__.values() if type(value) is Tensor)]
    return [tensor for tensor in held if tensor is not None and not tensor.requires_grad]


def _scale_of(scaler: Any, like: Tensor) -> float:
    if not callable(getattr(scaler, "scale", None)):
        raise TwofoldError(f"scaler must be a torch.amp.GradScaler; {describe(scaler)} came.")
    return float(scaler.scale(torch.ones((), device=like.device)))


def _refuse_parallel(model: nn.Module) -> None:
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    if parallel and torch.distributed.get_world_size(model.process_group) > 1:
        raise TwofoldError(
            "reg.backward does not average gradients over processes, so the copies of a DistributedDataParallel model "
            "would drift apart. Use SharpnessAware(optimizer, reg).step(closure): its passes go through the wrapper."
        )


def _split(batch: Any, num_parts: int) -> list[Any]:
    """Split every tensor of a batch along its first dimension."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or not num_parts <= min(sizes):
        raise TwofoldError(
            f"microbatches={num_parts} splits every tensor of the batch along its first dimension, which must be the "
            f"same and at least {num_parts}; the batch is {describe(batch)}."
        )
    leaves, spec = tree_flatten(batch)
    cut = [leaf.tensor_split(num_parts) if isinstance(leaf, Tensor) else [leaf] * num_parts for leaf in leaves]
    return [tree_unflatten([pieces[i] for pieces in cut], spec) for i in range(num_parts)]


def _joined(outputs: Sequence[Any]) -> Any:
    """Put the outputs of the parts of a batch together again."""
    if len(outputs) == 1:
        return outputs[0]
    specs = [tree_flatten(one) for one in outputs]
    columns = zip(*[leaves for leaves, _ in specs], strict=True)
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) and column[0].dim() else column[0] for column in columns
    ]
    return tree_unflatten(joined, specs[0][1])


def check_count(name: str, value: object) -> None:
    """Refuse what is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise TwofoldError(f"{name} must be a positive integer; {value!r} came.")


def check_strength(name: str, value: object) -> None:
    """Refuse what is no finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise TwofoldError(f"{name} must be a finite number, 0 or more; {value!r} came.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise TwofoldError(f"{name} must be one of {', '.join(map(repr, choices))}; {value!r} came.")
