"""Norms spelled out in operations whose derivatives torch gets right to every order.

In torch 2.13 third derivatives through the native layer, batch (in train mode) and instance norm are silently wrong.
Inside `differentiable_thrice` these are composed from plain operations, wherever a model calls them; values agree to
rounding and running statistics move as they do natively.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from twofold.curvature.differentiable import differentiable_twice
from twofold.curvature.recording import graph_nodes
from twofold.errors import TwofoldError


@contextmanager
def differentiable_thrice(model: nn.Module) -> Iterator[None]:
    """Run forward passes so that each operation has a right third derivative in reverse mode, or raise by its name.

    Raises:
        TwofoldError: an operation inside has no second derivative.
    """
    with differentiable_twice(model), _ComposedNorms():
        yield


_WRONG = re.compile(r"^(Native|Cudnn|Miopen)?(LayerNorm|BatchNorm|WeightNorm)\w*Backward")


def check_differentiable_thrice(tensors: Sequence[Tensor]) -> None:
    """Refuse a graph with a native norm in it: one that was called past `differentiable_thrice`.

    Raises:
        TwofoldError: there is one.
    """
    for node in graph_nodes(tensors):
        if _WRONG.match(node.name()) and getattr(node, "_saved_training", True):
            raise TwofoldError(
                f"{node.name()} is in the graph, and torch's third derivative through it is wrong: it was called as a "
                "raw operation, not as torch.nn.functional. Call the functional, or take method='difference'."
            )


class _ComposedNorms(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _COMPOSED.get(func, func)(*args, **(kwargs or {}))


def _standardise(x: Tensor, dims: Iterable[int], eps: float) -> Tensor:
    dims = tuple(dims)
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _channels(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


def _layer_norm(  # noqa: PLR0917
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    shape = tuple(normalized_shape)
    return _affine(_standardise(input, range(-len(shape), 0), eps), weight, bias, shape)


def _batch_norm(  # noqa: PLR0917
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.batch_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    others = [axis for axis in range(input.dim()) if axis != 1]
    return _affine(_standardise(input, others, eps), weight, bias, _channels(input))


def _instance_norm(  # noqa: PLR0917
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.instance_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _affine(_standardise(input, range(2, input.dim()), eps), weight, bias, _channels(input))


_COMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
