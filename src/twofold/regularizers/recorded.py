"""The first pass with its graph kept: what the penalties differentiate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from twofold.curvature.differentiable import refusals_named
from twofold.curvature.jet_rules import Jet
from twofold.curvature.losses import Loss
from twofold.curvature.recording import OutputLoss, Recording, leaves_of
from twofold.parameters import dot
from twofold.regularizers.autocast import Autocast
from twofold.regularizers.gradients import Gradients, unscaled
from twofold.types import Matrix


@dataclass(frozen=True)
class Recorded:
    """The first pass with its graph kept, for second derivatives.

    Attributes:
        recording: the graph over the chosen parameters; the loss in it is multiplied with `scale`.
        loss_view: the loss as a function of the outputs.
        outputs: the model's outputs, on the graph.
        targets: the batch's targets.
        parameters: every trainable parameter.
        scale: a gradient scaler's factor, against underflow in half precision.
        autocast: the caller's autocast.
        mean: takes gradients of all trainable parameters to their mean over the ranks that perturb alike.
    """

    recording: Recording
    loss_view: Loss
    outputs: Any
    targets: Any
    parameters: list[nn.Parameter]
    scale: float
    autocast: Autocast
    mean: Callable[[Gradients], Gradients]

    @property
    def loss(self) -> Tensor:
        """The loss, detached."""
        return self.recording.value / self.scale

    @cached_property
    def gradients(self) -> Gradients:
        """The plain gradient of every trainable parameter, from the graph that the products need anyhow.

        It is the mean over the ranks that perturb alike.
        """
        chosen = {id(parameter) for parameter in self.recording.parameters}
        others = any(id(parameter) not in chosen for parameter in self.parameters)
        plain = self.gradients_with([], []) if others else [None for _ in self.parameters]
        with self.autocast.off():
            known = unscaled([slope.detach() for slope in self.recording.graphed_gradient], self.scale)
        read = [z for z, is_read in zip(self.recording.outputs, self.recording.reads, strict=True) if is_read]
        reached = {id(leaf) for leaf in [*read, *leaves_of(read)]}
        graphed = dict(zip(map(id, self.recording.parameters), known, strict=True))
        return self.mean(
            [
                graphed.get(id(parameter), other) if id(parameter) in reached else None
                for parameter, other in zip(self.parameters, plain, strict=True)
            ]
        )

    def gradients_with(
        self, heads: Sequence[Tensor], cotangents: Sequence[Tensor], at_outputs: Sequence[Tensor] | None = None
    ) -> Gradients:
        """Return, from one backward pass, the gradient of L + (sum_i <heads_i, sg(cotangents_i)> + <z, sg(at_z)>) / s.

        Args:
            heads: tensors on the graph of the parameters; like the loss in it, multiplied with the scale s.
            cotangents: one constant for each head.
            at_outputs: at_z, one constant for each differentiable tensor of the outputs, multiplied with s too.
        """
        sources = list(zip(heads, cotangents, strict=True))
        at_z = self.recording.output_gradient
        if at_outputs is not None:
            at_z = [u + more for u, more in zip(at_z, at_outputs, strict=True)]
        sources += self._read(at_z)
        tensors, constants = zip(*[(head, u) for head, u in sources if head.requires_grad], strict=True)
        with self.autocast.off(), refusals_named(), self.recording.around():
            gradients = torch.autograd.grad(tensors, self.parameters, constants, retain_graph=True, allow_unused=True)
        return unscaled(gradients, self.scale)

    def product(self, vector: Sequence[Tensor], matrix: Matrix) -> list[Tensor]:
        """Return H v, GN v or NME v, v over the chosen parameters; their mean over the ranks that perturb alike."""
        with self.autocast.off():
            ((_, product),) = self.recording.products(vector, (matrix,))
            found = unscaled(product, self.scale)
        named = dict(zip(map(id, self.recording.parameters), found, strict=True))
        places = [named.get(id(parameter)) for parameter in self.parameters]
        averaged = self.mean(places)
        by_place = {id(parameter): part for parameter, part in zip(self.parameters, averaged, strict=True)}
        return [
            known if (known := by_place[id(p)]) is not None else torch.zeros_like(p) for p in self.recording.parameters
        ]

    def jvp(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Return J v, v over the chosen parameters."""
        with self.autocast.off():
            return self.recording.jvp(vector)

    def output_hessian(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Return H_z t, over the outputs."""
        with self.autocast.off():
            return [product / self.scale for product in self.recording.output_hessian(tangents)]

    def output_third(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of t'H_z t in the outputs, t held fixed."""
        with self.autocast.off():
            third = self.loss_view.output_third(self.recording.detached, self.targets)(tangents)
            return [one / self.scale for one in third]

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return J'u over the chosen parameters, with a graph of its own; zeros where nothing depends on them."""
        attached, u = zip(*[(z, u) for z, u in self._read(cotangents) if z.requires_grad], strict=True)
        with self.autocast.off(), refusals_named(), self.recording.around():
            chosen = self.recording.parameters
            return list(torch.autograd.grad(attached, chosen, u, create_graph=True, materialize_grads=True))

    def _read(self, cotangents: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Each output that the loss depends on, with its cotangent."""
        every = zip(self.recording.outputs, cotangents, self.recording.reads, strict=True)
        return [(z, u) for z, u, is_read in every if is_read]


@dataclass(frozen=True)
class JetGraph:
    """A pass that carried jets of theta + e v on a graph, and the loss at its outputs.

    Attributes:
        jets: z0 + e z1 + e^2/2 z2 of the outputs.
        at_outputs: the loss, multiplied with `scale`.
        loss_view: the loss as a function of the outputs.
        targets: the batch's targets.
        parameters: every trainable parameter.
        scale: a gradient scaler's factor.
        autocast: the caller's autocast.
    """

    jets: list[Jet]
    at_outputs: OutputLoss
    loss_view: Loss
    targets: Any
    parameters: list[nn.Parameter]
    scale: float
    autocast: Autocast

    @property
    def loss(self) -> Tensor:
        """The loss, detached."""
        return self.at_outputs.value / self.scale

    def gradients(self, factor: float, *, with_loss: bool) -> tuple[Tensor, Gradients]:
        """Return v'Hv, and the gradient of factor v'Hv (plus the loss) from one backward pass.

        With u = dl/dz and T the third derivative of the loss, v'Hv = <z1, H_z z1> + <u, z2> has the derivatives
        H_z z2 + T(z1, z1) in z0, 2 H_z z1 in z1 and u in z2.
        """
        u = self.at_outputs.output_gradient
        with self.autocast.off(), torch.no_grad():
            first = [torch.zeros_like(z0) if z1 is None else z1.detach() for z0, z1, _ in self.jets]
            second = [torch.zeros_like(z0) if z2 is None else z2.detach() for z0, _, z2 in self.jets]
            curved = self.at_outputs.output_hessian(first)
            third = self.loss_view.output_third(self.at_outputs.detached, self.targets)(first)
            bent = [a + b for a, b in zip(self.at_outputs.output_hessian(second), third, strict=True)]
            value = (dot(first, curved) + dot(u, second)) / self.scale
        sources: list[tuple[Tensor, Tensor]] = []
        for i, jet in enumerate(self.jets):
            if self.at_outputs.reads[i]:
                at_z0 = factor * bent[i] + u[i] if with_loss else factor * bent[i]
                parts = ((jet.z0, at_z0), (jet.z1, 2 * factor * curved[i]), (jet.z2, factor * u[i]))
                sources += [(z, at.to(z.dtype)) for z, at in parts if z is not None and z.requires_grad]
        if not sources:
            return value, [None for _ in self.parameters]
        heads, cotangents = zip(*sources, strict=True)
        with self.autocast.off(), refusals_named():
            found = torch.autograd.grad(heads, self.parameters, cotangents, allow_unused=True)
        return value, unscaled(found, self.scale)


@dataclass(frozen=True)
class LossGraph:
    """The first pass with its graph kept, right to third order.

    Attributes:
        loss: the loss, detached.
        scaled: the loss times `scale`, on the graph.
        scale: a gradient scaler's factor.
        autocast: the caller's autocast.
    """

    loss: Tensor
    scaled: Tensor
    scale: float
    autocast: Autocast

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Take derivatives in the graph's own precision, with refusals by name."""
        with self.autocast.off(), refusals_named():
            yield
