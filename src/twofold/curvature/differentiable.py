"""A forward pass that can be differentiated twice and leaves no trace.

`borrowed` lends a model for one or more passes: its parameters are replaced by aliases (same memory, leaves of their
own, no hooks of the user's), its buffers by copies, and afterwards all that hangs on its modules is put back, also when
something raises. `differentiable_twice` repairs or refuses the operations that torch cannot differentiate twice.
"""

import random
import re
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from twofold.activations.functions import saving_is_hooked
from twofold.curvature.convolution import CONVOLUTIONS
from twofold.curvature.elementwise import can_be_kept, kept
from twofold.curvature.normalisation import NORMS
from twofold.errors import CHECKPOINT, FSDP, NO_DOUBLE_BACKWARD, RECOMPUTED, REENTRANT, SCRIPTED, TwofoldError
from twofold.types import Mode


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain module inside compiled and data-parallel wrappers.

    Raises:
        TwofoldError: for what cannot be unwrapped (FSDP, tensor parallel, torch.jit) or is no module.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise TwofoldError(f"model must be a torch.nn.Module; a {type(model).__name__} came.")
        if isinstance(model, torch.jit.ScriptModule):
            raise TwofoldError(SCRIPTED.format(came=type(model).__name__))
        compiled_from = getattr(model, "_orig_mod", None)
        if compiled_from is not None:
            model = compiled_from
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    for module in model.modules():
        wrapped = any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__)
        if wrapped or any(type(parameter).__name__ == "DTensor" for parameter in module.parameters(recurse=False)):
            raise TwofoldError(FSDP.format(came=type(module).__name__))
        if isinstance(module, torch.jit.ScriptModule):
            raise TwofoldError(SCRIPTED.format(came=type(module).__name__))
    return model


def compiled_alone(model: nn.Module) -> nn.Module:
    """Return the compiled wrapper around the plain module alone, to be called for first derivatives; else `unwrap`."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    inner = getattr(model, "_orig_mod", None)
    return model if inner is not None and unwrap(inner) is inner else unwrap(model)


class RandomState:
    """The state of all global random generators that a pass may draw from: torch (CPU, CUDA), NumPy, Python."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._torch = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else [])]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomState)
            and self._python == other._python
            and _same_numpy(self._numpy, other._numpy)
            and all(torch.equal(a, b) for a, b in zip(self._torch, other._torch, strict=True))
        )

    __hash__ = None

    def restore(self, since: "RandomState | None" = None) -> None:
        """Put every generator back to this state.

        Args:
            since: the present state, where it is known: NumPy's slow setter is not called for what did not move.
        """
        random.setstate(self._python)
        if since is None or not _same_numpy(self._numpy, since._numpy):
            np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch[0])
        if len(self._torch) > 1:
            torch.cuda.set_rng_state_all(self._torch[1:])


def _same_numpy(one: Any, other: Any) -> bool:
    return one[0] == other[0] and one[2:] == other[2:] and np.array_equal(one[1], other[1])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave every global random generator as it was found."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


class ModuleState:
    """All that hangs on the modules of a model: attributes, registries, hooks, modes; not what tensors hold."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(module, dict(module.__dict__), _containers(module)) for module in model.modules()]

    def restore(self) -> None:
        """Put everything back as it was."""
        for module, attributes, containers in self._saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in containers.items():
                _refill(attributes[name], content)


@contextmanager
def module_state_kept(model: nn.Module) -> Iterator[None]:
    """Put back all that hangs on the model's modules afterwards, also when something raises."""
    state = ModuleState(model)
    try:
        yield
    finally:
        state.restore()


def _containers(module: nn.Module) -> dict[str, Any]:
    return {name: value.copy() for name, value in module.__dict__.items() if type(value) in _CONTAINERS}


_CONTAINERS = {dict, OrderedDict, defaultdict, Counter, list, set}


def _refill(container: Any, content: Any) -> None:
    if not container and not content:
        return
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


def buffers_replaced(model: nn.Module) -> None:
    """Give the model copies of its buffers (and of tensors that it keeps as plain attributes) to write into.

    Meant for use inside `module_state_kept`, which brings the originals back.
    """
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        return copies[id(tensor)]

    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copy(buffer)
        for name, value in module.__dict__.items():
            if type(value) is Tensor and value.grad_fn is None and not value.requires_grad:
                module.__dict__[name] = copy(value)


@contextmanager
def borrowed(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    mode: Mode = None,
    aliases: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Lend the model with aliases in the places of its parameters and copies in the places of its buffers.

    Args:
        model: a plain module (see `unwrap`).
        parameters: the chosen ones; all others are constants in the passes inside.
        mode: "train" or "eval" for the passes inside; None leaves each module's own.
        aliases: those of an earlier pass, to go on with its graph; None makes new ones.

    Yields:
        The chosen parameters' aliases by name: leaves of the graphs that are recorded inside.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    # An embedding with max_norm writes into its weight as it runs.
    writes = any(embedding.max_norm is not None for embedding in embeddings)
    every = {id(parameter): parameter for parameter in model.parameters()}
    given = {} if aliases is None else {id(parameters[name]): alias for name, alias in aliases.items()}
    with torch.inference_mode(False):
        stand_ins = {
            key: given.get(
                key, parameter.detach().clone() if writes or parameter.is_inference() else parameter.detach()
            )
            for key, parameter in every.items()
        }
        aliases = {name: stand_ins[id(parameter)].requires_grad_() for name, parameter in parameters.items()}

    with module_state_kept(model), random_state_kept(), full_precision():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = stand_ins[id(parameter)]  # pyrefly: ignore
            for name, value in module.__dict__.items():
                if id(value) in every:
                    module.__dict__[name] = stand_ins[id(value)]
                elif isinstance(value, list) and any(id(item) in every for item in value):
                    value[:] = [stand_ins.get(id(item), item) for item in value]
            if mode is not None:
                module.training = mode == "train"
        for embedding in embeddings:
            # Both change gradients into something else than derivatives, or into what cannot be differentiated again.
            embedding.sparse = embedding.scale_grad_by_freq = False
        buffers_replaced(model)
        yield aliases


@contextmanager
def full_precision() -> Iterator[None]:
    """Differentiate in the tensors' own precision, whatever the caller's context: gradients on, autocast off."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Repairs(TorchFunctionMode):
    """Stand-ins for operations whose second derivative torch gets wrong, or takes at twice the price.

    Attributes:
        checkpointed: whether a part of the pass will be recomputed when it is differentiated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checkpointed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_hidden_segment(args, kwargs)
        hooked = saving_is_hooked()
        self.checkpointed |= hooked
        # A checkpoint recomputes its segment with torch's own operations and must find the same tensors saved.
        if func in CONVOLUTIONS and not hooked and not _is_transformed():
            return CONVOLUTIONS[func](*args, **kwargs)
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        return func(*args, **kwargs)


def refuse_hidden_segment(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call inside a reentrant checkpoint of what depends on parameters: no graph would show that it does.

    Where no input of the segment requires a gradient, torch itself leaves the parameters inside without one.
    """
    if torch.is_grad_enabled():
        return
    if not any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
        return
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname == "CheckpointFunction.forward":
            raise TwofoldError(REENTRANT)
        frame = frame.f_back


class Frugal(TorchFunctionMode):
    """Stand-ins for operations whose double backward costs less than torch's; they have no third derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or saving_is_hooked() or _is_transformed():
            return func(*args, **kwargs)
        if func in NORMS and _all_exact((*args, *kwargs.values())):
            return NORMS[func](*args, **kwargs)
        if can_be_kept(func, args, kwargs) and _all_exact(args):
            return kept(func, args, kwargs)
        return func(*args, **kwargs)


def _all_exact(values: Iterable[Any]) -> bool:
    """Tell whether no tensor is rounded to half precision, where torch's kernels keep more than they return."""
    return all(value.dtype in (torch.float32, torch.float64) for value in values if isinstance(value, Tensor))


def _is_transformed() -> bool:
    """Tell whether autocast or a torch.func transform rewrites the operations of the pass."""
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return autocast or torch._C._functorch.peek_interpreter_stack() is not None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ||v||; the double backward of the fused kernel of torch 2.13 is wrong."""
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    others = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


@contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[Repairs]:
    """Run forward passes so that each operation has a right second derivative, or raise by its name.

    Attention takes its composed form (the fused ones have no double backward), weight norm is rewritten, compiled parts
    run eagerly, cuDNN steps aside for recurrent layers. Yields the repairs, which tell of checkpointed segments.

    Raises:
        TwofoldError: an operation inside has no second derivative.
    """
    with composed_kernels(model), refusals_named(), Repairs() as repairs:
        yield repairs


@contextmanager
def composed_kernels(model: nn.Module) -> Iterator[None]:
    """Choose kernels that can be differentiated twice; also where a checkpoint recomputes what was run so."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()) and torch.backends.cudnn.is_available():
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented|(\w+) does not support double backward")


@contextmanager
def refusals_named() -> Iterator[None]:
    """Turn torch's complaints about a missing second derivative into a TwofoldError that says what to do."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if isinstance(error, torch.utils.checkpoint.CheckpointError):
            raise TwofoldError(RECOMPUTED.format(error=text.splitlines()[0])) from error
        if "use_reentrant=True" in text:
            raise TwofoldError(CHECKPOINT.format(error=text.splitlines()[0])) from error
        found = _MISSING.search(text)
        if found is None and "once_differentiable" not in text:
            raise
        name = next((group for group in found.groups() if group), "A custom function") if found else "A custom function"
        raise TwofoldError(_no_double_backward(name, text.splitlines()[0])) from error


def _no_double_backward(operation: str, error: str) -> str:
    remedy = "Compose it from plain tensor operations, or leave the parameters before it out with params=."
    if "embedding_bag" in operation:
        remedy = (
            "Use nn.Embedding followed by sum or mean over the bag in the place of nn.EmbeddingBag, or leave what its "
            "output depends on out with params=."
        )
    elif "attention" in operation:
        remedy = "Run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
    return NO_DOUBLE_BACKWARD.format(operation=operation, remedy=remedy, error=error)
