"""How well a curvature matrix predicts what SAM adds to the gradient."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.activations import second_derivative
from twofold.curvature.products import Products
from twofold.errors import TwofoldError
from twofold.parameters import norm
from twofold.types import Forward, LossFn, Matrix, Mode, Params, ProcessGroup, Weight

CurvatureOf: TypeAlias = Matrix | second_derivative
"""A matrix by its name, or the Hessian under another phi''."""

CURVATURES: Mapping[str, CurvatureOf] = MappingProxyType(
    {
        "hessian": "hessian",
        "hessian_without_activation_nme": second_derivative(0),
        "gauss_newton": "gauss_newton",
        "nme": "nme",
    }
)
"""What is compared unless something else is asked for."""


@dataclass(frozen=True)
class Fidelity:
    """How near rho C g^ comes to SAM's own correction, for each curvature C and each rho.

    Attributes:
        rhos: the lengths of SAM's step.
        gradient_norm: ||g||.
        correction_norms: ||grad L(theta + rho g^) - g||, one for each rho.
        cosine: {curvature: cosine between prediction and correction, one for each rho}; nan where one of them is zero.
        relative_error: {curvature: ||prediction - correction|| / ||correction||, one for each rho}.
    """

    rhos: tuple[float, ...]
    gradient_norm: float
    correction_norms: tuple[float, ...]
    cosine: dict[str, tuple[float, ...]]
    relative_error: dict[str, tuple[float, ...]]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return dataclasses.asdict(self)

    def metrics(self) -> dict[str, float]:
        """Flat names for a logger: "fidelity/<curvature>/cosine", with "/rho=<rho>" behind where there are several."""
        ends = [""] if len(self.rhos) == 1 else [f"/rho={rho:g}" for rho in self.rhos]
        return {
            f"fidelity/{name}/{quantity}{end}": value
            for name in self.cosine
            for quantity, values in (("cosine", self.cosine[name]), ("relative_error", self.relative_error[name]))
            for end, value in zip(ends, values, strict=True)
        }

    def __str__(self) -> str:
        width = max(map(len, ("curvature C", *self.cosine)))
        lines = [f"SAM's correction predicted by rho C g^, ||g|| = {self.gradient_norm:.4g}"]
        for i, (rho, size) in enumerate(zip(self.rhos, self.correction_norms, strict=True)):
            lines += [
                f"rho = {rho:g}, ||correction|| = {size:.4g}",
                f"  {'curvature C':{width}}  cosine  relative error",
            ]
            lines += [
                *(
                    f"  {name:{width}}  {self.cosine[name][i]:6.3f}  {self.relative_error[name][i]:14.3g}"
                    for name in self.cosine
                ),
            ]
        return "\n".join(lines)


def fidelity(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    rho: float | Iterable[float],
    *,
    curvatures: Mapping[str, CurvatureOf] | Iterable[Matrix] | None = None,
    params: Params = None,
    forward: Forward | None = None,
    mode: Mode = None,
    memory: int | None = None,
    weight: Weight | None = None,
    microbatches: int = 1,
    group: ProcessGroup = None,
) -> Fidelity:
    """Compare rho C g^ with SAM's own correction, grad L(theta + rho g^) - g, where g = grad L(theta), g^ = g / ||g||.

    With C = H the first is the first-order term of the second, so that the error tends to 0 with rho where the loss is
    smooth; how fast, and for which other C, tells what a gradient penalty sees of sharpness. phi'' matters to C only:
    the correction is made of first derivatives. The model is left as it was.

    Args:
        model: any module; compiled and DDP wrappers are looked through.
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: a batch (inputs, targets), or a re-iterable of batches.
        rho: length of SAM's step in the weights' own units, or several.
        curvatures: names of matrices ("hessian", "gauss_newton", "nme", "activation_nme", "rest"), or a mapping from
            names of your own to such a name or to a `second_derivative(...)`, which stands for the Hessian under it.
            None takes H, H with phi'' = 0, GN and NME.
        params: names or glob patterns of the parameters that are perturbed; None for all that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is. All passes see the same dropout masks.
        memory: bytes for kept recordings of a set of several batches (1 GiB when None).
        weight: weight(outputs, targets) -> how many terms a batch's loss averages.
        microbatches: run each batch in so many pieces, at most; see `Curvature`.
        group: a process group whose ranks each have a shard of the data; see `Curvature`.

    Raises:
        TwofoldError: a rho that is not a positive number, an unknown curvature, a model in half precision, or what
            `Curvature` refuses.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> batch = (torch.randn(16, 3), torch.randint(2, (16,)))
        >>> synthetic = twofold.second_derivative(twofold.gaussian(beta=5))
        >>> choice = {"hessian": "hessian", "synthetic": synthetic, "gauss_newton": "gauss_newton"}
        >>> found = fidelity(model, nn.CrossEntropyLoss(), batch, rho=0.01, curvatures=choice)
        >>> print(f"{found.cosine['hessian'][0]:.2f}, {found.relative_error['hessian'][0]:.2f}")
        1.00, 0.00
        >>> found.relative_error["gauss_newton"][0] > 0.1
        True

    Source: the quantity follows from arXiv 2401.10809, eq. 8 and 11.
    """
    rhos = _rhos(rho)
    chosen = _curvatures(curvatures)
    options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "memory": memory, "weight": weight}
    products = Products(model, loss_fn, data, microbatches=microbatches, group=group, **options)
    products.check_resolved("fidelity cannot be measured")
    _, gradient = products.loss_and_gradient()
    size = norm([gradient]).item()
    unit = gradient / size if size > 0 else gradient
    along = _along(products, unit, chosen)
    corrections = [products.loss_and_gradient(step=each * unit)[1] - gradient for each in rhos]
    compared = {
        name: [_compared(each * product, correction) for each, correction in zip(rhos, corrections, strict=True)]
        for name, product in along.items()
    }
    return Fidelity(
        rhos,
        size,
        tuple(norm([correction]).item() for correction in corrections),
        {name: tuple(cosine for cosine, _ in pairs) for name, pairs in compared.items()},
        {name: tuple(error for _, error in pairs) for name, pairs in compared.items()},
    )


def _along(
    products: Products, unit: Float[Tensor, "P"], chosen: Mapping[str, CurvatureOf]
) -> dict[str, Float[Tensor, "P"]]:
    """C g^ for each curvature; the matrices under the present phi'' share their passes."""
    parts: list[Matrix] = [of for of in chosen.values() if isinstance(of, str)]
    found: dict[Any, Tensor] = {}
    if parts:
        found |= dict(zip(parts, products.matmat(unit.unsqueeze(0), parts), strict=True))
    for of in chosen.values():
        if isinstance(of, second_derivative):
            with of:
                found[of] = products.matmat(unit.unsqueeze(0), ("hessian",))[0]
    return {name: found[of][0] for name, of in chosen.items()}


def _compared(prediction: Float[Tensor, "P"], correction: Float[Tensor, "P"]) -> tuple[float, float]:
    """Cosine and relative error."""
    p, c = prediction.double(), correction.double()
    size = c.norm()
    return (torch.dot(p, c) / (p.norm() * size)).item(), ((p - c).norm() / size).item()


def _rhos(rho: Any) -> tuple[float, ...]:
    rhos = tuple(rho) if isinstance(rho, Iterable) and not isinstance(rho, str | Tensor) else (rho,)
    for each in rhos:
        if isinstance(each, bool) or not isinstance(each, Real) or not 0 < float(each) < math.inf:
            raise TwofoldError(f"rho must be a positive finite number, or several; {rho!r} came.")
    if not rhos:
        raise TwofoldError("rho must be a positive finite number, or several; none came.")
    return tuple(map(float, rhos))


def _curvatures(came: Any) -> Mapping[str, CurvatureOf]:
    if came is None:
        return CURVATURES
    if isinstance(came, str):
        came = (came,)
    chosen = dict(came) if isinstance(came, Mapping) else {name: name for name in came}
    for of in chosen.values():
        if not isinstance(of, second_derivative) and of not in get_args(Matrix):
            raise TwofoldError(
                f"curvatures: {of!r} is neither one of {', '.join(map(repr, get_args(Matrix)))} nor a "
                "second_derivative(...), which stands for the Hessian under it."
            )
    if not chosen:
        raise TwofoldError("curvatures is empty: name at least one, or pass None for H, H with phi'' = 0, GN and NME.")
    return chosen
