"""How much of phi'', the activations' second derivative, is alive in a model on data."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from twofold.activations.known import SPELLINGS, activation_name
from twofold.batches import as_batches, run_forward, to_device
from twofold.curvature.differentiable import borrowed, composed_kernels, unwrap
from twofold.distributed import agree, check_group, together
from twofold.errors import NotFiniteError, TwofoldError
from twofold.types import Forward, Mode, ProcessGroup

_OF_POSITIONS = frozenset({"cos", "sin"})
"""No activations where no parameter moves what they are taken of: encodings of positions."""


def live_fraction(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    mode: Mode = None,
    tolerance: float = 0.0,
    group: ProcessGroup = None,
) -> float:
    """Return the fraction of activation inputs h at which phi'' is alive, |phi''(h)| > tolerance.

    All entries of all activation calls over the data count alike, but for sines and cosines of what no parameter moves
    (encodings of positions); each phi'' is the one of torch's own double backward,
    or the stand-in where `second_derivative` is active. Where phi'' is 0 an entry adds nothing to the activation NME,
    the part of the NME that carries phi''. The model is left as it was.

    Args:
        model: any module; compiled and DDP wrappers are looked through.
        data: a batch (inputs, targets), or a re-iterable of batches.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is.
        tolerance: at 0 an entry is dead where phi'' is exactly 0 in the model's precision (for float32 and
            beta-GELU, where |beta h| is above 13 or so).
        group: a process group whose ranks each have a shard of the data; the fraction is that of all shards.

    Raises:
        TwofoldError: data of another form, a tolerance that is not a number of at least 0, or a model in which no known
            activation was called. Those inside fused kernels (glu, recurrent layers) are not seen.
        NotFiniteError: phi'' is NaN somewhere, as where the inputs are.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> batch = (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> live_fraction(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), batch)
        1.0
        >>> live_fraction(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), batch)
        0.0

    Source: arXiv 2401.10809, figure 9.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise TwofoldError(f"tolerance is {tolerance!r}; expected a number of at least 0, in units of phi''.")
    check_group(group)
    with together(group):
        counted = _counted(unwrap(model), data, forward, mode, tolerance)
        every = agree(group, [counted.live, counted.total])
    live, total = sum(one[0] for one in every), sum(one[1] for one in every)
    if total == 0:
        raise TwofoldError(
            f"No activation was called on the data, so no phi'' is alive or dead. Known activations: "
            f"{', '.join(SPELLINGS)}."
        )
    return live / total


def _counted(model: nn.Module, data: Any, forward: Forward | None, mode: Mode, tolerance: float) -> "_Counting":
    tensor = next((t for kind in (model.parameters(), model.buffers()) for t in kind), None)
    counted = _Counting(tolerance)
    moving = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    with borrowed(model, moving, mode), composed_kernels(model):
        for batch in as_batches(data):
            with counted:
                run_forward(forward, model, batch if tensor is None else to_device(batch, tensor.device))
    return counted


class _Counting(TorchFunctionMode):
    """Looks at the second derivative of every activation before it is called."""

    def __init__(self, tolerance: float) -> None:
        super().__init__()
        self.tolerance, self.live, self.total = tolerance, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = activation_name(func, args, kwargs)
        if name is not None:
            self._count(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, activation: str, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        settings = {name: value for name, value in kwargs.items() if name not in ("self", "input", "out")}
        came = args[0] if args else kwargs["self" if "self" in kwargs else "input"]
        if not came.is_floating_point() or (activation in _OF_POSITIONS and not came.requires_grad):
            return
        x = came.detach().clone().requires_grad_()
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):  # whatever a checkpoint around has set
            bend = _second_derivative(func(x.clone(), *args[1:], **settings), x)
        unknown = int(bend.isnan().sum())
        if unknown:
            raise NotFiniteError(
                f"{activation}'' is NaN at {unknown} of {bend.numel()} inputs of a call: what "
                "the model computes on this data is not finite. Look for diverged parameters or NaN in the data."
            )
        self.live += int((bend.abs() > self.tolerance).sum())
        self.total += bend.numel()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _second_derivative(y: Tensor, x: Tensor) -> Tensor:
    """phi''(x) of an elementwise y = phi(x); zero where autograd finds that the slope does not depend on x."""
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    if not slope.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(slope.sum(), x, materialize_grads=True)[0]
