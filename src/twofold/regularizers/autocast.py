"""The caller's autocast, around the passes and off during derivatives."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from twofold.curvature.losses import called
from twofold.types import LossFn


class Autocast:
    """The caller's autocast: every pass casts the weights anew, and derivatives are taken outside.

    Autocast keeps the casts that it made of weights; a pass at perturbed weights would reuse those of the old ones.
    """

    def __init__(self, devices: set[str]) -> None:
        self._ambient = {d: torch.get_autocast_dtype(d) for d in sorted(devices) if torch.is_autocast_enabled(d)}

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Make a pass that reuses no cast of another and leaves none."""
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Take derivatives in the precision that the forward pass had."""
        with ExitStack() as stack:
            for device in self._ambient:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def inside(self, loss_fn: LossFn) -> LossFn:
        """Return a loss function that runs under the caller's autocast wherever it is called."""

        @functools.wraps(loss_fn)
        def under_autocast(outputs: Any, targets: Any) -> Tensor:
            with ExitStack() as stack:
                for device, dtype in self._ambient.items():
                    stack.enter_context(torch.autocast(device, dtype=dtype))
                return called(loss_fn, outputs, targets)

        return under_autocast
