"""SharpnessAware: a regularizer behind torch.optim.Optimizer.step(closure)."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from twofold.batches import describe
from twofold.curvature.differentiable import RandomState
from twofold.curvature.operators import Hessian
from twofold.distributed import together
from twofold.errors import TwofoldError
from twofold.parameters import matching
from twofold.regularizers.base import Regularizer
from twofold.regularizers.gradients import Gradients
from twofold.regularizers.passes import Passes
from twofold.regularizers.ranks import Ranks
from twofold.regularizers.recorded import JetGraph, LossGraph, Recorded
from twofold.regularizers.snapshot import RandomSources

Closure = Callable[[], Any]


class SharpnessAware(Optimizer):
    """Run a regularizer from code that owns only `optimizer.step(closure)`.

    The closure zeroes gradients, computes the loss, calls backward and returns the loss; `step` calls it as often as
    the regularizer needs and steps the base optimiser with the regularizer's gradient. `param_groups`, `state` and
    `defaults` are the base's own, so schedulers see one optimiser; `state_dict` is the base's own plus "twofold", and a
    plain optimiser's state loads.

    With reg.group= gradients are averaged over its ranks here, and the closure runs a plain model (or a
    DistributedDataParallel one inside its `no_sync()`). Without, a DistributedDataParallel model in the closure
    averages each gradient by itself, which is ascent="global".

    Running statistics of modules that run in later passes are put back; other things that a closure does (logging,
    counting) happen in every pass. Penalties need the model's outputs and so `reg.backward`.

    Args:
        base: any torch optimiser.
        reg: what needs gradients only: every method of the SAM family but EigenSAM, WeightNoise,
            GradientPenalty(method="finite_difference") or HessianTrace(method="difference"). It is attached to `base`.
            For reg.params, rho by pattern and ASAM, build `base` from model.named_parameters().

    Raises:
        TwofoldError: base is no optimiser, or reg no regularizer, or its options do not work from a closure.

    Example:
        >>> from twofold.regularizers import SAM
        >>> model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), SAM(rho=0.05))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    # GradScaler sets .found_inf on such an optimiser before it steps, by which a scaled closure is seen and refused.
    _step_supports_amp_scaling = True

    def __init__(self, base: Optimizer, reg: Regularizer) -> None:
        if not isinstance(base, Optimizer):
            raise TwofoldError(f"SharpnessAware wraps a torch.optim.Optimizer; {describe(base)} came.")
        if not isinstance(reg, Regularizer):
            raise TwofoldError(f"SharpnessAware takes a regularizer such as SAM(rho=0.05); {describe(reg)} came.")
        if reg.microbatches != 1:
            raise TwofoldError(
                f"microbatches={reg.microbatches} cannot split what a closure computes; use reg.backward, or a closure "
                "over a smaller batch."
            )
        self.base = base
        self.reg = reg
        super().__setstate__({})  # hooks only: groups, state and defaults are the base's
        reg.attach(base)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyrefly: ignore
        """The base optimiser's parameter groups."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # pyrefly: ignore
        """The base optimiser's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyrefly: ignore
        """The base optimiser's defaults."""
        return self.base.defaults

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "reg": self.reg}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.reg.attach(self.base)

    def __repr__(self) -> str:
        return f"SharpnessAware({self.base!r}, {self.reg!r})"

    def step(self, closure: Closure | None = None) -> Any:
        """Make one step of the base optimiser with the regularizer's gradient.

        Args:
            closure: zeroes gradients, computes the loss, calls backward and returns the loss. It must compute the whole
                gradient: what .grad holds before is not added.

        Returns:
            The loss of the first call of the closure.

        Raises:
            TwofoldError: there is no closure, it adds to gradients of earlier batches, a GradScaler scaled it, or the
                regularizer needs the model's outputs.
                Then, as after any exception in the closure, weights, buffers, .grad and random states are as they were.
        """
        if self.__dict__.pop("found_inf", None) is not None:
            self.__dict__.pop("grad_scale", None)
            raise TwofoldError(
                "A GradScaler cannot step a closure: the perturbation would be that of scaled gradients. Call "
                "reg.backward(model, loss_fn, batch, scaler=scaler), then scaler.step(base optimiser). In Lightning "
                "take twofold.integrations.lightning.RegularizerCallback."
            )
        if closure is None:
            raise TwofoldError(
                "SharpnessAware.step needs a closure, which it calls more than once. In a loop of your own, call "
                "reg.backward(model, loss_fn, batch) and step the plain optimiser."
            )
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        random = RandomSources(self.reg.generator)
        names = self._names()
        found = [parameter.grad for parameter in parameters]
        self._zeroed = False
        checked = self._checked(closure, parameters, found)
        passes = ClosurePasses(checked, parameters, self._chosen(names), names=names, reg=self.reg, start=random.shared)
        remembered = copy.copy(self.reg.memory)
        with together(self.reg.group):
            try:
                direction = self.reg.over_ranks(self.reg.of_this_step(passes), passes)
            except BaseException:
                random.restore()
                self.reg.memory = remembered
                passes.undo()
                _set_gradients(parameters, found)
                raise
        self.reg.report(direction.diagnostics)
        if self.reg.accepts(direction.gradients):
            _set_gradients(parameters, direction.gradients)
            if direction.memory is not None:
                self.reg.memory.add(direction.memory, 1.0)
            self.base.step()
        else:
            _set_gradients(parameters, found)
        return direction.loss

    def _checked(self, closure: Closure, parameters: Sequence[nn.Parameter], found: Sequence[Tensor | None]) -> Closure:
        """The closure, refused where it adds to gradients of earlier batches, which its passes cannot tell apart."""
        held = next(
            (i for i, gradient in enumerate(found) if gradient is not None and (gradient.is_sparse or gradient.any())),
            None,
        )
        if held is None:
            return closure

        def checked() -> Any:
            mark = parameters[held].grad = torch.zeros_like(parameters[held])
            loss = closure()
            if parameters[held].grad is mark and not self._zeroed:
                raise TwofoldError(
                    "The closure left .grad as it found it before it added to it, and .grad holds a gradient. Call "
                    "optimizer.zero_grad() in the closure. To accumulate gradients over batches call "
                    "reg.backward(model, loss_fn, batch, weight=1/k) for each and step the base optimiser; in "
                    "Lightning take twofold.integrations.lightning.RegularizerCallback."
                )
            return loss

        return checked

    def _names(self) -> list[str | None]:
        return [
            name
            for group in self.param_groups
            for p, name in zip(group["params"], group.get("param_names", [None] * len(group["params"])), strict=True)
            if p.requires_grad
        ]

    def _chosen(self, trained: Sequence[str | None]) -> list[int]:
        if self.reg.params is None:
            return list(range(len(trained)))
        if None in trained:
            raise TwofoldError(
                "params= names parameters, and the base optimiser does not know their names: build it from "
                "model.named_parameters()."
            )
        patterns = [self.reg.params] if isinstance(self.reg.params, str) else list(self.reg.params)
        wanted: set[str] = set()
        for pattern in patterns:
            found = matching([str(name) for name in trained], pattern)
            if not found:
                raise TwofoldError(f"params: {pattern!r} matches no trained parameter of the optimiser.")
            wanted |= found
        return [i for i, name in enumerate(trained) if name in wanted]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters."""
        self._zeroed = True
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimiser."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's state, with the regularizer's own under "twofold"."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = {**self.base.state_dict(), "twofold": self.reg.state_dict()}
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, of this or of a plain optimiser."""
        state = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        own = state.pop("twofold", None)
        before = self.reg.state_dict()
        if own is not None:
            self.reg.load_state_dict(own)
        try:
            self.base.load_state_dict(state)
        except BaseException:
            self.reg.load_state_dict(before)
            raise
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


class ClosurePasses(Passes):
    """Passes that a closure makes; of the model it knows only what runs.

    Args:
        closure: computes the loss and its gradient.
        parameters, chosen, names, start: as in `Passes`.
        reg: where the options come from.
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Sequence[nn.Parameter],
        chosen: Sequence[int],
        *,
        names: Sequence[str | None],
        reg: Regularizer,
        start: RandomState,
    ) -> None:
        options: dict[str, Any] = {"source": reg.generator, "share_masks": reg.share_masks, "start": start}
        options |= {"ranks": Ranks(reg.group, reg.ascent), "linear": reg.linear, "saved": reg.saved_weights}
        super().__init__(parameters, chosen, names=names, **options)
        self._closure = closure
        self._reg = reg
        self._before: list[tuple[Tensor, Tensor]] = []

    def undo(self) -> None:
        """Put back the buffers that the first pass has moved."""
        with torch.no_grad():
            for buffer, value in self._before:
                buffer.copy_(value)

    def _first_pass(self) -> tuple[Tensor, Gradients]:
        def remember(module: nn.Module) -> None:
            self._before += [(b, b.detach().clone()) for b in module._buffers.values() if b is not None]

        with _before_each_module(remember):
            return self._run()

    def _later_pass(self) -> tuple[Tensor, Gradients]:
        saved: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        copies: dict[int, Tensor] = {}

        def replace(module: nn.Module) -> None:
            saved.append((module, dict(module._buffers)))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())

        try:
            with _before_each_module(replace):
                return self._run()
        finally:
            for module, buffers in saved:
                module._buffers.clear()
                module._buffers.update(buffers)

    def _run(self) -> tuple[Tensor, Gradients]:
        torch.clear_autocast_cache()
        _set_gradients(self.parameters, [None for _ in self.parameters])
        with torch.enable_grad():
            loss = self._closure()
        torch.clear_autocast_cache()
        if loss is None:
            raise TwofoldError("The closure returned None; it must return the loss.")
        gradients = [parameter.grad for parameter in self.parameters]
        if all(gradient is None for gradient in gradients):
            raise TwofoldError("The closure left no gradient: it must call loss.backward() before it returns the loss.")
        return torch.as_tensor(loss).detach(), gradients

    def need_outputs(self) -> None:
        """Refuse, since a closure hides them."""
        raise self._refusal()

    def _hessian(self) -> Hessian:
        raise self._refusal()

    def _recorded_pass(self) -> Recorded:
        raise self._refusal()

    def _graph_pass(self) -> LossGraph:
        raise self._refusal()

    def _jets_pass(self, direction: Sequence[Tensor]) -> JetGraph:
        raise self._refusal()

    def _undo_jets(self) -> None:
        raise self._refusal()

    def _refusal(self) -> TwofoldError:
        return TwofoldError(
            f"{self._reg!r} needs the model's outputs, which a closure hides. Call reg.backward(model, loss_fn, batch) "
            "and step the plain optimiser, or take a method that needs gradients only (method='finite_difference' or "
            "'difference', SAM, WeightNoise)."
        )


@contextmanager
def _before_each_module(action: Callable[[nn.Module], None]) -> Iterator[None]:
    """Act once on each module before it runs, its submodules with it."""
    seen: set[int] = set()

    def hook(module: nn.Module, args: Any) -> None:
        if id(module) in seen:
            return
        for inner in module.modules():
            if id(inner) not in seen:
                seen.add(id(inner))
                action(inner)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
