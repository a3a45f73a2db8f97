"""What the monitors of the frameworks measure: `twofold.track` and `twofold.fidelity` on a fixed batch."""

import contextlib
from typing import Any

from torch import nn

from twofold.curvature.fidelity import fidelity
from twofold.curvature.track import Tracker, track
from twofold.errors import NotFiniteError
from twofold.types import Forward, LossFn, Mode, Params


class CurvatureMetrics:
    """Measure a model again and again, as flat names and numbers for a logger.

    "curvature/<matrix>/<quantity>" as `twofold.track` gives them, and with rho "fidelity/<curvature>/cosine" and
    ".../relative_error". The model is left as it was.

    Args:
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: a fixed batch (inputs, targets), or a re-iterable of batches.
        params: names or glob patterns of parameters; None for all that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is.
        num_probes: Rademacher probes for traces and norms.
        rho: length of SAM's step in `twofold.fidelity`; None leaves it out (weights in half precision are refused).
    """

    def __init__(
        self,
        loss_fn: LossFn,
        data: Any,
        *,
        params: Params = None,
        forward: Forward | None = None,
        mode: Mode = "eval",
        num_probes: int = 4,
        rho: float | None = None,
    ) -> None:
        self._arguments: Any = (loss_fn, data)
        self._options: Any = {"params": params, "forward": forward, "mode": mode}
        self._num_probes, self._rho = num_probes, rho
        self._model: nn.Module | None = None
        self._tracker: Tracker | None = None
        self._state: dict[str, Any] | None = None

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure the model as it is now; where its loss is not finite all is nan, and fidelity is left out.

        Args:
            model: the same each time.
            step: the training step.
        """
        if self._tracker is None or model is not self._model:
            self._model = model
            self._tracker = track(model, *self._arguments, **self._options, num_probes=self._num_probes)
            if self._state is not None:
                self._tracker.load_state_dict(self._state)
        metrics = dict(self._tracker.measure(step))
        del metrics["step"]
        if self._rho is not None:
            with contextlib.suppress(NotFiniteError):
                metrics |= fidelity(model, *self._arguments, rho=self._rho, **self._options).metrics()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What later measurements depend on."""
        return {"tracker": self._state if self._tracker is None else self._tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._tracker, self._state = None, state["tracker"]
