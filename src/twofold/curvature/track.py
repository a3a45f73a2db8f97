"""track: cheap repeated measurement while a model trains."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.differentiable import full_precision
from twofold.curvature.lanczos import Krylov, norm_of
from twofold.curvature.linear_map import LinearMap
from twofold.curvature.operators import GaussNewton, Hessian, SymmetricOperator
from twofold.curvature.probes import check_count, private_generator, rademacher
from twofold.curvature.products import Products
from twofold.curvature.sampling import HALVES, Samples, gram_of
from twofold.errors import NotFiniteError, TwofoldError
from twofold.types import Forward, LossFn, Matrix, Mode, Params, ProcessGroup, Weight

Record: TypeAlias = dict[str, float]
"""{"step": number, "curvature/<matrix>/<quantity>": value}"""

_MATRICES: tuple[Matrix, ...] = ("hessian", "gauss_newton", "nme")
_FOLLOWED: tuple[Matrix, ...] = ("hessian", "gauss_newton")
_COLD_STEPS = 24
_TOL = 1e-3
_FRESH = 0.1
"""How much of a random direction is mixed into the last eigenvector, so that one that overtakes it is seen."""


@dataclass(frozen=True)
class Overhead:
    """What tracking took.

    Attributes:
        seconds: spent measuring.
        num_matvecs: directions along which products were taken.
        num_records: how many measurements.
        share: seconds over all the time since tracking began, from 0 to 1.
    """

    seconds: float
    num_matvecs: int
    num_records: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.seconds:.3g} s and {self.num_matvecs} products for {self.num_records} records, "
            f"{100 * self.share:.3g} % of the time"
        )


def track(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Params = None,
    forward: Forward | None = None,
    mode: Mode = None,
    memory: int | None = None,
    weight: Weight | None = None,
    microbatches: int = 1,
    group: ProcessGroup = None,
    num_probes: int = 4,
    max_steps: int = 8,
) -> "Tracker":
    """Follow both halves of a loss Hessian while a model trains, at the cost of a few dozen gradients a record.

    The same batch and the same probes are taken each time, so that a change in the numbers is a change of the model.

    Args:
        model: any module; it is read, never changed.
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: a fixed batch (inputs, targets), or a re-iterable of batches.
        params: names or glob patterns; None for all parameters that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is.
        memory: bytes for kept recordings of a set of several batches (1 GiB when None). Nothing is kept between records
            but one eigenvector of H and one of GN.
        weight: weight(outputs, targets) -> how many terms a batch's loss averages.
        microbatches: run each batch in so many pieces, at most; see `Curvature`.
        group: a process group whose ranks each have a shard of the data; see `Curvature`.
        num_probes: Rademacher probes for traces and norms; each takes about three gradients.
        max_steps: most products for each eigenvector, which start from the last one; the first record takes three times
            as many.

    Returns:
        Tracker: `tracker.measure(step)` -> Record.

    Raises:
        TwofoldError: as `Curvature` does.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
        >>> tracker = track(model, nn.CrossEntropyLoss(), (x, y))
        >>> for step in range(4):
        ...     if step % 2 == 0:
        ...         record = tracker.measure(step)
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> [record["step"] for record in tracker.history]
        [0, 2]
        >>> "curvature/hessian/lambda_max" in record
        True
    """
    check_count(num_probes, "num_probes")
    check_count(max_steps, "max_steps", at_least=2)
    options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "memory": memory, "weight": weight}
    products = Products(model, loss_fn, data, microbatches=microbatches, group=group, **options)
    return Tracker(products, num_probes, max_steps)


class Tracker:
    """Measures again and again, from where it was; made by `twofold.track`.

    A record holds, for H, GN and NME ("hessian", "gauss_newton", "nme") under "curvature/<matrix>/<quantity>":

        trace, frobenius_norm                estimates, and the same with _stderr
        along_gradient, gradient_share       g'A g / g'g, and its share of g'H g
        ratio                                of NME: ||NME||_F / ||GN||_F
        lambda_max, lambda_max_residual      of H and GN: the largest eigenvalue, and ||A v - lambda v||
        gradient_alignment                   of H and GN: |<v, g>| / ||g|| for its eigenvector v

    Where the loss is not finite (a run that has diverged) all of them are nan, and training goes on.

    Attributes:
        history: all records, in order.
    """

    def __init__(self, products: Products, num_probes: int, max_steps: int) -> None:
        self.history: list[Record] = []
        self._products, self._num_probes, self._max_steps = products, num_probes, max_steps
        self._vectors: dict[str, Tensor] = {}
        self._seconds, self._num_matvecs = 0.0, 0
        self._began = time.monotonic()
        products.watch = self._count

    @full_precision()
    def measure(self, step: int) -> Record:
        """Measure the model as it is now, append the record to the history and return it.

        Args:
            step: the training step, for the record.

        Raises:
            TwofoldError: a parameter is gone or has another shape, or the data has changed.
        """
        start = time.monotonic()
        try:
            found = self._measured()
        except NotFiniteError:
            found = dict.fromkeys(_keys(), math.nan)
        finally:
            self._products.forget()
            self._seconds += time.monotonic() - start
        self.history.append({"step": step, **found})
        return self.history[-1]

    @property
    def overhead(self) -> Overhead:
        """What tracking took so far, over interruptions too."""
        elapsed = time.monotonic() - self._began
        return Overhead(self._seconds, self._num_matvecs, len(self.history), self._seconds / max(elapsed, 1e-9))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later record depends on, and the history: {"vectors": {matrix: [P]}, "history": ...}."""
        return {
            "vectors": {name: vector.clone() for name, vector in self._vectors.items()},
            "history": [dict(record) for record in self.history],
            "seconds": self._seconds,
            "elapsed": time.monotonic() - self._began,
            "num_matvecs": self._num_matvecs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another tracker's `state_dict`: the records that follow are those that it would have made.

        Raises:
            TwofoldError: it is of another form, or of another model.
        """
        try:
            layout = self._products.layout
            vectors = {
                name: torch.as_tensor(vector).to(layout.device, layout.dtype, copy=True)
                for name, vector in state["vectors"].items()
            }
            history = [dict(record) for record in state["history"]]
            seconds, elapsed = float(state["seconds"]), float(state["elapsed"])
            num_matvecs = int(state["num_matvecs"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TwofoldError(f"This is no state of a tracker: {type(error).__name__}: {error}.") from error
        for name, vector in vectors.items():
            if name not in _FOLLOWED or vector.shape != (layout.size,):
                raise TwofoldError(
                    f"The state of a tracker has a vector {name!r} of shape {tuple(vector.shape)}; this one follows "
                    f"{', '.join(_FOLLOWED)} over {layout.size} parameters."
                )
        self._vectors, self.history = vectors, history
        self._seconds, self._num_matvecs = seconds, num_matvecs
        self._began = time.monotonic() - elapsed

    def _count(self, vectors: int) -> None:
        self._num_matvecs += vectors

    def _measured(self) -> Record:
        _, gradient = self._products.loss_and_gradient()
        found = self._along(gradient)
        samples = Samples(self._products, HALVES)
        for probe in rademacher(Hessian.of(self._products), self._num_probes, None):
            samples.take(probe)
        for matrix in _MATRICES:
            for quantity, estimate in (("trace", samples.trace(matrix)), ("frobenius_norm", samples.frobenius(matrix))):
                found[f"curvature/{matrix}/{quantity}"] = estimate.value
                found[f"curvature/{matrix}/{quantity}_stderr"] = estimate.stderr
        found["curvature/nme/ratio"] = samples.ratio("nme", "gauss_newton").value
        for matrix, operator in zip(_FOLLOWED, (Hessian, GaussNewton), strict=True):
            value, residual, vector = self._largest(matrix, operator.of(self._products))
            found[f"curvature/{matrix}/lambda_max"] = value
            found[f"curvature/{matrix}/lambda_max_residual"] = residual
            dot = gram_of([vector, gradient])
            norm = dot[1, 1].sqrt()
            found[f"curvature/{matrix}/gradient_alignment"] = (dot[0, 1].abs() / norm).item() if norm else math.nan
        return {key: found[key] for key in _keys()}

    def _along(self, gradient: Float[Tensor, "P"]) -> Record:
        halves = [rows[0] for rows in self._products.matmat(gradient.unsqueeze(0), HALVES)]
        square, of_gn, of_nme = gram_of([gradient, *halves])[0].tolist()
        found: Record = {}
        for matrix, form in zip(_MATRICES, (of_gn + of_nme, of_gn, of_nme), strict=True):
            found[f"curvature/{matrix}/along_gradient"] = form / square if square else math.nan
            whole = of_gn + of_nme
            found[f"curvature/{matrix}/gradient_share"] = form / whole if whole else math.nan
        return found

    def _largest(self, matrix: str, operator: SymmetricOperator) -> tuple[float, float, Tensor]:
        """The largest eigenvalue by a few steps of Lanczos from the last eigenvector; its residual, and its vector."""
        last = self._vectors.get(matrix)
        most = min(_COLD_STEPS if last is None else self._max_steps, operator.shape[0])
        generator = private_generator(operator.device)
        start = torch.randn(operator.shape[0], generator=generator, device=operator.device, dtype=operator.dtype)
        if last is not None:
            start *= _FRESH / norm_of(start)
            start += last
        krylov = Krylov(LinearMap(operator), most, 1, generator)
        krylov.start(start.unsqueeze(1))
        while krylov.pending and krylov.done < most:
            krylov.step()
            values, mixing, residuals = krylov.ritz()
            if residuals[-1] <= _TOL * krylov.scale:
                break
        vector = mixing[:, -1].to(krylov.basis.rows) @ krylov.basis.rows[: krylov.done]
        self._vectors[matrix] = vector
        return values[-1].item(), residuals[-1].item(), vector


def _keys() -> list[str]:
    """The keys of a record, in their order."""
    both = ("trace", "trace_stderr", "frobenius_norm", "frobenius_norm_stderr", "along_gradient", "gradient_share")
    of_eigenvector = ("lambda_max", "lambda_max_residual", "gradient_alignment")
    more = {"hessian": of_eigenvector, "gauss_newton": of_eigenvector, "nme": ("ratio",)}
    return [f"curvature/{matrix}/{quantity}" for matrix in _MATRICES for quantity in (*both, *more[matrix])]
