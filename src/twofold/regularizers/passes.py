"""The passes that a regularizer makes over one batch: gradients here, at perturbed weights, or from a recorded graph.

An algorithm is written once against `Passes`. The first pass is the real one: running statistics and random states move
in it as in plain training. Every later pass sees the same dropout masks, writes into copies of the buffers and leaves
no trace.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from twofold.batches import run_forward
from twofold.curvature.differentiable import (
    RandomState,
    buffers_replaced,
    composed_kernels,
    differentiable_twice,
    module_state_kept,
    refusals_named,
)
from twofold.curvature.jet_rules import NotCarriedError
from twofold.curvature.jets import Jets, carried, output_jets
from twofold.curvature.losses import Loss
from twofold.curvature.operators import Hessian
from twofold.curvature.primitives import check_differentiable_thrice, differentiable_thrice
from twofold.curvature.recording import OutputLoss, Recording, refuse_reentrant
from twofold.curvature.torch_losses import as_loss
from twofold.errors import TwofoldError
from twofold.regularizers.autocast import Autocast
from twofold.regularizers.gradients import Gradients, unscaled
from twofold.regularizers.ranks import Ranks
from twofold.regularizers.recorded import JetGraph, LossGraph, Recorded
from twofold.regularizers.saved_weights import SavedWeights
from twofold.regularizers.scaled_loss import ScaledLoss
from twofold.regularizers.snapshot import ModelState
from twofold.types import Forward, LossFn


class Passes(ABC):
    """Gradients of one batch at chosen points.

    Args:
        parameters: every trainable parameter.
        chosen: positions of those that the regularizer perturbs, or whose curvature it penalises.
        names: the parameters' names, None for those that have none.
        source: where random draws come from; None is torch's global generator.
        share_masks: whether later passes repeat the random draws of the first.
        start: the present state of the global generators, where the caller has taken it.
        ranks: the ranks that make this step together, each over a batch of its own.
        linear: whether what the algorithm hands on is linear in the loss, so that a mean over ranks at the end is
            enough.
        saved: where the weights are kept while they are perturbed.

    Attributes:
        parameters: every trainable parameter.
        ranks: the ranks that make this step together.
        shared: whether each gradient is already the mean over the ranks, and all that is made of it alike on them.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        chosen: Sequence[int],
        *,
        names: Sequence[str | None],
        source: torch.Generator | None,
        share_masks: bool,
        start: RandomState | None = None,
        ranks: Ranks | None = None,
        linear: bool = False,
        saved: SavedWeights | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.ranks = ranks or Ranks(None, "global")
        self.shared = self.ranks.size > 1 and self.ranks.alike and not linear
        self._chosen = list(chosen)
        self._names = list(names)
        self._source = source
        self._share_masks = share_masks
        self._start = start
        self._saved = saved or SavedWeights()
        self._after: RandomState | None = None
        self._begun = False

    @property
    def chosen(self) -> list[nn.Parameter]:
        """The parameters that the regularizer perturbs, or whose curvature it penalises."""
        return [self.parameters[i] for i in self._chosen]

    @property
    def chosen_names(self) -> list[str]:
        """The names of the chosen parameters.

        Raises:
            TwofoldError: where passes are a closure's and the optimiser does not know the names.
        """
        known = [name for name in (self._names[i] for i in self._chosen) if name is not None]
        if len(known) < len(self._chosen):
            raise TwofoldError(
                "The regularizer asks for the parameters' names (params=, rho by pattern, or ASAM, which tells biases "
                "by their names), and the base optimiser does not know them: build it from model.named_parameters()."
            )
        return known

    def of_chosen(self, gradients: Gradients) -> list[Tensor]:
        """The chosen parameters' part of a gradient, zeros where the loss does not depend on them."""
        parts = [(gradients[i], self.parameters[i]) for i in self._chosen]
        return [torch.zeros_like(parameter) if part is None else part for part, parameter in parts]

    def with_chosen(self, gradients: Gradients, parts: Sequence[Tensor]) -> Gradients:
        """Put other tensors in the place of the chosen parameters' gradients; None stays None."""
        result = list(gradients)
        for i, part in zip(self._chosen, parts, strict=True):
            result[i] = None if result[i] is None else part
        return result

    def noise_generator(self, *, of_terms: bool = False) -> torch.Generator:
        """A generator for this batch's draws, seeded from torch's global one or the regularizer's own.

        To be called before the first pass: the draws then differ from step to step and no pass sees them.

        Args:
            of_terms: whether something is drawn for each term of the loss, not for the weights. Ranks that perturb
                alike draw the same for weights, and each its own for its terms.
        """
        source = self._source
        device = torch.device("cpu") if source is None else source.device
        own = torch.randint(2**62, (), generator=source, device=device)
        self._start = None
        return torch.Generator(self.chosen[0].device).manual_seed(self.ranks.seed(own, of_terms=of_terms))

    def everywhere(self, condition: bool | Tensor) -> bool:
        """Tell whether something holds on all ranks, so that they take the same steps."""
        return bool(condition) if self.shared or self.ranks.size == 1 else self.ranks.everywhere(condition)

    @property
    def has_terms(self) -> bool:
        """Whether the loss of the batch has a term; known of pieces of a batch, after their first pass."""
        return True

    def _mean(self, gradients: Gradients) -> Gradients:
        return self.ranks.mean(gradients, self.parameters, counts=self.has_terms) if self.shared else gradients

    def gradient(self, perturbation: Sequence[Tensor] | None = None, factor: float = 1.0) -> tuple[Tensor, Gradients]:
        """Return the loss and its gradient at theta, or at theta + factor * perturbation over the chosen parameters.

        The gradient is the mean over the ranks that perturb alike; the loss is this rank's. The weights come back from
        a saved copy, bit for bit, also when the pass raises.
        """
        with self._perturbed(perturbation, factor):
            if not self._begun:
                self._begin()
                loss, gradients = self._first_pass()
            else:
                with self._replayed():
                    loss, gradients = self._later_pass()
        return loss, self._mean(gradients)

    def hessian(self) -> Hessian:
        """The Hessian of the batch's loss over the chosen parameters, with the first pass's masks; it leaves no trace.

        Raises:
            TwofoldError: where passes are a closure's, which hides the outputs.
        """
        with self._replayed():
            return self._hessian()

    @abstractmethod
    def need_outputs(self) -> None:
        """Tell before the first pass that more than gradients will be asked for.

        Raises:
            TwofoldError: where passes are a closure's, which hides the outputs.
        """

    def recorded(self) -> Recorded:
        """Make the first pass and keep its graph, so that the gradient can be differentiated.

        Raises:
            TwofoldError: where passes are a closure's, which hides the outputs.
        """
        self._begin()
        return self._recorded_pass()

    def loss_graph(self) -> LossGraph:
        """Make the first pass and keep its graph, so that the gradient can be differentiated twice.

        Raises:
            TwofoldError: where passes are a closure's, which hides the outputs.
        """
        self._begin()
        return self._graph_pass()

    def jets(self, direction: Sequence[Tensor]) -> JetGraph:
        """Make a pass that carries order-2 jets of theta + e v on a graph, v over the chosen parameters.

        Raises:
            NotCarriedError: the model does something that jets do not know; then it is as if no pass had been made.
            TwofoldError: where passes are a closure's, which hides the outputs.
        """
        try:
            if self._begun:
                with self._replayed():
                    return self._jets_pass(direction)
            self._begin()
            return self._jets_pass(direction)
        except NotCarriedError:
            self._begun = False
            self._undo_jets()
            raise

    def _begin(self) -> None:
        self._begun = True
        if self._start is None:
            self._start = RandomState()

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        """Repeat the random draws of the first pass, if masks are shared."""
        if not self._share_masks or self._start is None:
            yield
            return
        if self._after is None:
            self._after = RandomState()
        self._start.restore(since=self._after)
        yield
        self._after.restore(since=self._start)

    @contextmanager
    def _perturbed(self, perturbation: Sequence[Tensor] | None, factor: float) -> Iterator[None]:
        if perturbation is None:
            yield
            return
        weights: list[Tensor] = [weight.detach() for weight in self.chosen]
        with self._saved.kept(weights):
            with torch.no_grad():
                torch._foreach_add_(weights, list(perturbation), alpha=factor)
            yield

    @abstractmethod
    def _first_pass(self) -> tuple[Tensor, Gradients]: ...

    @abstractmethod
    def _later_pass(self) -> tuple[Tensor, Gradients]: ...

    @abstractmethod
    def _hessian(self) -> Hessian: ...

    @abstractmethod
    def _recorded_pass(self) -> Recorded: ...

    @abstractmethod
    def _graph_pass(self) -> LossGraph: ...

    @abstractmethod
    def _jets_pass(self, direction: Sequence[Tensor]) -> JetGraph: ...

    @abstractmethod
    def _undo_jets(self) -> None: ...


class ModelPasses(Passes):
    """Passes of a model and a loss over one batch.

    Args:
        model: a plain module.
        loss_fn: loss_fn(outputs, targets) -> scalar.
        batch: one batch.
        forward: forward(model, batch) -> (outputs, targets).
        scale: the factor of a gradient scaler; each backward pass runs on the scaled loss.
        called: the model, or its compiled wrapper, for passes of which only the gradient is taken.
        counted: whether to count the terms of the loss, as is needed of a piece of a batch.
        parameters, chosen, names, source, share_masks, start, ranks, linear, saved: as in `Passes`.

    Attributes:
        outputs: what the model returned in the first pass.
        count: how many terms the loss has, if it is counted.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Any,
        forward: Forward | None,
        scale: float,
        *,
        called: nn.Module,
        parameters: Sequence[nn.Parameter],
        chosen: Sequence[int],
        names: Sequence[str | None],
        source: torch.Generator | None,
        share_masks: bool,
        start: RandomState | None = None,
        ranks: Ranks | None = None,
        linear: bool = False,
        saved: SavedWeights | None = None,
        counted: bool = False,
    ) -> None:
        options = {"source": source, "share_masks": share_masks, "start": start, "ranks": ranks, "linear": linear}
        super().__init__(parameters, chosen, names=names, saved=saved, **options)
        self.model = model
        self._called = called
        self.count = 1.0
        self._counted = counted
        self.outputs: Any = None
        self._loss_fn = loss_fn
        self._batch = batch
        self._forward = forward
        self._scale = scale
        self._before_jets: ModelState | None = None
        self._autocast = Autocast({"cpu", *(parameter.device.type for parameter in parameters)})

    def need_outputs(self) -> None:
        """Make every pass with the plain module: compiled code draws other masks."""
        self._called = self.model

    @property
    def has_terms(self) -> bool:
        """Whether the loss of the batch has a term."""
        return self.count > 0

    def _seen(self, outputs: Any, targets: Any) -> None:
        """Keep what the first pass gave."""
        self.outputs = tree_map_only(Tensor, Tensor.detach, outputs)
        if self._counted:
            self.count = as_loss(self._loss_fn).count(self.outputs, targets)

    def _first_pass(self) -> tuple[Tensor, Gradients]:
        outputs, targets, loss, gradients = self._pass()
        self._seen(outputs, targets)
        return loss, gradients

    def _later_pass(self) -> tuple[Tensor, Gradients]:
        with module_state_kept(self.model):
            buffers_replaced(self.model)
            _, _, loss, gradients = self._pass()
        return loss, gradients

    def _pass(self) -> tuple[Any, Any, Tensor, Gradients]:
        with self._autocast.fresh():
            outputs, targets = run_forward(self._forward, self._called, self._batch)
            loss = Loss(self._loss_fn)(outputs, targets)
        with self._autocast.off(), refusals_named():
            scaled = loss if self._scale == 1 else loss * self._scale
            gradients = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            refuse_reentrant([loss])
        return outputs, targets, loss.detach(), unscaled(gradients, self._scale)

    def _hessian(self) -> Hessian:
        options: dict[str, Any] = {"params": self.chosen_names, "forward": self._forward}
        if self.ranks.size > 1:
            # as the mean of gradients has it, whatever the ranks' batches hold
            options |= {"group": self.ranks.group, "weight": lambda outputs, targets: 1.0}
        return Hessian(self.model, self._loss_fn, self._batch, **options)

    def _recorded_pass(self) -> Recorded:
        chosen = {str(i): parameter for i, parameter in zip(self._chosen, self.chosen, strict=True)}
        with self._autocast.fresh(), differentiable_twice(self.model) as repairs:
            outputs, targets = run_forward(self._forward, self.model, self._batch)
        self._seen(outputs, targets)
        attached = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not attached:
            raise TwofoldError("The model's outputs do not depend on any trainable parameter.")
        refuse_reentrant(attached)
        loss = self._as_loss()
        with self._autocast.off():
            around = self._recomputing if repairs.checkpointed else nullcontext
            recording = Recording(outputs, targets, loss, chosen, around)
        return Recorded(recording, loss, outputs, targets, self.parameters, self._scale, self._autocast, self._mean)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """What segments under a checkpoint are recomputed in: running statistics have moved already."""
        with module_state_kept(self.model), composed_kernels(self.model):
            buffers_replaced(self.model)
            yield

    def _graph_pass(self) -> LossGraph:
        with self._autocast.fresh(), differentiable_thrice(self.model):
            outputs, targets = run_forward(self._forward, self.model, self._batch)
            loss = Loss(self._loss_fn)(outputs, targets)
        check_differentiable_thrice([loss])
        refuse_reentrant([loss])
        self._seen(outputs, targets)
        return LossGraph(loss.detach(), loss * self._scale, self._scale, self._autocast)

    def _jets_pass(self, direction: Sequence[Tensor]) -> JetGraph:
        chosen = {str(i): parameter for i, parameter in zip(self._chosen, self.chosen, strict=True)}
        with ExitStack() as stack:
            if self.outputs is None:
                self._before_jets = ModelState(self.model)
            else:
                stack.enter_context(module_state_kept(self.model))
                buffers_replaced(self.model)
            stack.enter_context(self._autocast.fresh())
            stack.enter_context(composed_kernels(self.model))
            jets = stack.enter_context(carried(chosen, direction, Jets(graph=True)))
            outputs, targets = run_forward(self._forward, self.model, self._batch)
            found = output_jets(jets, outputs)
        if self.outputs is None:
            self._seen(outputs, targets)
        loss = self._as_loss()
        with self._autocast.off():
            at_outputs = OutputLoss(outputs, targets, loss, chosen)
        return JetGraph(found, at_outputs, loss, targets, self.parameters, self._scale, self._autocast)

    def _undo_jets(self) -> None:
        self.outputs = None
        if self._before_jets is not None:
            self._before_jets.restore()
        if self._start is not None:
            self._start.restore()

    def _as_loss(self) -> Loss:
        """The loss under the caller's autocast, times the scaler's factor."""
        loss = as_loss(self._loss_fn)
        loss.loss_fn = self._autocast.inside(loss.loss_fn)
        return loss if self._scale == 1 else ScaledLoss(loss, self._scale)
