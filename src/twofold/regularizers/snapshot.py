"""What a failed backward puts back: what passes move in a model, and the states of random generators."""

import torch
from torch import Tensor, nn

from twofold.curvature.differentiable import ModuleState, RandomState


class RandomSources:
    """The state of every generator that a backward may draw from: the global ones and the regularizer's own."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.shared = RandomState()
        self._own = None if generator is None else (generator, generator.get_state())

    def restore(self) -> None:
        """Put every generator back to this state."""
        self.shared.restore()
        if self._own is not None:
            generator, state = self._own
            generator.set_state(state)


class ModelState:
    """What a pass moves in a model: all that hangs on its modules, and the tensors that it writes into."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = ModuleState(model)
        self._tensors = [(tensor, tensor.clone()) for module in model.modules() for tensor in _held(module)]

    def restore(self) -> None:
        """Put everything back as it was."""
        self._modules.restore()
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)


def _held(module: nn.Module) -> list[Tensor]:
    """Buffers, and tensors kept as plain attributes, off the graph."""
    held = [*module._buffers.values(), *(value for value in module.__dict__.values() if type(value) is Tensor)]
    return [tensor for tensor in held if tensor is not None and not tensor.requires_grad]


class Snapshot:
    """What a failed backward puts back: modules, buffers, random states. Weights and .grad need none of it."""

    def __init__(self, model: nn.Module, generator: torch.Generator | None) -> None:
        self.random = RandomSources(generator)
        self._model = ModelState(model)

    def restore(self) -> None:
        """Put all of it back."""
        self.random.restore()
        self._model.restore()
