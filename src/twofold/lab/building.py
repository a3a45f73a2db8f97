"""From a configuration to the optimiser, the regularizer and what stands in place of `loss.backward()`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twofold.activations import gaussian, second_derivative
from twofold.errors import TwofoldError
from twofold.lab.config import OptimizerConfig, RegularizerConfig
from twofold.lab.exact_traces import ExactTracePenalty
from twofold.regularizers import (
    ASAM,
    GSAM,
    SAM,
    USAM,
    WSAM,
    EigenSAM,
    FriendlySAM,
    GaussNewtonTrace,
    GradientPenalty,
    HessianTrace,
    LookSAM,
    Regularizer,
    WeightNoise,
)
from twofold.regularizers.ranks import Ranks
from twofold.types import ProcessGroup

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

Backward = Callable[[nn.Module, Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]], Tensor]
"""backward(model, loss_fn, (inputs, targets)) -> loss: adds its gradient to .grad, as `Regularizer.backward` does."""

_CONSTRUCTORS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "sam": (SAM, "rho"),
    "usam": (USAM, "rho"),
    "asam": (ASAM, "rho"),
    "wsam": (WSAM, "rho"),
    "eigen_sam": (EigenSAM, "rho"),
    "gsam": (GSAM, "rho"),
    "friendly_sam": (FriendlySAM, "rho"),
    "look_sam": (LookSAM, "rho"),
    "gradient_penalty": (GradientPenalty, "rho"),
    "weight_noise": (WeightNoise, "sigma"),
    "hessian_trace": (HessianTrace, "strength"),
    "gauss_newton_trace": (GaussNewtonTrace, "strength"),
}
"""Every regularizer by name, and which argument the configuration's strength is."""


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The base optimiser over all parameters; those of norms are a group of their own where they do not decay."""
    norms = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    decayed = [p for p in model.parameters() if config.decay_norms or id(p) not in norms]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    if not config.decay_norms:
        groups.append({"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0})
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def build_regularizer(config: RegularizerConfig, group: ProcessGroup = None) -> Regularizer | None:
    """The regularizer of `config`, over the ranks of a group; None for plain training and exact traces.

    Raises:
        TwofoldError: the regularizer does not take these options.
    """
    if config.name in ("none", "exact_trace"):
        return None
    constructor, strength = _CONSTRUCTORS[config.name]
    return _construct(config, constructor, **{strength: config.strength, "group": group})


def _construct(config: RegularizerConfig, constructor: Callable[..., Any], **arguments: Any) -> Any:
    try:
        return constructor(**arguments, **dict(config.options))
    except TypeError as error:
        raise TwofoldError(f"RegularizerConfig.options do not fit {config.name}: {error}.") from error


def build_backward(config: RegularizerConfig, regularizer: Regularizer | None, group: ProcessGroup = None) -> Backward:
    """What stands in place of `loss.backward()`: the regularizer, with phi'' as its configuration says."""
    if config.name == "exact_trace":
        if group is not None:
            raise TwofoldError("The penalty on an exact trace runs in one process only.")
        return _construct(config, ExactTracePenalty, strength=config.strength).backward
    if regularizer is None:
        return _plain_backward(group)
    if config.bell is None:
        return regularizer.backward
    replacement = _second_derivative(*config.bell)

    def backward(model: nn.Module, loss_fn: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
        with second_derivative(replacement):
            return regularizer.backward(model, loss_fn, batch)

    return backward


def _second_derivative(kind: str, beta: float) -> float | Callable[[Tensor], Tensor]:
    """What stands for phi'': 0, or one of the two bells of `RegularizerConfig.second_derivative`."""
    if kind == "0":
        return 0
    if kind == "gaussian":
        return gaussian(beta=beta)
    narrower = gaussian(beta=math.sqrt(2) * beta)
    return lambda x: narrower(x) / math.sqrt(2)


def _plain_backward(group: ProcessGroup) -> Backward:
    """`loss.backward()`, and the mean of the gradients over the ranks."""
    ranks = Ranks(group, "global")

    def backward(model: nn.Module, loss_fn: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        loss = loss_fn(model(inputs), targets)
        with torch.autocast(inputs.device.type, enabled=False):  # derivatives keep the forward pass's precision
            loss.backward()
        if ranks.size > 1:
            parameters = list(model.parameters())
            for parameter, gradient in zip(
                parameters, ranks.mean([p.grad for p in parameters], parameters), strict=True
            ):
                parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
        return loss.detach()

    return backward
