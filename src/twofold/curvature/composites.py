"""Composite operations of torch spelled out in their pieces, for whoever looks at every piece of a forward pass."""

import math
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.activations.known import FUSED
from twofold.errors import TwofoldWarning


@cache
def opened(func: Callable) -> Callable | None:
    """A composite function of torch that does not stop at the override of itself, so that what it calls is seen.

    torch's functions that are written in Python ask first whether an override wants the whole call; here that question
    has the answer no.
    """
    if not isinstance(func, types.FunctionType) or func.__module__ not in ("torch.nn.functional", "torch.functional"):
        return None
    questions = {name for name in func.__code__.co_names if name.startswith("has_torch_function")}
    if not questions or not questions <= func.__globals__.keys():
        return None
    answered = {**func.__globals__, **dict.fromkeys(questions, lambda *_: False)}
    inside = types.FunctionType(func.__code__, answered, func.__name__, func.__defaults__, func.__closure__)
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


def attention(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention, softmax(q k' / sqrt(d) + mask) v, in its pieces."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query * math.sqrt(scale)) @ (key * math.sqrt(scale)).transpose(-2, -1)
    allowed = attn_mask
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if allowed is not None and allowed.dtype == torch.bool:
        scores = scores.masked_fill(~allowed, -math.inf)
    elif allowed is not None:
        scores = scores + allowed
    weights = torch.softmax(scores, -1)
    # A row that may look nowhere gives zeros; under a causal mask each looks at its first key.
    if allowed is not None and allowed.dtype == torch.bool and not is_causal:
        weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return weights @ value


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """The gated linear unit, a sigma(b)."""
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ||v||, the norm over all dimensions but one."""
    others = list(range(v.dim())) if dim == -1 else [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return v * (g / torch.sqrt(torch.sum(v * v, others, keepdim=True)))


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 * tensor2)


def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 / tensor2)


def _lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return input + weight * (end - input)


def _std(*args: Any, **kwargs: Any) -> Tensor:
    return torch.sqrt(torch.var(*args, **kwargs))


def _lstm_cell(gates_x: Tensor, state: Sequence[Tensor], hidden: Callable[[Tensor], Tensor]) -> list[Tensor]:
    h, c = state
    i, f, g, o = (gates_x + hidden(h)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def _gru_cell(gates_x: Tensor, state: Sequence[Tensor], hidden: Callable[[Tensor], Tensor]) -> list[Tensor]:
    (h,) = state
    (r, z, n), (hr, hz, hn) = gates_x.chunk(3, -1), hidden(h).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return [n + z * (h - n)]


def _rnn_cell(phi: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    return lambda gates_x, state, hidden: [phi(gates_x + hidden(state[0]))]


def _recurrent(cell: Callable[..., list[Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """A recurrent kernel in its steps: (input, hx, ..., batch_first) or, packed, (input, batch_sizes, hx, ...)."""

    def run(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
        if isinstance(args[0], Tensor) and not args[0].is_floating_point():
            batch_sizes, hx, *options = args
            rows = batch_sizes.tolist()
            return steps(input, hx, *options, apart=lambda x: x.split(rows), together=torch.cat)
        hx, *options, batch_first = args
        x, *last = steps(
            input.transpose(0, 1) if batch_first else input, hx, *options, apart=torch.unbind, together=torch.stack
        )
        return x.transpose(0, 1) if batch_first else x, *last

    def steps(  # noqa: PLR0917 - as torch's kernels have them
        x: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        *,
        apart: Callable[[Tensor], Sequence[Tensor]],
        together: Callable[[list[Tensor]], Tensor],
    ) -> tuple[Tensor, ...]:
        initial = [hx] if isinstance(hx, Tensor) else list(hx)
        directions = 2 if bidirectional else 1
        each = (4 if has_biases else 2) + (len(initial) == 2 and initial[0].shape[-1] != initial[1].shape[-1])
        last: list[list[Tensor]] = [[] for _ in initial]
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                w_x, w_h, *rest = params[index * each : (index + 1) * each]
                b_x, b_h = rest[:2] if has_biases else (None, None)
                project = rest[-1] if len(rest) % 2 else None
                gates, state = apart(F.linear(x, w_x, b_x)), [s[index] for s in initial]
                found = []
                for gate in reversed(gates) if direction else gates:
                    running = len(gate)  # of a packed batch: the longest sequences come first
                    moved = cell(gate, [s[:running] for s in state], lambda h, w=w_h, b=b_h: F.linear(h, w, b))
                    if project is not None:
                        moved[0] = F.linear(moved[0], project)
                    found.append(moved[0])
                    state = [
                        m if running == len(s) else torch.cat([m, s[running:]])
                        for m, s in zip(moved, state, strict=True)
                    ]
                outputs.append(together(found[::-1] if direction else found))
                for known, s in zip(last, state, strict=True):
                    known.append(s)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if dropout and train and layer < num_layers - 1:
                x = torch.dropout(x, dropout, True)
        return x, *(torch.stack(states) for states in last)

    return run


def _one_step(cell: Callable[..., list[Tensor]]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    def run(  # noqa: PLR0917
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        state = [hx] if isinstance(hx, Tensor) else list(hx)
        state = cell(F.linear(input, w_ih, b_ih), state, lambda h: F.linear(h, w_hh, b_hh))
        return state[0] if isinstance(hx, Tensor) else tuple(state)

    return run


COMPOSITES: dict[Callable, Callable] = {
    **dict.fromkeys((torch.addcmul, Tensor.addcmul), _addcmul),
    **dict.fromkeys((torch.addcdiv, Tensor.addcdiv), _addcdiv),
    **dict.fromkeys((torch.lerp, Tensor.lerp), _lerp),
    **dict.fromkeys((torch.std, Tensor.std), _std),
    F.scaled_dot_product_attention: attention,
    F.glu: glu,
    torch._C._nn.glu: glu,
    torch._weight_norm: weight_norm,
    torch.lstm: _recurrent(_lstm_cell),
    torch.gru: _recurrent(_gru_cell),
    torch.rnn_tanh: _recurrent(_rnn_cell(torch.tanh)),
    torch.rnn_relu: _recurrent(_rnn_cell(torch.relu)),
    torch.lstm_cell: _one_step(_lstm_cell),
    torch.gru_cell: _one_step(_gru_cell),
    torch.rnn_tanh_cell: _one_step(_rnn_cell(torch.tanh)),
    torch.rnn_relu_cell: _one_step(_rnn_cell(torch.relu)),
}
"""torch's kernels, and the same in pieces."""


def warn_of_fused(func: Callable, warned: set[str]) -> None:
    """Tell once of a kernel that hides activations from the activation part of the NME."""
    name = func.__name__
    if name not in warned:
        warned.add(name)
        warnings.warn(
            f"The activation part of the NME does not contain {name}: it applies {' and '.join(FUSED[func])} "
            "inside one fused kernel, whose whole curvature counts as the rest. "
            "Write that layer with separate activations to see its phi''.",
            TwofoldWarning,
            stacklevel=4,
        )
