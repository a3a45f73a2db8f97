"""A gradient as a list, one entry per trainable parameter, and how it gets into .grad."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError

Gradients: TypeAlias = list[Tensor | None]
"""One entry per trainable parameter; None where the loss does not depend on it."""


def add_scaled(known: Tensor | None, new: Tensor | None, factor: float) -> Tensor | None:
    """Return known + factor * new, either of which may be missing."""
    if new is None:
        return known
    if known is None and factor == 1:
        return new
    return new * factor if known is None else known.add(new, alpha=factor)


SPARSE = "A parameter has a sparse gradient; build its nn.Embedding with sparse=False."


def refuse_sparse(model: nn.Module) -> None:
    """Refuse embeddings with sparse gradients before any pass is made."""
    if any(isinstance(module, nn.Embedding) and module.sparse for module in model.modules()):
        raise TwofoldError(SPARSE)


def unscaled(gradients: Sequence[Tensor | None], scale: float) -> Gradients:
    """Divide gradients of a scaled loss by the scale."""
    for gradient in gradients:
        if gradient is not None and gradient.is_sparse:
            raise TwofoldError(SPARSE)
    if scale == 1:
        return list(gradients)
    return [None if gradient is None else gradient / scale for gradient in gradients]


def accumulate(parameters: Sequence[nn.Parameter], gradients: Gradients, factor: float = 1.0) -> None:
    """Add factor * gradients to .grad, as `loss.backward()` would: None stays None, and no two share memory.

    Hooks registered by `register_post_accumulate_grad_hook` run once, when all gradients are there.
    """
    owned: set[int] = set()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None:
                parameter.grad.add_(gradient, alpha=factor)
                continue
            new = gradient.detach() if factor == 1 else gradient * factor
            place = new.untyped_storage().data_ptr()
            if place in owned or new.stride() != parameter.stride():
                new = torch.empty_like(parameter).copy_(new)
            owned.add(place)
            parameter.grad = new
    for parameter, gradient in zip(parameters, gradients, strict=True):
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        for hook in list(hooks.values()) if hooks and gradient is not None else ():
            hook(parameter)
