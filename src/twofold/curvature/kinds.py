"""Which kind each operation of a model is, and the recording of the chosen kinds apart from the rest.

A new operation is a name in `SPELLINGS`. What is named nowhere counts as "other" without being told apart: its second
derivative, if it has one, stays in the graph, so that no sum depends on these lists.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from twofold.activations.functions import Call, swapped, taken_by
from twofold.activations.known import FUSED, PIECEWISE_LINEAR, activation_name, spelled
from twofold.activations.second_derivative import second_derivatives_on_top
from twofold.curvature.composites import attention, opened, warn_of_fused
from twofold.curvature.dissection import Held, Operation, is_differentiated

# Kind: the names of its operations, as functions and methods of torch spell them.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "product": (
        *("linear", "bilinear", "matmul", "mm", "bmm", "mv", "dot", "vdot", "vecdot", "inner", "outer", "ger", "kron"),
        *("__matmul__", "__rmatmul__", "addmm", "addbmm", "baddbmm", "addmv", "addr", "addcmul", "einsum", "multi_dot"),
        *("mul", "multiply", "__mul__", "__rmul__", "__imul__", "prod", "glu", "prelu"),
        *("conv1d", "conv2d", "conv3d", "convolution", "conv_tbc"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    ),
    "normalisation": (
        *("layer_norm", "native_layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"),
        *("local_response_norm", "normalize", "_weight_norm", "renorm"),
    ),
    "attention": ("softmax",),
    "other": (
        *("lstm", "lstm_cell", "gru", "gru_cell", "rnn_tanh", "rnn_tanh_cell", "rnn_relu", "rnn_relu_cell"),
        *("div", "divide", "true_divide", "__truediv__", "__rtruediv__", "__rdiv__", "__itruediv__", "reciprocal"),
        *("addcdiv", "pow", "__pow__", "__rpow__", "__ipow__", "float_power", "square", "sqrt", "rsqrt", "cumprod"),
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logaddexp", "logsumexp", "logcumsumexp", "logit"),
        *("log_softmax", "softmin", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "sinc"),
        *("erf", "erfc", "erfinv", "lgamma", "digamma", "norm", "vector_norm", "matrix_norm", "dist", "cdist"),
        *("pairwise_distance", "cosine_similarity", "var", "std", "var_mean", "std_mean", "lerp", "hypot", "xlogy"),
        *("grid_sample", "affine_grid", "inverse", "inv", "det", "logdet", "solve", "matrix_exp", "trapezoid"),
    ),
}

KINDS = ("activation", *SPELLINGS)

_KIND_OF: dict[Callable[..., Any], str] = {
    func: kind for kind, names in SPELLINGS.items() for name in names for func in spelled(name)
}


# Products of the entries of one tensor: all others are linear in a factor that comes alone.
_OF_ONE = spelled("glu") | spelled("prod")


@contextmanager
def recorded_apart(
    model: nn.Module, kinds: Collection[str], held: Held, warned: set[str] | None = None
) -> Iterator[None]:
    """Run a forward pass whose operations of these kinds are told apart; meant for use inside `borrowed`.

    Args:
        model: a lent model: hooks are left on its modules.
        kinds: some of `KINDS`.
        held: where the operations will put their sources.
        warned: for the activation part alone: names of fused kernels that a warning has been given of already.
    """
    modules: list[str] = [ROOT]
    if len(kinds) > 1:
        _watch(model, modules)
    with ExitStack() as stack:
        mode = stack.enter_context(_Dissecting(kinds, held, modules, warned))
        stack.enter_context(taken_by(mode.swapped))
        stack.enter_context(second_derivatives_on_top())
        yield


ROOT = "(model)"


def _watch(model: nn.Module, modules: list[str]) -> None:
    """Keep the names of the modules that are running in a list, innermost last."""

    def leave(*_: Any) -> None:
        modules.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name or ROOT: modules.append(name), prepend=True)
        module.register_forward_hook(leave, always_call=True)


class _Dissecting(TorchFunctionMode):
    def __init__(self, kinds: Collection[str], held: Held, modules: list[str], warned: set[str] | None) -> None:
        super().__init__()
        self._kinds, self._held, self._modules, self._warned = kinds, held, modules, warned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._warned is not None and func in FUSED:
            warn_of_fused(func, self._warned)
        kind = _kind_of(func, args, kwargs)
        if kind is not None and kind in self._kinds:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if is_differentiated(leaf)]
            # A product with one factor that is differentiated is linear in it.
            curved = len(tensors) > 1 or (bool(tensors) and (kind != "product" or func in _OF_ONE))
            if curved and torch.is_grad_enabled() and kwargs.get("out") is None:
                return self._apart(kind, func, args, kwargs)
        elif kind is None and len(self._kinds) > 1:
            inside = attention if func is F.scaled_dot_product_attention else opened(func)
            if inside is not None:
                with self:
                    return inside(*args, **kwargs)
        return func(*args, **kwargs)

    def swapped(self, x: Tensor, call: Call) -> Tensor:
        """Take over an activation whose second derivative is a stand-in."""
        apart = x.requires_grad and torch.is_grad_enabled()
        return self._apart("activation", swapped, (x, call), {}) if apart else swapped(x, call)

    def _apart(self, kind: str, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        in_place = _works_in_place(func, kwargs)
        if in_place and not args:
            target = kwargs["self" if "self" in kwargs else "input"]
            args, kwargs = (target,), {key: value for key, value in kwargs.items() if value is not target}
        operation = Operation(
            func, args, kwargs, kind=kind, module=self._modules[-1], in_place=in_place, held=self._held
        )
        result = operation.attach()
        return args[0].copy_(result) if in_place else result


def _kind_of(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    kind = _KIND_OF.get(getattr(func, "overloadpacket", func))
    if kind is not None:
        return kind
    name = activation_name(func, args, kwargs)
    return None if name is None or name in PIECEWISE_LINEAR else "activation"


def _works_in_place(func: Callable, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
    if name.startswith("__"):  # __imul__ and its like
        return name.startswith("__i")
    return name.endswith("_") or bool(kwargs.get("inplace", False))
