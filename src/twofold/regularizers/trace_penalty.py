"""HessianTrace and GaussNewtonTrace: descend L + strength * tr C."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from twofold.curvature.jet_rules import NotCarriedError
from twofold.curvature.probes import signs
from twofold.errors import HALF_PRECISION, TwofoldError
from twofold.parameters import dot, half_precision_among, norm
from twofold.regularizers.base import Direction, Regularizer, check_choice, check_count, check_strength, plain
from twofold.regularizers.gradients import Gradients, add_scaled, unscaled
from twofold.regularizers.passes import Passes
from twofold.regularizers.piecewise_linear import warn_if_piecewise_linear
from twofold.regularizers.ranks import Ranks
from twofold.regularizers.recorded import Recorded


@dataclass(kw_only=True, eq=False)
class HessianTrace(Regularizer):
    """Penalise the trace of the Hessian: L + strength tr H, tr H = E v'Hv over Rademacher probes v.

    Hands on g + strength grad(v'Hv). method="exact" differentiates an order-2 jet, v'Hv = z1'H_z z1 + <dl/dz, z2> with
    z(theta + e v) = z0 + e z1 + e^2/2 z2, once in reverse (3.5 to 5.5 gradients); for a model with an operation that
    jets do not know, the loss three times in reverse (6 to 10 gradients), as exactly. method="difference" takes
    grad(v'Hv) ~ (grad L(theta + h v) + grad L(theta - h v) - 2 g) / h^2 (3 gradients), which also sees the kinks of
    ReLU. tr H is not bounded from below: at larger strength the NME runs to negative values (Dauphin et al. 2024, arXiv
    2401.10809, Section 5).

    Args:
        strength: factor of the trace; 0 gives the plain gradient. Start at 1e-4.
        num_probes: how many probes are averaged.
        method: "exact" or "difference".
        params: the trace is that of these parameters' block of H; all parameters descend its gradient.
        interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: an argument is out of range, or the model has an operation without a second derivative.

    Example:
        >>> HessianTrace(strength=1e-3)
        HessianTrace(strength=0.001, num_probes=1, method='exact')
    """

    linear: ClassVar[bool] = True
    strength: float
    num_probes: int = 1
    method: Literal["exact", "difference"] = "exact"
    _looked: bool = field(default=False, init=False, repr=False)
    _carried: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("strength", self.strength)
        check_count("num_probes", self.num_probes)
        check_choice("method", self.method, ("exact", "difference"))

    def direction(self, passes: Passes) -> Direction:
        """Return g plus the gradient of the penalty."""
        if self.strength == 0:
            return plain(passes)
        generator = passes.noise_generator()
        probes = [[_signs(weight, generator) for weight in passes.chosen] for _ in range(self.num_probes)]
        if self.method == "difference":
            return self._difference(passes, probes)
        if self._carried:
            try:
                return self._by_jets(passes, probes)
            except NotCarriedError:
                self._carried = False
        return self._by_reverse(passes, probes)

    def _by_jets(self, passes: Passes, probes: list[list[Tensor]]) -> Direction:
        """Order-2 jets of theta + e v on a graph, and one reverse pass through them."""
        factor = self.strength / len(probes)
        first = passes.jets(probes[0])
        self._warn_of_kinks([jet.z0 for jet in first.jets])
        trace, total = first.gradients(factor, with_loss=True)
        for probe in probes[1:]:
            value, change = passes.jets(probe).gradients(factor, with_loss=False)
            trace = trace + value
            total = [
                known if new is None else add_scaled(known, new, 1.0) for known, new in zip(total, change, strict=True)
            ]
        trace = trace / len(probes)
        return Direction(first.loss, total, {"trace": trace, "penalty": self.strength * trace})

    def _warn_of_kinks(self, outputs: Sequence[Tensor]) -> None:
        if not self._looked:
            self._looked = True
            warn_if_piecewise_linear(outputs, "A penalty on the trace of the Hessian", 'method="difference"')

    def _by_reverse(self, passes: Passes, probes: list[list[Tensor]]) -> Direction:
        """Three times reverse, for what jets do not know."""
        graph = passes.loss_graph()
        self._warn_of_kinks([graph.scaled])
        with graph.differentiating():
            slopes = torch.autograd.grad(graph.scaled, passes.parameters, create_graph=True, allow_unused=True)
            total: Gradients = [None if slope is None else slope.detach() for slope in slopes]
            curved = passes.of_chosen(list(slopes))
            trace, factor = 0.0, self.strength / len(probes)
            for probe in probes:
                value = _quadratic_form(curved, passes.chosen, probe)
                trace = trace + value.detach() / graph.scale / len(probes)
                if value.requires_grad:
                    change = torch.autograd.grad(value, passes.parameters, retain_graph=True, allow_unused=True)
                    total = [add_scaled(a, b, factor) for a, b in zip(total, change, strict=True)]
        found = {"trace": trace, "penalty": self.strength * trace}
        return Direction(graph.loss, unscaled(total, graph.scale), found)

    def _difference(self, passes: Passes, probes: list[list[Tensor]]) -> Direction:
        _refuse_half_precision(passes.chosen)
        loss, gradients = passes.gradient()
        step = _step(passes.chosen)
        total, trace = list(gradients), 0.0
        for probe in probes:
            moved = [passes.gradient(probe, sign * step) for sign in (1.0, -1.0)]
            trace = trace + (moved[0][0] + moved[1][0] - 2 * loss) / step**2 / len(probes)
            factor = self.strength / step**2 / len(probes)
            bends = map(_second_difference, moved[0][1], gradients, moved[1][1])
            total = [add_scaled(known, bend, factor) for known, bend in zip(total, bends, strict=True)]
        found = {"gradient_norm": norm(passes.of_chosen(gradients)), "trace": trace, "penalty": self.strength * trace}
        return Direction(loss, total, found)


@dataclass(kw_only=True, eq=False)
class GaussNewtonTrace(Regularizer):
    """Penalise the trace of the Gauss-Newton matrix: L + strength tr GN.

    With one label y^_n ~ p(z_n) drawn for each term and w_n the loss's own weight of term n,

        r_n = sqrt(w_n) (p_n - onehot(y^_n)),    E ||sum_n J_n' r_n||^2 = tr GN,

    so one backward pass gives an unbiased estimate and one more its gradient; the loss is never called on drawn labels.
    (2401.10809, eq. 4 and 5, has it per example; for a batch the square of the mean gradient alone would be short of a
    factor B.) Costs 3 gradients.

    Args:
        strength: factor of the trace; 0 gives the plain gradient. Start at 1e-3.
        num_samples: how many draws are averaged.
        through: "jacobian" holds r fixed while the penalty is differentiated, as the paper does, which gives the
            gradient of tr J' sg(H_z) J; "full" gives that of tr GN itself, by r = H_z^(1/2) xi with Gaussian xi.
        estimator: "labels" as above, for torch's cross-entropy, BCE-with-logits and MSE; "hutchinson" takes
            v'GNv = (J v)' H_z (J v) with Rademacher v, for any loss.
        params: the trace is that of these parameters' block of GN; all parameters descend its gradient.
        interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: an argument is out of range, the model has an operation without a second derivative, or the loss
            has no known predictive distribution to draw labels from.

    Example:
        >>> GaussNewtonTrace(strength=1e-3)
        GaussNewtonTrace(strength=0.001, num_samples=1, through='jacobian', estimator='labels')
    """

    linear: ClassVar[bool] = True
    strength: float
    num_samples: int = 1
    through: Literal["jacobian", "full"] = "jacobian"
    estimator: Literal["labels", "hutchinson"] = "labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("strength", self.strength)
        check_count("num_samples", self.num_samples)
        check_choice("through", self.through, ("jacobian", "full"))
        check_choice("estimator", self.estimator, ("labels", "hutchinson"))

    @property
    def splits_hessian(self) -> bool:
        """It penalises GN alone."""
        return True

    def direction(self, passes: Passes) -> Direction:
        """Return g plus the gradient of the penalty, from one backward pass."""
        if self.strength == 0:
            return plain(passes)
        generator = passes.noise_generator(of_terms=self.estimator == "labels")
        recorded = passes.recorded()
        if not passes.everywhere(torch.isfinite(recorded.loss)):
            return Direction(recorded.loss, recorded.gradients, {})
        sample = partial(self._by_labels, passes.ranks) if self.estimator == "labels" else self._by_probe
        heads, cotangents, trace = [], [], 0.0
        factor = self.strength / self.num_samples * recorded.scale
        at_outputs: list[Tensor] | None = None
        for _ in range(self.num_samples):
            drawn = sample(recorded, factor, generator)
            heads += drawn.heads
            cotangents += drawn.cotangents
            if drawn.at_outputs is not None:
                more = drawn.at_outputs
                at_outputs = more if at_outputs is None else [a + b for a, b in zip(at_outputs, more, strict=True)]
            trace = trace + drawn.value / self.num_samples
        gradients = recorded.gradients_with(heads, cotangents, at_outputs)
        return Direction(recorded.loss, gradients, {"trace": trace, "penalty": self.strength * trace})

    def _by_labels(self, ranks: Ranks, recorded: Recorded, factor: float, generator: torch.Generator) -> "_Sample":
        """With R = sqrt(2 factor) r, factor ||J'r||^2 = ||J'R||^2 / 2, whose gradient is that of <J'R, sg(J'R)>."""
        kind = "labels" if self.through == "jacobian" else "gaussian"
        with recorded.autocast.off():
            residual = recorded.loss_view.residual(recorded.outputs, recorded.targets, kind, generator)
        residual = math.sqrt(2 * factor) * (residual.detach() if self.through == "jacobian" else residual)
        slope = recorded.vjp([residual])
        fixed, size = [one.detach() for one in slope], 1
        if ranks.alike:
            # With the mean over R ranks as the loss, s = sum_r s_r / sqrt(R), and each rank's part of the gradient of
            # ||s||^2 / 2, before that mean is taken, is that of <s_r, sg(sum_r s_r)>.
            fixed, size = ranks.total(fixed), ranks.size
        return _Sample(dot(fixed, fixed) / (2 * factor * size), slope, fixed, None)

    def _by_probe(self, recorded: Recorded, factor: float, generator: torch.Generator) -> "_Sample":
        """v'GNv = t'H_z t with t = J v; its gradient at fixed H_z is that of 2 <u, J v> with u = H_z t held fixed."""
        probe = [_signs(weight, generator) for weight in recorded.recording.parameters]
        tangent = recorded.jvp(probe)
        curved = recorded.output_hessian(tangent)
        third = recorded.output_third(tangent) if self.through == "full" else None
        at_outputs = None if third is None else [factor * one for one in third]
        heads = recorded.vjp([2 * factor * one for one in curved])
        return _Sample(dot(tangent, curved), heads, probe, at_outputs)


@dataclass(frozen=True)
class _Sample:
    """One draw of tr GN, and the heads whose products with fixed cotangents have factor times its gradient."""

    value: Tensor
    heads: list[Tensor]
    cotangents: list[Tensor]
    at_outputs: list[Tensor] | None


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A Rademacher probe of a weight's shape."""
    return signs(weight.numel(), generator).view(weight.shape).to(weight.device, weight.dtype)


def _quadratic_form(slopes: Sequence[Tensor], weights: Sequence[Tensor], probe: Sequence[Tensor]) -> Tensor:
    """Return v'Hv with a graph of its own, given the gradient with its graph."""
    pairs = [(slope, v) for slope, v in zip(slopes, probe, strict=True) if slope.requires_grad]
    if not pairs:
        return torch.zeros((), dtype=slopes[0].dtype, device=slopes[0].device)
    curved, v = zip(*pairs, strict=True)
    products = torch.autograd.grad(curved, weights, v, create_graph=True, materialize_grads=True)
    return torch.stack([(product * one).sum() for product, one in zip(products, probe, strict=True)]).sum()


def _second_difference(up: Tensor | None, here: Tensor | None, down: Tensor | None) -> Tensor | None:
    return None if up is None or here is None or down is None else (up - here) + (down - here)


def _refuse_half_precision(weights: Sequence[Tensor]) -> None:
    autocast = any(torch.is_autocast_enabled(weight.device.type) for weight in weights)
    dtype = "autocast" if autocast else half_precision_among(weights)
    if dtype is not None:
        what, remedy = "method='difference' cannot be taken", "Use method='exact', or float32 outside of autocast."
        raise TwofoldError(HALF_PRECISION.format(what=what, dtype=dtype, remedy=remedy))


def _step(weights: Sequence[Tensor]) -> float:
    """The step of a second difference: eps^(1/4) of the weights' root mean square, which balances both its errors."""
    count = sum(weight.numel() for weight in weights)
    size = float(norm([weight.detach() for weight in weights])) / math.sqrt(count)
    eps = max(torch.finfo(weight.dtype).eps for weight in weights)
    return eps**0.25 * (size or 1.0)
