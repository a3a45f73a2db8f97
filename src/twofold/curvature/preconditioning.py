"""The diagonal preconditioner of a torch optimiser, as it divides its steps by it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError


def preconditioner(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return P of each parameter: the optimiser's step is -lr P^-1 times its average of gradients.

        Adam, AdamW, NAdam    sqrt(v / (1 - beta2^t)) + eps    v: second moments, or their maximum (amsgrad)
        RMSprop               sqrt(v) + eps                    v: second moments, less the squared mean if centered
        Adagrad               sqrt(sum of squares) + eps
        Adamax                u, the decaying maximum of |g| + eps

    Args:
        optimizer: one of these, or one that wraps it as `.base` (SharpnessAware).
        parameters: {name: parameter}; matched by identity.

    Raises:
        TwofoldError: another optimiser, a parameter that it does not hold, or one that has taken no step.
    """
    optimizer = getattr(optimizer, "base", optimizer)
    rule = next((_RULES[base] for base in type(optimizer).__mro__ if base in _RULES), None)
    if rule is None:
        raise TwofoldError(
            f"{type(optimizer).__name__} has no diagonal preconditioner that is known here: "
            f"{', '.join(known.__name__ for known in _RULES)} have one. Pass its diagonal as a vector [P] or by names."
        )
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    found = {}
    for name, parameter in parameters.items():
        if id(parameter) not in groups:
            raise TwofoldError(
                f"The {type(optimizer).__name__} does not hold the parameter {name!r} (parameters are matched by "
                "identity). Pass the optimiser of this model, or take the block of what it holds: operator.block(...)."
            )
        state = optimizer.state.get(parameter)
        if not state or float(state.get("step", 1)) == 0:
            raise TwofoldError(
                f"The {type(optimizer).__name__} has no state for {name!r}: it has taken no step with a gradient of "
                "it. Call optimizer.step() first, or leave it out: operator.block(...)."
            )
        try:
            found[name] = rule(state, groups[id(parameter)]).detach()
        except KeyError as error:
            raise TwofoldError(
                f"The {type(optimizer).__name__} keeps no {error} for {name!r}, as torch's own does. Pass the diagonal "
                "that it divides by as a vector [P] or by names."
            ) from error
    return found


def _adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return (second / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]


def _rmsprop(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    second = state["square_avg"]
    return (second - state["grad_avg"].square() if group["centered"] else second).sqrt() + group["eps"]


def _adagrad(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    return state["sum"].sqrt() + group["eps"]


def _adamax(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    return state["exp_inf"]


_RULES: dict[type, Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adamax: _adamax,
}
