"""A loss whose backward pass hands on gradients that are known already."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from twofold.errors import TwofoldError
from twofold.regularizers.gradients import Gradients

HandOn = Callable[[Tensor], Gradients]
"""Takes the factor that arrives in the backward pass and returns each parameter's gradient times it."""


def loss_that_hands_on(value: Tensor, parameters: Sequence[nn.Parameter], hand_on: HandOn) -> Tensor:
    """Return `value` on a graph of its own, whose derivative in the parameters is what `hand_on` returns.

    Args:
        value: the loss, a scalar.
        parameters: what it is to be differentiated in.
        hand_on: called once by the backward pass.
    """
    with torch.enable_grad():
        return _HandOn.apply(value, hand_on, *parameters)


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, hand_on: HandOn, *parameters: nn.Parameter) -> Tensor:
        ctx.hand_on = hand_on
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:  # pyrefly: ignore
        hand_on, ctx.hand_on = ctx.hand_on, None  # what it holds is as large as the model
        if hand_on is None:
            raise TwofoldError("A regularizer's loss can be differentiated once only; call reg.loss(...) anew.")
        return None, None, *hand_on(factor)
