"""Order-2 jets through a forward pass: z(theta + e v) = z0 + e z1 + e^2/2 z2, with no graph.

Quadratic forms of both halves follow from the outputs' jet alone,

    v'GN v = z1' H_z z1,        v'NME v = <dl/dz, z2>.

The model runs as it is, on its own tensors; an override of torch carries z1 and z2 beside each of them, by the rules of
`jet_rules`. What depends on the parameters requires a gradient, though nothing is recorded: so a tensor that requires
one and has no jet betrays an operation that was not seen, and the pass raises `NotCarriedError`. What autograd takes
for a constant (`detach`, `no_grad`, comparisons) is one here too.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from twofold.activations import functions
from twofold.activations.functions import Call, saving_is_hooked, taken_by
from twofold.activations.known import FUSED, PIECEWISE_LINEAR, activation_name
from twofold.activations.second_derivative import second_derivatives_on_top
from twofold.curvature.composites import COMPOSITES, opened, warn_of_fused
from twofold.curvature.differentiable import refusals_named, refuse_hidden_segment
from twofold.curvature.jet_rules import FLAT, OUT_OF_PLACE, RULES, Jet, NotCarriedError, chained
from twofold.curvature.losses import is_differentiable
from twofold.curvature.recording import OutputLoss
from twofold.parameters import dot

Sources: TypeAlias = Literal["all", "activation", "rest"]
"""Which operations' second derivatives enter z2: those of all, of the activations, or of all others."""

_JET = "_twofold_jet"


class Jets(TorchFunctionMode):
    """The override that carries jets; see `carried`.

    Args:
        graph: whether jets are on a graph, to be differentiated in reverse.
        sources: which operations' second derivatives enter z2.
        warned: names of kernels that hide activations, of which a warning has been given already.
    """

    def __init__(self, *, graph: bool = False, sources: Sources = "all", warned: set[str] | None = None) -> None:
        super().__init__()
        self._graph, self._sources, self._warned = graph, sources, warned
        self._inside_fused = False
        self._written: set[int] = set()

    def of(self, tensor: Tensor) -> Jet | None:
        """Return a tensor's jet; None for a constant.

        Raises:
            NotCarriedError: it depends on the parameters by a way that was not seen.
        """
        if not tensor.requires_grad:
            if self._written and tensor.is_floating_point() and _place(tensor) in self._written:
                raise NotCarriedError("a view of memory that was written into")
            return None
        known = tensor.__dict__.get(_JET)
        if known is None:
            if tensor.is_leaf and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return None
            raise NotCarriedError("an operation that torch's overrides do not see")
        z1, z2, version = known
        if version != tensor._version:
            raise NotCarriedError("a write into memory that several tensors share")
        return Jet(tensor, z1, z2)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_hidden_segment(args, kwargs)
        if not torch.is_grad_enabled() or not (self._written or _differentiated(args) or _differentiated(kwargs)):
            return func(*args, **kwargs)
        if func in FUSED and not self._inside_fused:
            return self._fused(func, args, kwargs)
        composite = COMPOSITES.get(func)
        if composite is not None:
            with self:
                return composite(*args, **kwargs)
        if func in RULES or func in OUT_OF_PLACE:
            return self._carried(func, args, kwargs)
        return self._without_rule(func, args, kwargs)

    def swapped(self, x: Tensor, call: Call) -> Tensor:
        """Take over an activation whose second derivative is a stand-in."""
        jet = self.of(x) if torch.is_grad_enabled() else None
        if jet is None:
            return functions.swapped(x, call)

        def rule(_: Any, jet: Jet) -> Jet:
            if self._graph:
                at, slope = functions.swapped(jet.z0, call), lambda t: functions.slope(t, jet.z0, call)
            else:
                at, slope = call.value(jet.z0), lambda t: call.slope(t, jet.z0, False)
            return chained(at, jet, slope, lambda: call.curvature(jet.z0).to(jet.z0.dtype))

        return self._attached(self._applied(rule, None, (jet,), {}, activation=True))

    def _fused(self, func: Callable, args: Any, kwargs: Any) -> Any:
        if self._sources != "all" and self._warned is not None:
            warn_of_fused(func, self._warned)
        self._inside_fused = True
        try:
            return self.__torch_function__(func, (), args, kwargs)
        finally:
            self._inside_fused = False

    def _carried(self, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("out") is not None:
            raise NotCarriedError(f"{func.__name__} with out=")
        if self._graph and saving_is_hooked():
            raise NotCarriedError("torch.utils.checkpoint")
        outside = OUT_OF_PLACE.get(func, func)
        in_place = outside is not func
        if func in _INPLACE_AT:
            kwargs = dict(kwargs)
            in_place = kwargs.pop("inplace", False) or (len(args) > _INPLACE_AT[func] and args[_INPLACE_AT[func]])
            args = args[: _INPLACE_AT[func]]
        target: Any = (args[0] if args else kwargs.get("input", kwargs.get("self"))) if in_place else None
        jets, named = self._lifted(args), self._lifted(kwargs)
        if in_place and self._graph and isinstance(target, Tensor):
            # Rules may keep their input, which is about to be overwritten.
            jets = (jets[0]._replace(z0=jets[0].z0.clone()) if isinstance(jets[0], Jet) else jets[0], *jets[1:])
        name = activation_name(func, args, kwargs)
        activation = name is not None and name not in PIECEWISE_LINEAR and not self._inside_fused
        result = self._applied(RULES[outside], outside, jets, named, activation=activation)
        return self._written_into(target, result) if in_place else self._attached(result)

    def _applied(self, rule: Callable, func: Any, args: Any, kwargs: Any, *, activation: bool) -> Any:
        whole = self._sources == "all" or rule in FLAT or (self._sources == "activation") == activation
        with torch.set_grad_enabled(self._graph):
            try:
                if whole:
                    return rule(func, *args, **kwargs)
                # Without the source f''(x1, x1): the rule is linear in x2 alone, and in x1 alone.
                first = rule(func, *_only(args, 1), **_only(kwargs, 1))
                second = rule(func, *_only(args, 2), **_only(kwargs, 2))
                return _paired(first, second)
            except (TypeError, ValueError, IndexError, RuntimeError) as error:
                raise NotCarriedError(f"{getattr(func, '__name__', func)} ({error})") from error

    def _lifted(self, value: Any) -> Any:
        """Put jets in the places of the tensors that have one."""
        if isinstance(value, Tensor):
            jet = self.of(value)
            return value if jet is None else jet
        if isinstance(value, dict):
            return {key: self._lifted(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._lifted(one) for one in value)
        if isinstance(value, list | tuple) and _differentiated(value):
            raise NotCarriedError(type(value).__name__)
        return value

    def _attached(self, result: Any) -> Any:
        """Leave jets on the tensors that they belong to."""
        if isinstance(result, Jet):
            z0, z1, z2 = result
            if not self._graph:
                z0.requires_grad_()
            z0.__dict__[_JET] = (_cast(z1, z0), _cast(z2, z0), z0._version)
            return z0
        if isinstance(result, tuple | list):
            return type(result)([self._attached(one) for one in result])
        return result

    def _written_into(self, target: Tensor, result: Jet) -> Tensor:
        if not target.requires_grad:
            # Other tensors may share this memory, and are no constants any longer.
            self._written.add(_place(target))
        with torch.set_grad_enabled(self._graph):
            target.copy_(result.z0)
            parts = [None if part is None else part.to(target.dtype).expand_as(target) for part in result[1:]]
        return self._attached(Jet(target, *parts))

    def _without_rule(self, func: Any, args: Any, kwargs: Any) -> Any:
        inside = _ITERATORS.get(func) or opened(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        jets = [jet for jet in _flat((self._lifted(args), self._lifted(kwargs))) if isinstance(jet, Jet)]
        name = getattr(func, "__name__", str(func))
        constant = all(jet.z1 is None and jet.z2 is None for jet in jets)
        if func in _GRADIENTS or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_"):
            raise NotCarriedError(name)
        result = func(*args, **kwargs)
        for tensor in _flat(result):
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.__dict__.get(_JET) is None:
                if not constant:
                    raise NotCarriedError(name)
                tensor.__dict__[_JET] = (None, None, tensor._version)
        return result


_GRADIENTS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward, Tensor.register_hook, Tensor.retain_grad}
_ITERATORS: dict[Callable, Callable] = {Tensor.__iter__: lambda x: iter(x.unbind(0))}


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _cast(part: Tensor | None, z0: Tensor) -> Tensor | None:
    return part if part is None or part.dtype == z0.dtype else part.to(z0.dtype)


def _differentiated(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return any(map(_differentiated, value))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple) and not isinstance(value, Jet):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _only(value: Any, order: int) -> Any:
    """Jets with z1 alone, or with z2 alone."""
    if isinstance(value, Jet):
        return Jet(value.z0, value.z1 if order == 1 else None, value.z2 if order == 2 else None)
    if isinstance(value, dict):
        return {key: _only(one, order) for key, one in value.items()}
    return type(value)(_only(one, order) for one in value) if type(value) in (list, tuple) else value


def _paired(first: Any, second: Any) -> Any:
    """z1 of one result with z2 of another."""
    if isinstance(first, Jet):
        return Jet(first.z0, first.z1, second.z2)
    if isinstance(first, tuple | list):
        return type(first)([_paired(a, b) for a, b in zip(first, second, strict=True)])
    return first


@contextmanager
def carried(parameters: Mapping[str, Tensor], vector: Sequence[Tensor], jets: Jets) -> Iterator[Jets]:
    """Run forward passes whose tensors carry the jets of theta + e v.

    Args:
        parameters: the chosen parameters by name, leaves that require a gradient.
        vector: v, one tensor per parameter, of its shape.
        jets: the override to run under.
    """
    leaves = list(parameters.values())
    try:
        for leaf, v in zip(leaves, vector, strict=True):
            leaf.__dict__[_JET] = (v, None, leaf._version)
        with torch.enable_grad(), jets, taken_by(jets.swapped), second_derivatives_on_top():
            yield jets
    finally:
        for leaf in leaves:
            leaf.__dict__.pop(_JET, None)


def _inplace_places() -> dict[Callable, int]:
    """Where the functionals with a flag `inplace` have it."""
    found = {}
    for func in RULES:
        try:
            names = list(inspect.signature(func).parameters)
        except (TypeError, ValueError):
            continue
        if "inplace" in names:
            found[func] = names.index("inplace")
    return found


_INPLACE_AT = _inplace_places()


def output_jets(jets: Jets, outputs: Any) -> list[Jet]:
    """The jets of the differentiable tensors of a model's outputs; zeros where they are constants."""
    found = [(leaf, jets.of(leaf)) for leaf in tree_leaves(outputs) if is_differentiable(leaf)]
    return [Jet(leaf, None, None) if jet is None else jet for leaf, jet in found]


@refusals_named()
def forms(of: Sequence[Jet], at_outputs: OutputLoss) -> dict[str, Tensor]:
    """Return z1' H_z z1 and <dl/dz, z2>."""
    tangents = [torch.zeros_like(jet.z0) if jet.z1 is None else jet.z1 for jet in of]
    bent = [(jet.z2, u) for jet, u in zip(of, at_outputs.output_gradient, strict=True) if jet.z2 is not None]
    zero = torch.zeros((), dtype=tangents[0].dtype, device=tangents[0].device)
    return {
        "gauss_newton": dot(tangents, at_outputs.output_hessian(tangents)),
        "nme": dot(*zip(*bent, strict=True)) if bent else zero,
    }
