"""Run any model with another phi'', its values and first derivatives untouched."""

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ContextDecorator, contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from twofold.activations.functions import Call, Flat, SecondDerivative, activation, autocast_of, saving_is_hooked
from twofold.activations.gaussian import gaussian
from twofold.activations.known import (
    BACKWARD,
    FREE_SLOPE,
    FUSED,
    OUTPUT_KEPT,
    SPELLINGS,
    activation_name,
    works_in_place,
)
from twofold.errors import TwofoldError, TwofoldWarning

_COMPILED = (
    "second_derivative cannot be entered inside a compiled function: torch.compile would fix or lose the swap. "
    "Enter it outside, around the call of the compiled function, which then runs eagerly."
)


class second_derivative(ContextDecorator):  # noqa: N801 - a context manager, named as torch names its own
    """Give activations another second derivative in all that is computed within the context.

    Values stay those of torch bit for bit, and so do first derivatives; wherever autograd would meet phi''(x) it meets
    f(x) instead, and f's own derivatives beyond that. The choice is bound in the forward pass and lives as long as the
    graph made there, so that a backward pass may come after the context. The model needs no change: modules,
    functionals, tensor methods and in-place forms are all seen. Contexts nest, and the inner one wins for the
    activations that it names. It serves as a decorator too.

    Seen are calls by name. An activation that is written out (`x * torch.sigmoid(1.7 * x)`) is seen through its named
    pieces only, each with f as its own second derivative; name others in `of` to leave the pieces alone. Not seen
    are activations fused into LSTM, GRU, RNN or GLU kernels (a warning names them) and whatever runs in torch.jit
    modules or in threads started within the context. Compiled functions run eagerly within the context. Under
    torch.utils.checkpoint the inputs of the swapped activations stay in memory. In evaluation without gradients
    nn.TransformerEncoderLayer leaves its fused path, as under any override of torch, and rounds differently there.

    Args:
        value: f, the stand-in for phi'': a number (0 removes phi''), `gaussian(beta)`, or any elementwise function from
            a tensor to a tensor of the same shape.
        of: the name of an activation or several names; None means all known elementwise ones.

    Raises:
        TwofoldError: for a value that is neither a finite number nor a function, or a name that is not known.

    Example:
        >>> x = torch.tensor(0.5, requires_grad=True)
        >>> with second_derivative(0, of="gelu"):
        ...     y = torch.nn.functional.gelu(x)
        >>> (slope,) = torch.autograd.grad(y, x, create_graph=True)
        >>> torch.autograd.grad(slope, x)
        (tensor(0.),)

    Source: arXiv 2401.10809, section 4.2 (phi'' := 0 in GELU, a synthetic phi'' for ReLU).
    """

    def __init__(self, value: float | SecondDerivative, *, of: str | Iterable[str] | None = None) -> None:
        self._f = _stand_in(value)
        self._names = _names(of)
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        of = "" if len(self._names) == len(SPELLINGS) else f", of={list(self._names)!r}"
        return f"second_derivative({self._f!r}{of})"

    def __enter__(self) -> "second_derivative":
        if torch.compiler.is_compiling():
            raise TwofoldError(_COMPILED)
        swaps = {**_innermost_swaps(), **dict.fromkeys(self._names, self._f)}
        # Compiled code may not see overrides, and has no double backward. Where the compiler is not loaded nothing is
        # compiled, and loading it takes seconds.
        eager = None
        if "torch._dynamo" in sys.modules:
            try:
                eager = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise TwofoldError(_COMPILED) from error
            eager.__enter__()
        mode = _Swapping(swaps, self._warned)
        _here.active.append((mode, eager))
        mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        mode, eager = _here.active.pop()
        mode.__exit__(*exception)
        if eager is not None:
            eager.__exit__(*exception)


def active_second_derivatives() -> tuple[tuple[str, SecondDerivative], ...]:
    """Return which stand-ins hold in the present thread, as (activation, f) pairs: hashable, empty outside a context.

    Two results are equal when graphs recorded under them are the same: numbers and gaussians compare by value, other
    functions by identity.
    """
    return tuple(sorted(_innermost_swaps().items(), key=lambda swap: swap[0]))


@contextmanager
def second_derivatives_on_top() -> Iterator[None]:
    """Let the stand-ins that hold here be seen before the overrides of torch that were entered after them."""
    if not _here.active:
        yield
        return
    mode, eager = _here.active[-1]
    again = _Swapping(mode.swaps, mode.warned)
    _here.active.append((again, eager))
    try:
        with again:
            yield
    finally:
        _here.active.pop()


class _Here(threading.local):
    """The contexts entered in this thread, innermost last."""

    def __init__(self) -> None:
        self.active: list[tuple[_Swapping, Any]] = []


_here = _Here()


def _innermost_swaps() -> Mapping[str, SecondDerivative]:
    return _here.active[-1][0].swaps if _here.active else {}


class _Swapping(TorchFunctionMode):
    """Exchanges calls of activations. The innermost holds the swaps of all; outer ones let everything pass."""

    def __init__(self, swaps: Mapping[str, SecondDerivative], warned: set[str]) -> None:
        super().__init__()
        self.swaps = swaps
        self.warned = warned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        active = _here.active  # empty where the override was carried into another thread
        if not active or self is active[-1][0]:
            name = activation_name(func, args, kwargs)
            if name in self.swaps:
                return self._swapped(name, func, args, kwargs)
            if func in FUSED and not self.swaps.keys().isdisjoint(FUSED[func]):
                self._warn_not_seen(func.__name__, f"applies {' and '.join(FUSED[func])} inside one fused kernel")
        return func(*args, **kwargs)

    def _swapped(self, name: str, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, rest, settings = (args[0], args[1:], kwargs) if args else _input_taken(kwargs)
        if not x.is_floating_point() or kwargs.get("out") is not None:
            if x.is_complex():
                self._warn_not_seen(name, "came with a complex input")
            return func(*args, **kwargs)
        settings = {key: setting for key, setting in settings.items() if key != "out"}
        in_place = works_in_place(func, kwargs)
        kind = Flat if name in FREE_SLOPE else Call
        call = kind(func, tuple(rest), settings, in_place, self.swaps[name], BACKWARD.get(name), autocast_of(x))
        # What may be overwritten before the backward pass is differentiated at a copy.
        at = x.clone() if in_place or name in OUTPUT_KEPT or saving_is_hooked() else x
        y = activation(at, call)
        if isinstance(call, Flat):
            own = Call.value(call, at)
            y = own + y.to(own.dtype)
        return x.copy_(y) if in_place else y

    def _warn_not_seen(self, what: str, why: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(
                f"second_derivative does not reach {what}: it {why}, which keeps its own second derivative. "
                "Write that layer with separate activations, or leave its activations out with of=[...].",
                TwofoldWarning,
                stacklevel=4,
            )


def _input_taken(kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    rest = dict(kwargs)
    return rest.pop("self" if "self" in rest else "input"), (), rest


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)

    def __repr__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True, eq=False)
class _ByIdentity:
    """A user's function: equal to itself only, hashable whatever it is."""

    function: SecondDerivative

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)

    def __repr__(self) -> str:
        return repr(self.function)


def _stand_in(value: Any) -> SecondDerivative:
    if isinstance(value, gaussian):
        return value
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return _Constant(float(value))
    if callable(value) and not isinstance(value, type):
        return _ByIdentity(value)
    raise TwofoldError(
        f"second_derivative takes a finite number, gaussian(beta) or an elementwise function f(x); {value!r} came. "
        "Known activations, for of=: " + ", ".join(SPELLINGS) + "."
    )


def _names(of: Any) -> tuple[str, ...]:
    names = tuple(SPELLINGS) if of is None else (of,) if isinstance(of, str) else of
    names = tuple(names) if isinstance(names, Iterable) else (names,)
    unknown = [name for name in names if name not in SPELLINGS]
    if unknown or not names:
        came = ", ".join(repr(name) for name in unknown) if unknown else "no name"
        raise TwofoldError(
            f"second_derivative(of=...) got {came}; known activations are {', '.join(SPELLINGS)}. "
            "Leave `of` out to mean all of them."
        )
    return names
