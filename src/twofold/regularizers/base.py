"""Regularizer: `backward(model, loss_fn, batch)` in place of `loss.backward()`."""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from twofold.batches import describe, split
from twofold.curvature.differentiable import compiled_alone, unwrap
from twofold.curvature.torch_losses import as_loss
from twofold.distributed import check_group, together
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.parameters import norm, select_parameters
from twofold.regularizers.gradients import Gradients, accumulate, add_scaled, refuse_sparse
from twofold.regularizers.memory import Memory
from twofold.regularizers.microbatches import joined
from twofold.regularizers.passes import ModelPasses, Passes
from twofold.regularizers.ranks import Ascent, Ranks, group_of, same_buffers
from twofold.regularizers.saved_weights import SavedWeights
from twofold.regularizers.snapshot import Snapshot
from twofold.regularizers.surrogate import loss_that_hands_on
from twofold.types import Forward, LossFn, Params, ProcessGroup

TINY = 1e-12
"""Added to a gradient's norm before dividing by it."""


@dataclass(frozen=True)
class Direction:
    """What an algorithm hands on for one batch.

    Attributes:
        loss: the loss to report, detached.
        gradients: what goes to the optimiser in place of the gradient.
        diagnostics: scalars by name.
        memory: what this batch adds to the regularizer's memory, averaged over a step as the gradient is.
    """

    loss: Tensor
    gradients: Gradients
    diagnostics: dict[str, Tensor | float]
    memory: Sequence[Tensor] | None = None


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
        interval: work on every interval-th step, from the first on, and hand on the plain gradient between them.
        microbatches: split each batch along its first dimension into this many parts with a perturbation each
            (m-sharpness); their gradients are averaged with exact weights.
        share_masks: let all passes over a batch see the same random draws (dropout masks).
        generator: where noise, probes and labels are drawn from; None is torch's global generator. Its state is part
            of `state_dict`.
        group: a torch.distributed process group whose ranks each have a batch of their own; gradients are averaged over
            its ranks (the mean over ranks, as DistributedDataParallel has it). None takes the group of a
            DistributedDataParallel model, else this process alone. The loss returned and the diagnostics made of losses
            are this rank's.
        ascent: over a group, "global" perturbs all ranks alike, along the mean gradient: the step of one process on all
            batches. "local" perturbs each rank along its own batch's gradient and averages what is handed on: the step
            of one process with a micro-batch for each rank, with fewer exchanges.

    Attributes:
        skipped: how many gradients were not finite and so were left out.
        steps: how many steps of the attached optimiser have been made; without one, each backward counts as a step.
        memory: what is kept from one step to the next.
        saved_weights: where the weights are while they are perturbed.
    """

    params: Params = field(default=None, repr=False)
    interval: int = field(default=1, repr=False)
    microbatches: int = field(default=1, repr=False)
    share_masks: bool = field(default=True, repr=False)
    generator: torch.Generator | None = field(default=None, repr=False)
    group: ProcessGroup = field(default=None, repr=False)
    ascent: Ascent = field(default="global", repr=False)
    skipped: int = field(default=0, init=False, repr=False)
    steps: int = field(default=0, init=False, repr=False)
    memory: Memory = field(default_factory=Memory, init=False, repr=False)
    saved_weights: SavedWeights = field(default_factory=SavedWeights, init=False, repr=False)
    _optimizer: Optimizer | None = field(default=None, init=False, repr=False)
    _hook: RemovableHandle | None = field(default=None, init=False, repr=False)
    _diagnostics: dict[str, Tensor | float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("interval", self.interval)
        check_count("microbatches", self.microbatches)
        if self.params is not None and not isinstance(self.params, str):
            self.params = tuple(self.params)
        if not isinstance(self.share_masks, bool):
            raise TwofoldError(f"share_masks must be True or False; {self.share_masks!r} came.")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TwofoldError(f"generator must be a torch.Generator or None; {describe(self.generator)} came.")
        check_group(self.group)
        check_choice("ascent", self.ascent, get_args(Ascent))

    linear: ClassVar[bool] = False
    """Whether what is handed on is linear in the loss: the mean over ranks is then taken once, at the end."""

    @abstractmethod
    def direction(self, passes: Passes) -> Direction:
        """Return the loss of one batch and the gradient to hand on."""

    def between(self, passes: Passes) -> Direction:
        """Return what is handed on in the steps between those of the interval."""
        return plain(passes)

    def of_this_step(self, passes: Passes) -> Direction:
        """Return `direction` on every interval-th step, and `between` on the others."""
        return self.between(passes) if self.steps % self.interval else self.direction(passes)

    def attach(self, optimizer: Optimizer) -> Self:
        """Count the steps of this optimiser, and read its learning rates, from now on.

        Needed wherever gradients are accumulated and something depends on the step: an interval, a schedule, an
        average. A copy and an unpickled regularizer are to be attached anew; `SharpnessAware` attaches its own.

        Args:
            optimizer: the one that steps with the gradients of this regularizer.

        Returns:
            The regularizer itself.

        Raises:
            TwofoldError: it is no torch optimiser.

        Example:
            >>> from twofold.regularizers import SAM
            >>> optimizer = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
            >>> regularizer = SAM(rho=0.05, interval=2).attach(optimizer)
        """
        if not isinstance(optimizer, Optimizer):
            raise TwofoldError(f"attach takes the torch.optim.Optimizer that steps; {describe(optimizer)} came.")
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = optimizer
        self._hook = optimizer.register_step_post_hook(lambda *_: self._stepped())
        return self

    def after_step(self) -> None:
        """Digest what arrived in the memory during the step that ends."""
        self.memory.drop()

    def _stepped(self) -> None:
        self.after_step()
        self.steps += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "saved_weights": SavedWeights(), "_optimizer": None, "_hook": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self.group is not None:
            memo[id(self.group)] = self.group
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return other

    @property
    def splits_hessian(self) -> bool:
        """Whether it tells GN from NME, and so must see the loss as a function of the model's outputs."""
        return False

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
            model: any module, in the mode in which it is to be trained. A compiled wrapper runs where only first
                derivatives are taken (SAM and its siblings, finite differences, weight noise), and is looked through
                elsewhere. So is a DistributedDataParallel wrapper, of which the process group is taken; its own reducer
                does not run, so that its no_sync() and communication hooks have no say.
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
        once. With a scaler it is handed on, so that the scaler skips the step. Over a group one rank's gradient that is
        not finite makes the mean so, on all ranks; an exception on one rank is raised on all.
        """
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise TwofoldError(f"weight must be a finite number; {weight!r} came.")
        found = self._find(model, loss_fn, batch, forward, scaler)
        if found.accepted:
            accumulate(found.parameters, found.direction.gradients, weight * found.scale)
            if found.direction.memory is not None:
                self.memory.add(found.direction.memory, weight)
        if self._optimizer is None:
            self._stepped()
        if not return_outputs:
            return found.direction.loss
        return found.direction.loss, found.outputs()

    def loss(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Any,
        *,
        forward: Forward | None = None,
        scaler: Any = None,
        return_outputs: bool = False,
    ) -> Any:
        """Return a loss whose own `backward()` adds this regularizer's gradient to .grad.

        For code that calls backward itself, such as a framework's training loop: every pass is made here, and the
        tensor returned may be divided, scaled and differentiated as the loss of plain training would be.

        Args:
            model: any module, in the mode in which it is to be trained.
            loss_fn: loss_fn(outputs, targets) -> scalar.
            batch: one batch.
            forward: forward(model, batch) -> (outputs, targets).
            scaler: the torch.amp.GradScaler that will scale the loss.
            return_outputs: also return the outputs of the first pass, detached.

        Returns:
            The loss of the first pass; or (loss, outputs). A gradient that is not finite is treated as in `backward`.

        Raises:
            TwofoldError: as in `backward`.

        Example:
            >>> from twofold.regularizers import SAM
            >>> model, batch = nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
            >>> SAM(rho=0.05).loss(model, nn.CrossEntropyLoss(), batch).backward()
        """
        found = self._find(model, loss_fn, batch, forward, scaler)
        direction, parameters, scale, accepted = found.direction, found.parameters, found.scale, found.accepted

        def hand_on(factor: Tensor) -> Gradients:
            if accepted and direction.memory is not None:
                self._forget_what_was_dropped(parameters)
                self.memory.add(direction.memory, float(factor) / scale)
            if self._optimizer is None:
                self._stepped()
            return [None if g is None or not accepted else g * factor for g in direction.gradients]

        loss = loss_that_hands_on(direction.loss, parameters, hand_on)
        return (loss, found.outputs()) if return_outputs else loss

    def _find(self, model: nn.Module, loss_fn: LossFn, batch: Any, forward: Forward | None, scaler: Any) -> "_Found":
        """Make all passes over a batch; what is found is not handed on yet."""
        given, group = model, group_of(model) if self.group is None else self.group
        with together(group):
            model, called = unwrap(model), compiled_alone(model)
            refuse_sparse(model)
            parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            chosen = self._chosen_among(model, parameters)
            scale = 1.0 if scaler is None else _scale_of(scaler, next(iter(parameters.values())))
            pieces = [batch] if self.microbatches == 1 else split(batch, self.microbatches)
            before = Snapshot(model, self.generator)
            remembered = copy.copy(self.memory)
            self._forget_what_was_dropped(parameters.values())
            try:
                same_buffers(given, group)
                passes = [
                    ModelPasses(
                        model,
                        loss_fn,
                        piece,
                        forward,
                        scale,
                        called=called,
                        parameters=list(parameters.values()),
                        chosen=chosen,
                        names=list(parameters),
                        source=self.generator,
                        share_masks=self.share_masks,
                        start=before.random.shared if piece is pieces[0] else None,
                        ranks=Ranks(group, self.ascent),
                        linear=self.linear,
                        saved=self.saved_weights,
                        counted=len(pieces) > 1,
                    )
                    for piece in pieces
                ]
                direction = self.over_ranks(self._average(loss_fn, passes), passes[0])
            except BaseException:
                before.restore()
                self.memory = remembered
                raise
        self.report(direction.diagnostics)
        accepted = scaler is not None or self.accepts(direction.gradients)
        return _Found(direction, list(parameters.values()), scale, accepted, passes)

    def over_ranks(self, direction: Direction, passes: Passes) -> Direction:
        """Average what each rank found, where its gradients are not averages already."""
        ranks = passes.ranks
        if ranks.size == 1 or passes.shared:
            return direction
        gradients, memory = ranks.mean(direction.gradients, passes.parameters), None
        if ranks.everywhere(direction.memory is not None) and direction.memory is not None:
            memory = torch._foreach_div(ranks.total(direction.memory), ranks.size)
        return replace(direction, gradients=gradients, memory=memory)

    def _forget_what_was_dropped(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget what arrived for a step that was never made: its gradients are gone."""
        if self.memory.arrived is not None and _is_fresh(parameters):
            self.memory.drop()

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
            return self.of_this_step(passes[0])
        averages = as_loss(loss_fn).averages
        sums: Gradients = [None for _ in passes[0].parameters]
        memory: list[Tensor] | None = None
        parts: list[tuple[float, Direction]] = []
        total = 0.0
        for one in passes:
            part = self.of_this_step(one)
            weight = _weight_over_ranks(one, averages)
            if weight > 0 or (one is passes[-1] and not total):
                total += weight
                sums = [add_scaled(known, new, weight) for known, new in zip(sums, part.gradients, strict=True)]
                if part.memory is not None:
                    scaled = torch._foreach_mul(list(part.memory), weight)
                    memory = list(scaled if memory is None else torch._foreach_add(memory, scaled))
            if one.has_terms or (one is passes[-1] and not parts):
                parts.append((one.count, Direction(part.loss, [], part.diagnostics)))
        counted = sum(count for count, _ in parts) or 1.0
        total = (total or 1.0) if averages else 1.0
        return Direction(
            torch.stack([count * part.loss for count, part in parts]).sum() / (counted if averages else 1.0),
            [None if gradient is None else gradient / total for gradient in sums],
            {
                name: sum(count * part.diagnostics[name] for count, part in parts) / counted
                for name in parts[0][1].diagnostics
                if all(name in part.diagnostics for _, part in parts)
            },
            None if memory is None else list(torch._foreach_div(memory, total)),
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
            warnings.warn(NOT_HANDED_ON.format(name=type(self).__name__), TwofoldWarning, stacklevel=4)
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit."""
        return {
            "skipped": self.skipped,
            "steps": self.steps,
            "memory": self.memory.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            TwofoldError: when the state is of another kind, or has a generator where this regularizer has none; what
                was there stays. Memory that does not fit the model is refused by the next backward.
        """
        expected = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != expected:
            raise TwofoldError(
                f"{type(self).__name__} expects a state with {sorted(expected)}; {describe(state)} came."
            )
        if (state["generator"] is None) != (self.generator is None):
            raise TwofoldError("The state and the regularizer must both have a generator, or neither.")
        memory = Memory()
        memory.load_state_dict(state["memory"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self.memory = memory
        self.skipped, self.steps = state["skipped"], state["steps"]


NOT_HANDED_ON = """\
{name}: the gradient is not finite, so it was not handed on and .grad stays as it was found. Later ones are counted in
.skipped without a warning. Look for a learning rate or a perturbation that is too large, or NaN in the data."""


@dataclass(frozen=True)
class _Found:
    """What the passes over a batch found: a direction for these parameters, and whether it is finite."""

    direction: Direction
    parameters: list[nn.Parameter]
    scale: float
    accepted: bool
    passes: Sequence[ModelPasses]

    def outputs(self) -> Any:
        return joined([one.outputs for one in self.passes])


def _is_fresh(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether an accumulation begins: nothing stands in .grad."""
    return all(parameter.grad is None or not parameter.grad.any() for parameter in parameters)


def _scale_of(scaler: Any, like: Tensor) -> float:
    if not callable(getattr(scaler, "scale", None)):
        raise TwofoldError(f"scaler must be a torch.amp.GradScaler; {describe(scaler)} came.")
    return float(scaler.scale(torch.ones((), device=like.device)))


def _weight_over_ranks(passes: ModelPasses, averages: bool) -> float:
    """What a piece weighs among the pieces of a batch: its terms, on all ranks that perturb alike."""
    if not averages:
        return passes.count
    return passes.ranks.count(passes.count) if passes.shared else passes.count


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
