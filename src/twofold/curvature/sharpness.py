"""sharpness: the measures of sharpness that papers use, in one call."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.ascent import Ascent, ascend
from twofold.curvature.eigen import eigsh
from twofold.curvature.operators import GaussNewton, Hessian
from twofold.curvature.probes import check_count, generator_for, rademacher, summarise
from twofold.curvature.products import Products
from twofold.errors import TwofoldError
from twofold.parameters import norm
from twofold.types import Eigenpairs, Estimate, Forward, LossFn, Matrix, Mode, Params, ProcessGroup, Weight

Measure: TypeAlias = Literal[
    "lambda_max",
    "traces",
    "adaptive_traces",
    "worst_case",
    "adaptive_worst_case",
    "average",
    "adaptive_average",
    "keskar",
]

_HALVES: tuple[Matrix, ...] = ("hessian", "gauss_newton", "nme")
_SYMBOLS = {"hessian": "H", "gauss_newton": "GN", "nme": "NME"}
_OF_PRODUCTS = ("lambda_max", "traces", "adaptive_traces")
_TOL = 1e-3


@dataclass(frozen=True, eq=False)
class Sharpness:
    """How sharp a loss L is at the weights theta [P]; made by `twofold.sharpness`. What was not asked for is None.

    The adaptive measures count every weight in units of its own size, so they do not change where the weights of two
    layers are rescaled without changing the model.

    Attributes:
        loss: L(theta) over the whole set.
        gradient_norm: ||grad L||.
        settings: rho, adaptive_rho, sigma, adaptive_sigma, epsilon and p, as asked for.
        lambda_max: {"hessian", "gauss_newton": Eigenpairs}, the largest eigenvalue of each with its eigenvector and
            residual; in units of the loss per weight^2.
        traces: {"hessian", "gauss_newton", "nme": Estimate} of tr A; in the same units.
        adaptive_traces: the same of tr(D A D), D = diag|theta|; in units of the loss.
        worst_case: the highest L(theta + e) - L(theta) found over ||e||_p <= rho (Foret et al., 2010.01412).
        adaptive_worst_case: the same over ||e / |theta| ||_p <= adaptive_rho (Kwon et al., 2102.11600; Andriushchenko
            et al., 2302.07011, eq. 2).
        average: E L(theta + e) - L(theta), e ~ N(0, sigma^2 I); about sigma^2/2 tr H. Its num_matvecs are losses taken.
        adaptive_average: the same with e ~ N(0, adaptive_sigma^2 D^2); about adaptive_sigma^2/2 tr(D H D)
            (2302.07011, eq. 1).
        keskar: 100 (max L(theta + e) - L(theta)) / (1 + L(theta)) over |e_i| <= epsilon (|theta_i| + 1), in per cent
            (Keskar et al., 1609.04836, metric 2.1 with A = I).
    """

    loss: float
    gradient_norm: float
    settings: Mapping[str, float]
    lambda_max: Mapping[Matrix, Eigenpairs] | None = None
    traces: Mapping[Matrix, Estimate] | None = None
    adaptive_traces: Mapping[Matrix, Estimate] | None = None
    worst_case: Ascent | None = None
    adaptive_worst_case: Ascent | None = None
    average: Estimate | None = None
    adaptive_average: Estimate | None = None
    keskar: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; eigenvectors are left out."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        s = self.settings
        ball = "2" if s["p"] == 2 else "inf"
        rows: list[tuple[str, str]] = []
        for part, pairs in (self.lambda_max or {}).items():
            text = f"{pairs.values[-1]:.4g} ± {pairs.residuals[-1]:.1g}" + (
                "" if pairs.converged else ", not converged"
            )
            rows.append((f"lambda_max {_SYMBOLS[part]}", text))
        for part, estimate in (self.traces or {}).items():
            rows.append((f"tr {_SYMBOLS[part]}", _with_error(estimate)))
        for part, estimate in (self.adaptive_traces or {}).items():
            rows.append((f"tr |theta| {_SYMBOLS[part]} |theta|", _with_error(estimate)))
        for name, found, condition in (
            ("worst case", self.worst_case, f"||e||_{ball} <= {s['rho']:g}"),
            ("adaptive worst case", self.adaptive_worst_case, f"||e/|theta| ||_{ball} <= {s['adaptive_rho']:g}"),
        ):
            if found is not None:
                rows.append((f"{name}, {condition}", f"{found.rise:.4g} (one step {found.one_step:.4g})"))
        for name, found, condition in (
            ("average", self.average, f"e ~ N(0, {s['sigma']:g}^2)"),
            ("adaptive average", self.adaptive_average, f"e ~ N(0, ({s['adaptive_sigma']:g} theta)^2)"),
        ):
            if found is not None:
                rows.append((f"{name}, {condition}", _with_error(found)))
        if self.keskar is not None:
            rows.append((f"Keskar, |e| <= {s['epsilon']:g} (|theta| + 1)", f"{self.keskar:.4g} %"))
        width = max((len(name) for name, _ in rows), default=0)
        head = f"Sharpness at loss {self.loss:.4g}, gradient norm {self.gradient_norm:.4g}"
        return "\n".join([head, *(f"  {name:{width}}  {text}" for name, text in rows)])


def sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    measures: Sequence[Measure] | None = None,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    sigma: float = 0.01,
    adaptive_sigma: float = 0.1,
    epsilon: float = 1e-3,
    p: float = 2,
    ascent_steps: int = 20,
    num_matvecs: int = 64,
    num_samples: int = 16,
    params: Params = None,
    forward: Forward | None = None,
    mode: Mode = None,
    memory: int | None = None,
    weight: Weight | None = None,
    microbatches: int = 1,
    group: ProcessGroup = None,
    generator: torch.Generator | None = None,
) -> Sharpness:
    """Measure sharpness at the weights theta in the ways that papers do; each formula stands in `Sharpness`.

    All are of the loss over the whole set, averaged exactly, with the same dropout masks at every point; the model is
    left as it was. Worst cases are lower bounds, found by projected gradient ascent that starts with SAM's step, or
    along the eigenvector of lambda_max where that was asked for and leads higher. Averages take antithetic pairs,
    (L(theta + e) + L(theta - e)) / 2, so that the gradient adds no noise to them. Differences of losses below 1e-6 of
    the loss are rounding in float32: measure those in float64. In half precision all of them are: what is taken from
    differences is refused there, and the rest is known to that precision.

    Args:
        model: any module; compiled and DDP wrappers are looked through.
        loss_fn: loss_fn(outputs, targets) -> scalar.
        data: a batch (inputs, targets), or a re-iterable of batches.
        measures: which attributes of `Sharpness` to fill: "lambda_max", "traces", "adaptive_traces", "worst_case",
            "adaptive_worst_case", "average", "adaptive_average", "keskar"; None for all.
        rho: radius of the ball, in the weights' units.
        adaptive_rho: radius of the ball in units of each weight's size.
        sigma: standard deviation of the noise, in the weights' units.
        adaptive_sigma: standard deviation of the noise in units of each weight's size.
        epsilon: of Keskar's box.
        p: norm of the balls, 2 or inf; with inf the literature's radii are about a hundred times smaller.
        ascent_steps: gradients of the whole set for each worst case, beyond the one at theta.
        num_matvecs: Rademacher probes for the traces.
        num_samples: antithetic pairs for the averages, each two forward passes over the data.
        params: names or glob patterns of the parameters that are perturbed; None for all that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is.
        memory: bytes for kept recordings of a set of several batches (1 GiB when None).
        weight: weight(outputs, targets) -> how many terms a batch's loss averages.
        microbatches: run each batch in so many pieces, at most; see `Curvature`.
        group: a process group whose ranks each have a shard of the data; see `Curvature`.
        generator: source of probes and noise; None takes private ones with a fixed seed.

    Raises:
        TwofoldError: an unknown measure, an argument out of range, a difference of losses in half precision, or what
            `Curvature` refuses.

    Warns:
        TwofoldWarning: lambda_max did not converge to a residual of 1e-3 of itself; its residual still holds.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> batch = (torch.randn(16, 3), torch.randint(2, (16,)))
        >>> found = sharpness(model, nn.CrossEntropyLoss(), batch, measures=("lambda_max", "worst_case"))
        >>> found.worst_case.rise >= found.worst_case.one_step > 0
        True

    Source: arXiv 2302.07011 compares the measures.
    """
    wanted = _check_measures(measures)
    settings = {"rho": rho, "adaptive_rho": adaptive_rho, "sigma": sigma, "adaptive_sigma": adaptive_sigma}
    settings["epsilon"] = epsilon
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
            raise TwofoldError(f"{name} must be a positive finite number; {value!r} came.")
    if p not in (2, math.inf):
        raise TwofoldError(f"p must be 2 or math.inf; {p!r} came.")
    for name, count in (("ascent_steps", ascent_steps), ("num_matvecs", num_matvecs), ("num_samples", num_samples)):
        check_count(count, name)
    how: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "memory": memory, "weight": weight}
    products = Products(model, loss_fn, data, microbatches=microbatches, group=group, **how)
    differences = [name for name in wanted if name not in _OF_PRODUCTS]
    if differences:
        products.check_resolved(f"{', '.join(differences)} cannot be measured ({', '.join(_OF_PRODUCTS)} can)")
    hessian = Hessian.of(products)
    loss, gradient = products.loss_and_gradient()
    size = products.layout.flatten(products.present_parameters().values()).abs()
    found: dict[str, Any] = {}

    if "lambda_max" in wanted:
        operators: dict[Matrix, Any] = {"hessian": hessian, "gauss_newton": GaussNewton.of(products)}
        found["lambda_max"] = {
            part: eigsh(operator, 1, which="LA", tol=_TOL, generator=generator) for part, operator in operators.items()
        }
    for name, scale in (("traces", None), ("adaptive_traces", size)):
        if name in wanted:
            found[name] = _traces(products, hessian, scale, num_matvecs, generator)
    top = found["lambda_max"]["hessian"].vectors[:, -1] if "lambda_max" in found else None
    options: dict[str, Any] = {"steps": ascent_steps, "starts": [] if top is None else [top, -top]}
    if "worst_case" in wanted:
        found["worst_case"] = ascend(products, rho, p=p, **options)
    if "adaptive_worst_case" in wanted:
        found["adaptive_worst_case"] = ascend(products, adaptive_rho, scale=size, p=p, **options)
    for name, scale in (("average", sigma), ("adaptive_average", adaptive_sigma * size)):
        if name in wanted:
            found[name] = _average(products, loss, scale, num_samples, generator_for(hessian, generator))
    if "keskar" in wanted:
        rise = ascend(products, epsilon, scale=size + 1, p=math.inf, **options).rise
        found["keskar"] = 100 * rise / (1 + loss)
    numbers = {name: float(value) for name, value in settings.items()} | {"p": float(p)}
    return Sharpness(loss, norm([gradient]).item(), numbers, **found)


def _traces(
    products: Products,
    hessian: Hessian,
    scale: Float[Tensor, "P"] | None,
    num_matvecs: int,
    generator: torch.Generator | None,
) -> dict[Matrix, Estimate]:
    """Tr(D A D) of all three from the same probes, D = diag(scale)."""
    samples: dict[Matrix, list[float]] = {part: [] for part in _HALVES}
    for probe in rademacher(hessian, num_matvecs, generator):
        vector = probe if scale is None else scale * probe
        for part, form in products.quadratic_forms(vector.unsqueeze(0), _HALVES).items():
            samples[part].append(form.item())
    return {part: summarise(values) for part, values in samples.items()}


def _average(
    products: Products,
    loss: float,
    scale: float | Float[Tensor, "P"],
    num_samples: int,
    generator: torch.Generator,
) -> Estimate:
    """E L(theta + scale n) - L(theta), n ~ N(0, I), from antithetic pairs."""
    layout = products.layout
    samples = []
    for _ in range(num_samples):
        noise = torch.randn(layout.size, generator=generator, device=generator.device, dtype=layout.dtype)
        step = scale * noise.to(layout.device)
        samples.append((products.loss_at(step) + products.loss_at(-step)) / 2 - loss)
    return replace(summarise(samples), num_matvecs=2 * num_samples)


def _check_measures(measures: Sequence[Measure] | None) -> tuple[str, ...]:
    every = get_args(Measure)
    if measures is None:
        return every
    chosen = (measures,) if isinstance(measures, str) else tuple(measures)
    unknown = [name for name in chosen if name not in every]
    if unknown or not chosen:
        raise TwofoldError(f"measures must be among {', '.join(every)}; {measures!r} came.")
    return chosen


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ± {estimate.stderr:.2g}"


_PLAIN: dict[type, Callable[[Any], Any]] = {
    Estimate: lambda e: {"value": e.value, "stderr": e.stderr, "num_matvecs": e.num_matvecs},
    Ascent: lambda a: {"rise": a.rise, "one_step": a.one_step, "num_gradients": a.num_gradients},
    Eigenpairs: lambda e: {
        "value": e.values[-1].item(),
        "residual": e.residuals[-1].item(),
        "converged": e.converged,
        "num_matvecs": e.num_matvecs,
    },
}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(of) for name, of in value.items()}
    return _PLAIN[type(value)](value) if type(value) in _PLAIN else value
