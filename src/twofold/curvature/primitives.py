"""Norms, attention and some losses spelled out in operations whose derivatives torch gets right to every order.

In torch 2.13 the third derivatives through the native layer, batch, instance and group norm are silently wrong, weight
norm's already the second, and fused attention, SiLU, Mish, GLU and the Huber loss lack a derivative in some mode. Inside
`primitives` these functions are replaced, wherever a model calls them. Values agree to rounding. Running statistics are
read but never moved.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def primitives() -> Iterator[None]:
    """Run forward passes in operations that can be differentiated any number of times, in any mode."""
    # A mode does not see inside a composite function that it was asked about, such as multi_head_attention_forward.
    with sdpa_kernel(SDPBackend.MATH), _Primitives():
        yield


class _Primitives(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _standardise(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _channels(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    shape = tuple(normalized_shape)
    return _affine(_standardise(input, range(-len(shape), 0), eps), weight, bias, shape)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    shape = tuple(normalized_shape)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    mean_square = (input * input).mean(tuple(range(-len(shape), 0)), keepdim=True)
    return _affine(input * torch.rsqrt(mean_square + eps), weight, None, shape)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        normal = _standardise(input, [axis for axis in range(input.dim()) if axis != 1], eps)
    else:
        shape = _channels(input)
        normal = (input - running_mean.view(shape)) * torch.rsqrt(running_var.view(shape) + eps)
    return _affine(normal, weight, bias, _channels(input))


def _instance_norm(
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
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(_standardise(input, range(2, input.dim()), eps), weight, bias, _channels(input))


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, -1)
    return _affine(_standardise(groups, [-1], eps).reshape(input.shape), weight, bias, _channels(input))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query @ key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ||v||, the norm over all dimensions but one (over all for -1)."""
    others = list(range(v.dim())) if dim == -1 else [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


def _reduced(terms: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    if weight is not None:
        terms = terms * weight
    if reduction == "none":
        return terms
    if reduction == "sum":
        return terms.sum()
    return terms.mean() if weight is None else terms.sum() / weight.sum()


def _mse(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    error = input - target
    return _reduced(error * error, _reduction(size_average, reduce, reduction), weight)


def _huber(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    error = input - target
    size = error.abs()
    return _reduced(torch.where(size <= delta, 0.5 * error * error, delta * (size - 0.5 * delta)), reduction, weight)


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    return torch.nn._reduction.legacy_get_string(size_average, reduce, emit_warning=False)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return _written(input, input * torch.sigmoid(input), inplace)


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    return _written(input, input * torch.tanh(F.softplus(input)), inplace)


def _written(input: Tensor, result: Tensor, inplace: bool) -> Tensor:
    return input.copy_(result) if inplace else result


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    F.scaled_dot_product_attention: _attention,
    torch._weight_norm: weight_norm,
    F.mse_loss: _mse,
    F.huber_loss: _huber,
    F.glu: _glu,
    F.silu: _silu,
    F.mish: _mish,
}
