"""Which calls mean which activation.

A new activation is one row of `SPELLINGS`. A model may reach one function by many ways (`F.relu`, `torch.relu`,
`h.relu_()`, `torch.ops.aten.relu`); a spelling names all of them at once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twofold.activations.beta_gelu import beta_gelu

_PLACES = (
    torch,
    torch.Tensor,
    torch._C._VariableFunctions,
    F,
    torch._C._nn,
    torch.special,
    torch.linalg,
    torch.ops.aten,
)

# Name: its spellings, each an attribute looked up in _PLACES (also with "_" appended, the in-place form), or a callable
# that goes through torch's override protocol.
SPELLINGS: dict[str, tuple[str | Callable, ...]] = {
    "beta_gelu": (beta_gelu,),
    "celu": ("celu",),
    "cos": ("cos",),
    "elu": ("elu",),
    "gelu": ("gelu",),
    "hardshrink": ("hardshrink",),
    "hardsigmoid": ("hardsigmoid",),
    "hardswish": ("hardswish",),
    "hardtanh": ("hardtanh",),
    "leaky_relu": ("leaky_relu",),
    "logsigmoid": ("logsigmoid", "log_sigmoid"),
    "mish": ("mish",),
    "prelu": ("prelu",),
    "relu": ("relu",),
    "relu6": ("relu6",),
    "rrelu": ("rrelu",),
    "selu": ("selu",),
    "sigmoid": ("sigmoid", "expit", "special_expit"),
    "silu": ("silu",),
    "sin": ("sin",),
    "softplus": ("softplus",),
    "softshrink": ("softshrink",),
    "softsign": ("softsign",),
    "tanh": ("tanh",),
    "tanhshrink": ("tanhshrink",),
    "threshold": ("threshold",),
}

# Piecewise linear with a slope that is learned or drawn at random: the call itself has to stay in the graph.
FREE_SLOPE = frozenset({"prelu", "rrelu"})

# phi'' is zero wherever there is one.
PIECEWISE_LINEAR = frozenset(
    {
        "hardshrink",
        "hardsigmoid",
        "hardtanh",
        "leaky_relu",
        "prelu",
        "relu",
        "relu6",
        "rrelu",
        "softshrink",
        "threshold",
    }
)

# torch keeps only their output for the backward pass, so a model may overwrite their input.
OUTPUT_KEPT = frozenset({"relu", "sigmoid", "tanh", "tanhshrink"})

# Calls that apply activations inside one kernel, where no other phi'' can be put: the activations that hide there.
FUSED: dict[Callable, tuple[str, ...]] = {
    F.glu: ("sigmoid",),
    torch._C._nn.glu: ("sigmoid",),
    torch.lstm: ("sigmoid", "tanh"),
    torch.lstm_cell: ("sigmoid", "tanh"),
    torch.gru: ("sigmoid", "tanh"),
    torch.gru_cell: ("sigmoid", "tanh"),
    torch.rnn_tanh: ("tanh",),
    torch.rnn_tanh_cell: ("tanh",),
    torch.rnn_relu: ("relu",),
    torch.rnn_relu_cell: ("relu",),
}


# torch's own backward kernels of the commonest, (g, x, settings) -> g phi'(x); for all others torch's backward is asked
# for through autograd, which is slower on small tensors.
_aten = torch.ops.aten
BACKWARD: dict[str, Callable[..., Tensor]] = {
    "gelu": _aten.gelu_backward,
    "relu": lambda g, x: _aten.threshold_backward(g, x, 0),
    "sigmoid": lambda g, x: _aten.sigmoid_backward(g, torch.sigmoid(x)),
    "tanh": lambda g, x: _aten.tanh_backward(g, torch.tanh(x)),
}


def spelled(spelling: str | Callable) -> set[Callable]:
    """Return every callable of torch that a spelling means: function, method and in-place form."""
    if callable(spelling):
        return {spelling}
    attributes = (spelling, spelling + "_")
    return {getattr(place, name) for place in _PLACES for name in attributes if hasattr(place, name)}


CALLABLES: dict[Callable, str] = {
    func: name for name, spellings in SPELLINGS.items() for spelling in spellings for func in spelled(spelling)
}


def activation_name(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return the name of the activation that a call means, None for any other call."""
    name = CALLABLES.get(getattr(func, "overloadpacket", func))
    if name == "hardtanh":  # nn.ReLU6 calls hardtanh
        bounds = (*args[1:3], *(kwargs[key] for key in ("min_val", "max_val") if key in kwargs))
        return "relu6" if bounds == (0, 6) else name
    return name


def works_in_place(func: Callable, kwargs: Mapping[str, Any]) -> bool:
    """Say whether a call of an activation overwrites its input."""
    name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
    return bool(kwargs.get("inplace", False)) or name.endswith("_")
