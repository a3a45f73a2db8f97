"""A loss times the factor of a gradient scaler, with its derivatives over the outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twofold.curvature.losses import Loss, OutputProduct, Residual


class ScaledLoss(Loss):
    """c L, against underflow in half precision.

    Args:
        loss: L.
        factor: c.
    """

    def __init__(self, loss: Loss, factor: float) -> None:
        super().__init__(loss.loss_fn, averages=loss.averages)
        self._loss = loss
        self._factor = factor

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return c L."""
        return self._loss(outputs, targets) * self._factor

    def count(self, outputs: Any, targets: Any) -> float:
        """Return how many terms L has."""
        return self._loss.count(outputs, targets)

    def output_hessian(self, outputs: Any, targets: Any) -> OutputProduct:
        """Return t -> c H_z t over the outputs."""
        return self._scaled(self._loss.output_hessian(outputs, targets))

    def output_third(self, outputs: Any, targets: Any) -> OutputProduct:
        """Return t -> the gradient of c t'H_z t in the outputs, t held fixed."""
        return self._scaled(self._loss.output_third(outputs, targets))

    def residual(self, outputs: Tensor, targets: Any, kind: Residual, generator: torch.Generator | None) -> Tensor:
        """Return what L draws, without the factor."""
        return self._loss.residual(outputs, targets, kind, generator)

    def _scaled(self, of: OutputProduct) -> OutputProduct:
        def scaled(tangents: Sequence[Tensor]) -> list[Tensor]:
            wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tangents]
            return [(self._factor * h).to(t.dtype) for h, t in zip(of(wide), tangents, strict=True)]

        return scaled
