"""A recorded forward pass whose operations can be told apart: what each adds to the curvature.

An operation y = f(x) with output adjoint a = dL/dy adds J_x' [a . d2f/dx2] J_x to the NME, J_x being the derivative of
its inputs in the parameters. Operations of the chosen kinds run on small graphs of their own, and the graph of the pass
holds a pair of stand-ins for each:

    _Apart     x -> y       derivative: _Adjoint
    _Adjoint   a -> J_f'a   derivative in a: J_f; the one in x, the operation's source a . d2f/dx2 (J_x v), is held back

One pass through w = J'u then gives J v, every source, and what all other operations add; a further backward pass with
some of the sources injected at the operations' inputs gives what these operations add. Values, gradients and sources
are torch's own.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from twofold.curvature.differentiable import refusals_named
from twofold.curvature.recording import Recording
from twofold.parameters import dot

Group: TypeAlias = Hashable
"""The name of some operations whose parts are summed; "gauss_newton" and "rest" have a meaning of their own."""


@dataclass(frozen=True)
class Source:
    """What one operation met in a pass with v.

    Attributes:
        operation: the operation.
        tangents: J_x v for each input x (None: zero).
        sources: a . d2f/dx2 (J_x v) for each input (None: zero).
    """

    operation: "Operation"
    tangents: Sequence[Tensor | None]
    sources: Sequence[Tensor | None]


class Held:
    """The sources that a pass holds back, where it collects them."""

    def __init__(self) -> None:
        self._found: list[Source] | None = None

    def add(self, source: Source) -> None:
        """Take the source of one operation."""
        if self._found is not None:
            self._found.append(source)

    @contextmanager
    def collected(self) -> Iterator[list[Source]]:
        """Collect what the passes inside hold back."""
        self._found = found = []
        try:
            yield found
        finally:
            self._found = None


class Operation:
    """One call of an operation, on a graph of its own.

    Attributes:
        kind: what sort of operation it is.
        module: the name of the module that called it.
        held: where its sources go.
        inputs: leaves of its own graph, one for each tensor argument that the pass differentiates.
        outputs: the results that have a gradient, on its own graph.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        kind: str,
        module: str,
        in_place: bool,
        held: Held,
    ) -> None:
        self.kind, self.module, self.held = kind, module, held
        leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
        places = [i for i, leaf in enumerate(leaves) if is_differentiated(leaf)]
        self._attached = [leaves[i] for i in places]
        self.edges = [get_gradient_edge(tensor) for tensor in self._attached]
        # What is about to be overwritten, and may be read again by its derivatives, is differentiated at a copy.
        self.inputs = [
            (tensor.detach().clone() if in_place and tensor is args[0] else tensor.detach()).requires_grad_()
            for tensor in self._attached
        ]
        for i, tensor in zip(places, self.inputs, strict=True):
            leaves[i] = tensor
        own_args, own_kwargs = tree_unflatten(leaves, structure)
        if in_place:
            own_args = (own_args[0].clone(), *own_args[1:])
        self._result = func(*own_args, **own_kwargs)
        self.outputs = [leaf for leaf in tree_flatten(self._result)[0] if is_differentiated(leaf)]

    def attach(self) -> Any:
        """Return the operation's results on the graph of the pass."""
        results = iter(_Apart.apply(self, *self._attached) if self.outputs else ())  # pyrefly: ignore
        attached = tree_map(lambda leaf: next(results) if is_differentiated(leaf) else leaf, self._result)
        del self._attached, self._result
        return attached

    def gradients(self, adjoints: Sequence[Tensor | None], *, create_graph: bool = False) -> list[Tensor | None]:
        """Return J_f'a for adjoints a of the outputs (None: zero)."""
        pairs = [(y, a) for y, a in zip(self.outputs, adjoints, strict=True) if a is not None]
        if not pairs:
            return [None for _ in self.inputs]
        outputs, known = zip(*pairs, strict=True)
        return list(
            torch.autograd.grad(
                outputs, self.inputs, known, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        )


def is_differentiated(value: Any) -> bool:
    """Say whether a value is a tensor on a graph."""
    return isinstance(value, Tensor) and value.requires_grad


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.operation = operation
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in operation.outputs)

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return (None, *_Adjoint.apply(ctx.operation, *adjoints))  # pyrefly: ignore
        return (None, *ctx.operation.gradients(adjoints))


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.operation = operation
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            ctx.adjoints = [None if a is None else a.detach().requires_grad_() for a in adjoints]
            ctx.gradients = operation.gradients(ctx.adjoints, create_graph=True)
        return tuple(None if gradient is None else gradient.detach() for gradient in ctx.gradients)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [
            (gradient, tangent)
            for gradient, tangent in zip(ctx.gradients, tangents, strict=True)
            if is_differentiated(gradient) and tangent is not None
        ]
        if not given:
            nothing = [None for _ in ctx.operation.inputs]
            ctx.operation.held.add(Source(ctx.operation, nothing, nothing))
            return (None, *(None for _ in ctx.adjoints))
        known = [adjoint for adjoint in ctx.adjoints if adjoint is not None]
        curved, v = zip(*given, strict=True)
        found = torch.autograd.grad(curved, [*known, *ctx.operation.inputs], v, retain_graph=True, allow_unused=True)
        ctx.operation.held.add(Source(ctx.operation, tangents, found[len(known) :]))
        in_adjoints = iter(found[: len(known)])
        return (None, *(None if adjoint is None else next(in_adjoints) for adjoint in ctx.adjoints))


class Dissection(Recording):
    """The recording of a pass in which operations ran as `Operation`s.

    Args:
        held: where these operations put their sources.
        recorded: the arguments of `Recording`.
    """

    def __init__(self, held: Held, *recorded: Any) -> None:
        super().__init__(*recorded)
        self._held = held

    @refusals_named()
    def dissect(
        self, vector: Sequence[Tensor], group: Callable[[Operation], Group], wanted: Callable[[Group], bool]
    ) -> dict[Group, list[Tensor]]:
        """Return GN v and what each group of operations adds to NME v; the sum of all is H v.

        Args:
            vector: v, one tensor per parameter, of its shape.
            group: the group that an operation belongs to.
            wanted: which of the groups to compute, each for one backward pass.

        Returns:
            {"gauss_newton": GN v, "rest": what operations add that were not told apart, group: its part}.
        """
        rest, jv, held = self._looked_through(vector, with_rest=wanted("rest"))
        parts: dict[Group, list[Tensor]] = {}
        if wanted("gauss_newton"):
            parts["gauss_newton"] = self.vjp(self.output_hessian(jv))
        if wanted("rest"):
            parts["rest"] = rest
        groups: dict[Group, list[tuple[GradientEdge, Tensor]]] = {}
        for source in held:
            edges = zip(source.operation.edges, source.sources, strict=True)
            groups.setdefault(group(source.operation), []).extend((edge, s) for edge, s in edges if s is not None)
        for name, injected in groups.items():
            if wanted(name):
                parts[name] = self._injected(injected)
        return parts

    @refusals_named()
    def forms(
        self, vectors: Sequence[Sequence[Tensor]], group: Callable[[Operation], Group]
    ) -> dict[Group, Float[Tensor, "K K"]]:
        """Return v_i'A v_j for the parts A of `dissect` and K vectors, with no further pass for a part.

        v'A w of an operation is (J_x v)' of its source at w.
        """
        looks = [self._looked_through(vector, with_rest=True) for vector in vectors]
        curved = [self.output_hessian(jv) for _, jv, _ in looks]
        forms: dict[Group, Tensor] = {}
        shape = (len(vectors), len(vectors))
        for i, (_, jv, tangents) in enumerate(looks):
            for j, (rest, _, sources) in enumerate(looks):
                found: list[tuple[Group, Sequence[Tensor | None], Sequence[Tensor | None]]] = [
                    ("gauss_newton", jv, curved[j]),
                    ("rest", vectors[i], rest),
                ]
                met = {id(source.operation): source.sources for source in sources}
                found += [(group(t.operation), t.tangents, met[id(t.operation)]) for t in tangents]
                for name, left, right in found:
                    form = forms.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                    form[i, j] += _inner(left, right)
        return forms

    def _looked_through(
        self, vector: Sequence[Tensor], *, with_rest: bool
    ) -> tuple[list[Tensor], list[Tensor], list[Source]]:
        """One pass through w: what untold operations add to NME v (if asked for), J v, and every source."""
        _, u = self._reverse
        with self._held.collected() as held:
            through = self._through_w(vector, [*self.parameters, *u] if with_rest else u, gate_open=False)
        start = len(through) - len(u)
        return through[:start], self._fill(through[start:]), held

    def _injected(self, sources: Sequence[tuple[GradientEdge, Tensor]]) -> list[Tensor]:
        if not sources:
            return [torch.zeros_like(parameter) for parameter in self.parameters]
        edges, values = zip(*sources, strict=True)
        with self.around():
            return list(torch.autograd.grad(edges, self.parameters, values, retain_graph=True, materialize_grads=True))


def _inner(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float:
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    return dot(*zip(*pairs, strict=True)).item() if pairs else 0.0
