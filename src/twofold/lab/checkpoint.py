"""The state of a run that is under way, as tensors and JSON values."""

from typing import Any

import torch
from torch import Tensor, nn

from twofold.curvature.track import Tracker
from twofold.lab.runs import RunDirectory
from twofold.regularizers import Regularizer


def keep(
    directory: RunDirectory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
    *,
    tracker: Tracker | None,
    state: dict[str, Any],
) -> None:
    """Write what is needed to go on from here into a run's directory."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": value for name, value in values.items() if value is not None}
    if regularizer is not None:
        memory = regularizer.memory
        tensors |= {f"regularizer/{i}": tensor for i, tensor in enumerate(memory.kept or [])}
        state["regularizer"] = {
            "skipped": regularizer.skipped,
            "steps": regularizer.steps,
            "kept_at": memory.kept_at,
            "num_kept": None if memory.kept is None else len(memory.kept),
        }
    if tracker is not None:
        tracked = tracker.state_dict()
        tensors |= {f"tracker/{name}": vector for name, vector in tracked.pop("vectors").items()}
        state["tracker"] = tracked
    directory.write_checkpoint(tensors, state)


def restore(
    kept: tuple[dict[str, Tensor], dict[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
    tracker: Tracker | None,
) -> dict[str, Any]:
    """Put model, optimiser, regularizer and tracker into the state that `keep` wrote; return its JSON values."""
    tensors, state = kept
    model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            i, _, key = rest.partition("/")
            moments.setdefault(int(i), {})[key] = _laid_out_as(parameters[int(i)], tensor)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if regularizer is not None:
        saved = state["regularizer"]
        regularizer.skipped, regularizer.steps = saved["skipped"], saved["steps"]
        if saved["kept_at"] is not None:
            num_kept = saved["num_kept"]
            found = None if num_kept is None else [tensors[f"regularizer/{i}"] for i in range(num_kept)]
            regularizer.memory.keep(found, saved["kept_at"])
    if tracker is not None:
        vectors = {n.removeprefix("tracker/"): t for n, t in tensors.items() if n.startswith("tracker/")}
        tracker.load_state_dict({**state["tracker"], "vectors": vectors})
    return state


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the parameter's memory format: fused optimisers pair entries by their place in memory."""
    if tensor.shape != parameter.shape:  # a count of steps
        return tensor
    return torch.empty_like(parameter.detach(), device="cpu").copy_(tensor)
