"""One recorded forward pass at (parameters, batch), and every product that can be had from it.

With s(theta, u) = u' J(theta) v, both halves are derivatives of one scalar: ds/du = J v, and ds/dtheta at u = dl/dz is
NME v. So z is recorded once, then w = J'u with a graph of its own; one backward pass through w gives NME v and J v
together, GN v = J'(H_z J v) is one more through z, and H v = GN v + NME v is a sum, never a difference. For H v alone a
gate lets the curvature of the loss into the same pass. In units of one forward pass: H v 6, GN v 4, all three 8.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from twofold.batches import describe
from twofold.curvature.differentiable import refusals_named
from twofold.curvature.losses import Loss, OutputProduct, detached_leaves, is_differentiable
from twofold.errors import HIDDEN_PARAMETER, LOSS_USES_PARAMETERS, REENTRANT, TwofoldError
from twofold.parameters import dot
from twofold.types import Matrix

T = TypeVar("T")


class OutputLoss:
    """The loss seen from the outputs of one pass.

    Args:
        outputs: what the model returned: a tensor or any nest of tensors.
        targets: the batch's targets.
        loss: the recognised loss.
        parameters: the chosen parameters by name, which the loss must reach through the outputs alone.

    Attributes:
        detached: the outputs, off the graph.
        value: the loss, detached.
        count: the batch's weight in an average over a data set.
        output_gradient: dl/dz, one tensor for each differentiable tensor of the outputs; torch's own, to the bit.
        reads: for each of these, whether the loss depends on it at all.

    Raises:
        TwofoldError: the loss is not scalar, or depends on the parameters beside the outputs.
    """

    def __init__(self, outputs: Any, targets: Any, loss: Loss, parameters: Mapping[str, Tensor]) -> None:
        self.detached = tree_map_only(Tensor, Tensor.detach, outputs)
        leaves, copies = detached_leaves(self.detached)
        if not leaves:
            raise TwofoldError(
                f"The model's outputs hold no real floating-point tensor: {describe(outputs)}. Pass forward=f with "
                "f(model, batch) -> (outputs, targets) that returns the tensors to differentiate."
            )
        value = loss(copies, targets)
        self.count = loss.count(self.detached, targets)
        _check_loss_graph(value, leaves, parameters)
        self.value = value.detach()
        self.output_gradient = [torch.zeros_like(leaf) for leaf in leaves]
        self.reads = [True for _ in leaves]
        if self.count > 0 and value.requires_grad:
            known = torch.autograd.grad(value, leaves, allow_unused=True)
            self.reads = [gradient is not None for gradient in known]
            self.output_gradient = [
                zero if u is None else u for zero, u in zip(self.output_gradient, known, strict=True)
            ]
        self._loss, self._targets = loss, targets

    @cached_property
    def output_hessian(self) -> OutputProduct:
        """t -> H_z t, over the differentiable tensors of the outputs."""
        with torch.enable_grad():
            return self._loss.output_hessian(self.detached, self._targets)


class _Gate:
    """Whether the curvature of the loss takes part in a pass. It holds nothing of the graph that it stands in."""

    def __init__(self, at_outputs: OutputLoss) -> None:
        self.open = False
        self.at_outputs = at_outputs


class _LossGradient(torch.autograd.Function):
    """z -> dl/dz, with derivative H_z while the gate is open and none while it is closed."""

    @staticmethod
    def forward(ctx: Any, gate: _Gate, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        return tuple(gradient.detach() for gradient in gate.at_outputs.output_gradient)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gate = ctx.gate
        if not gate.open:
            return (None, *(None for _ in tangents))
        known = [
            torch.zeros_like(u) if t is None else t
            for t, u in zip(tangents, gate.at_outputs.output_gradient, strict=True)
        ]
        return (None, *gate.at_outputs.output_hessian(known))


class Recording:
    """The graph of one forward pass, reused for every vector at the same parameters and batch.

    Args:
        outputs: what the model returned: a tensor or any nest of tensors, on the graph of `parameters`.
        targets: the batch's targets.
        loss: the recognised loss.
        parameters: the chosen parameters by name, leaves of the graph.
        around: entered around every pass that differentiates: what segments under a checkpoint are recomputed in.

    Attributes:
        index: the batch's place in its data set.
        detached: the outputs off their graph, as the loss takes them.
        value: the loss, detached.
        count: the batch's weight in an average over a data set.
        output_gradient: dl/dz, one tensor for each differentiable tensor of the outputs; torch's own, to the bit.
        reads: for each of these, whether the loss depends on it at all.

    Raises:
        TwofoldError: the loss is not scalar, or depends on the parameters beside the outputs.
    """

    def __init__(
        self,
        outputs: Any,
        targets: Any,
        loss: Loss,
        parameters: Mapping[str, Tensor],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.around, self.targets, self.index = around, targets, 0
        self.parameters = list(parameters.values())
        self.outputs: list[Tensor] = [leaf for leaf in tree_leaves(outputs) if is_differentiable(leaf)]
        at_outputs = OutputLoss(outputs, targets, loss, parameters)
        self.value, self.count, self.reads = at_outputs.value, at_outputs.count, at_outputs.reads
        self.detached, self.output_gradient = at_outputs.detached, at_outputs.output_gradient
        self._made: dict[Any, Any] = {}
        self._gate = _Gate(at_outputs)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what `make` made at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def output_hessian(self) -> OutputProduct:
        """t -> H_z t, over the differentiable tensors of the outputs."""
        return self._gate.at_outputs.output_hessian

    def _reverse_pass(self) -> tuple[list[Tensor], list[Tensor]]:
        """(w = J'u, u), w with a graph in both theta and u."""
        attached = [z for z in self.outputs if z.requires_grad]
        if not attached:
            return [torch.zeros_like(p) for p in self.parameters], []
        with torch.enable_grad(), refusals_named(), self.around():
            every = _LossGradient.apply(self._gate, *self.outputs)
            u = [gradient for gradient, z in zip(every, self.outputs, strict=True) if z.requires_grad]
            w = torch.autograd.grad(attached, self.parameters, u, create_graph=True, materialize_grads=True)
            _check_once_differentiable(attached, w)
        return list(w), u

    @cached_property
    def _reverse(self) -> tuple[list[GradientEdge | None], list[Tensor]]:
        """Where the graph of w = J'u begins (None: w is constant), and u. Products need no values of w."""
        w, u = self._reverse_pass()
        return [get_gradient_edge(wi) if wi.requires_grad else None for wi in w], u

    @property
    def gradient(self) -> list[Tensor]:
        """The gradient of the loss, J' dl/dz, in the parameters' shapes."""
        return self.vjp(self.output_gradient)

    @cached_property
    def graphed_gradient(self) -> list[Tensor]:
        """The gradient of the loss, on the graph that products share; free beside them where it is asked for first."""
        w, u = self._reverse_pass()
        self._reverse = [get_gradient_edge(wi) if wi.requires_grad else None for wi in w], u
        return w

    @refusals_named()
    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return J'u for one u per differentiable output tensor."""
        pairs = [(z, u) for z, u in zip(self.outputs, cotangents, strict=True) if z.requires_grad]
        if not pairs:
            return [torch.zeros_like(p) for p in self.parameters]
        attached, u = zip(*pairs, strict=True)
        with self.around():
            return list(torch.autograd.grad(attached, self.parameters, u, retain_graph=True, materialize_grads=True))

    @refusals_named()
    def jvp(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Return J v, one tensor per differentiable output tensor."""
        _, u = self._reverse
        return self._fill(self._through_w(vector, u, gate_open=False))

    def products(self, vector: Sequence[Tensor], parts: Collection[Matrix]) -> Iterator[tuple[Matrix, list[Tensor]]]:
        """Yield the named matrices times v, sharing passes; none is held when the next is computed.

        Args:
            vector: v, one tensor per parameter, of its shape.
            parts: ("hessian",) alone, or any of "gauss_newton" and "nme".
        """
        with refusals_named():
            if "hessian" in parts:
                yield "hessian", self._through_w(vector, self.parameters, gate_open=True)
                return
            _, u = self._reverse
            inputs = [*(self.parameters if "nme" in parts else ()), *(u if "gauss_newton" in parts else ())]
            through = self._through_w(vector, inputs, gate_open=False)
            if "nme" in parts:
                jv = through[len(self.parameters) :]
                del through[len(self.parameters) :]
                yield "nme", through
            else:
                jv = through
            del through
            if "gauss_newton" in parts:
                yield "gauss_newton", self.vjp(self.output_hessian(self._fill(jv)))

    @refusals_named()
    def quadratic_forms(self, vector: Sequence[Tensor], parts: Sequence[Matrix]) -> dict[Any, Tensor]:
        """Return v'GN v, v'NME v or both, in one pass."""
        _, u = self._reverse
        through = self._through_w(vector, [*self.parameters, *u] if "nme" in parts else u, gate_open=False)
        nme, jv = through[: len(through) - len(u)], self._fill(through[len(through) - len(u) :])
        found = {"gauss_newton": dot(jv, self.output_hessian(jv))}
        return found | ({"nme": dot(vector, nme)} if "nme" in parts else {})

    def _through_w(self, vector: Sequence[Tensor], inputs: list[Tensor], *, gate_open: bool) -> list[Tensor]:
        w, _ = self._reverse
        pairs = [(wi, vi) for wi, vi in zip(w, vector, strict=True) if wi is not None]
        if not pairs or not inputs:
            return [torch.zeros_like(tensor) for tensor in inputs]
        curved, v = zip(*pairs, strict=True)
        self._gate.open = gate_open
        try:
            with self.around():
                return list(torch.autograd.grad(curved, inputs, v, retain_graph=True, materialize_grads=True))
        finally:
            self._gate.open = False

    def _fill(self, attached: Sequence[Tensor]) -> list[Tensor]:
        """Add zeros for the outputs that do not depend on the parameters."""
        given = iter(attached)
        return [next(given) if z.requires_grad else torch.zeros_like(z) for z in self.outputs]


def _check_loss_graph(value: Tensor, outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse a loss that reaches the chosen parameters by another way than the outputs."""
    places = {parameter.data_ptr(): name for name, parameter in parameters.items() if parameter.numel()}
    for leaf in leaves_of([value]):
        if leaf.layout != torch.strided or not leaf.numel():
            continue
        if leaf.data_ptr() in places and not any(leaf is output for output in outputs):
            raise TwofoldError(LOSS_USES_PARAMETERS.format(name=places[leaf.data_ptr()]))


def check_reached(outputs: Any, live: Mapping[str, Tensor]) -> None:
    """Refuse a forward pass that reached a live parameter past the alias that was lent in its place."""
    names = {id(parameter): name for name, parameter in live.items()}
    attached = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    refuse_reentrant(attached)
    for leaf in leaves_of(attached):
        if id(leaf) in names:
            raise TwofoldError(HIDDEN_PARAMETER.format(name=names[id(leaf)]))


def refuse_reentrant(tensors: Sequence[Tensor]) -> None:
    """Refuse the reentrant form of checkpointing, which hides the parameters in it from torch.autograd.grad."""
    if any(node.name().startswith("CheckpointFunction") for node in graph_nodes(tensors)):
        raise TwofoldError(REENTRANT)


def leaves_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that gradients of these tensors would accumulate into."""
    leaves = [getattr(node, "variable", None) for node in graph_nodes(tensors)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def graph_nodes(beginnings: Sequence[Tensor | GradientEdge]) -> Iterator[Any]:
    """Yield every node of the graphs that begin at these tensors or edges once."""
    seen, waiting = set(), [begin.grad_fn if isinstance(begin, Tensor) else begin.node for begin in beginnings]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions)


def _check_once_differentiable(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Refuse functions marked @once_differentiable: torch cuts the graph there and does not say so."""
    if any(isinstance(node, BackwardCFunction) for node in graph_nodes(outputs)):
        for node in graph_nodes(gradients):
            if node.name().endswith("Error"):
                raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def saved_bytes(recording: Recording) -> int:
    """Bytes that the recorded graphs hold for their backward passes, each piece of memory counted once."""
    ends = [*recording.outputs, *(edge for edge in recording._reverse[0] if edge is not None)]
    with recording.around():
        return _saved_bytes(recording, ends)


def _saved_bytes(recording: Recording, ends: Sequence[Tensor | GradientEdge]) -> int:
    storages: dict[int, int] = {}
    nodes = list(graph_nodes(ends))
    for node in nodes:
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        held = list(getattr(node, "held", ()))
        for tensor in tree_leaves([saved, getattr(node, "saved_tensors", ()), held]):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # An operation that is told apart, or keeps its derivatives, has a graph of its own.
        own = [*getattr(node, "gradients", ()), *getattr(getattr(node, "operation", None), "outputs", ()), *held]
        nodes += graph_nodes([tensor for tensor in own if isinstance(tensor, Tensor)])
    lent = {parameter.untyped_storage().data_ptr() for parameter in recording.parameters}
    return sum(size for place, size in storages.items() if place not in lent)
