"""Curvature: the operators of one model and data set, sharing passes and probes."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.operators import NME, ActivationNME, GaussNewton, Hessian, rows_of, same_kind
from twofold.curvature.probes import check_count, cosine_of, rademacher, root_of, summarise
from twofold.curvature.products import Products
from twofold.errors import TwofoldError
from twofold.types import Estimate, Forward, InnerProduct, LossFn, Matrix, Mode, Params, Vectors, Weight

HALVES: tuple[Matrix, ...] = ("hessian", "gauss_newton", "nme")
MATRICES: tuple[Matrix, ...] = get_args(Matrix)


class Curvature:
    """Both halves of the Hessian of a loss over data, H = GN + NME (2401.10809, eq. 2).

    The loss is the average over the whole data set: ragged batches, ignore_index, class weights and reduction="sum" are
    exact. Measuring leaves the model as it was: parameters, buffers, .grad, modes, hooks and random states. Autocast is
    off while measuring.

    Args:
        model: any module; compiled and DDP wrappers are looked through.
        loss_fn: loss_fn(outputs, targets) -> scalar; torch's losses are recognised, any other callable counts as a mean
            over the outputs' first dimension unless `weight` says otherwise.
        data: a batch (inputs, targets), or a re-iterable of batches.
        params: names or glob patterns; None for all parameters that require a gradient.
        forward: forward(model, batch) -> (outputs, targets), for batches of another form.
        mode: "train", "eval", or None for the model as it is. Dropout masks are fixed for each batch at construction.
        memory: bytes for kept recordings of a set of several batches (1 GiB when None); one batch is always kept.
        weight: weight(outputs, targets) -> how many terms a batch's loss averages.

    Raises:
        TwofoldError: data of another form, a loss that is not scalar or not finite, unknown parameters, an operation
            without a second derivative.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
        >>> batch = (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> c = Curvature(model, nn.CrossEntropyLoss(), batch)
        >>> v = torch.randn(c.hessian.shape[0])
        >>> h, g, n = c.products(v)
        >>> torch.allclose(h, g + n)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        *,
        params: Params = None,
        forward: Forward | None = None,
        mode: Mode = None,
        memory: int | None = None,
        weight: Weight | None = None,
    ) -> None:
        self._products = Products(
            model, loss_fn, data, params=params, forward=forward, mode=mode, memory=memory, weight=weight
        )
        self.layout = self._products.layout

    @cached_property
    def hessian(self) -> Hessian:
        """H, the whole Hessian."""
        return Hessian.of(self._products)

    @cached_property
    def gauss_newton(self) -> GaussNewton:
        """GN, the Gauss-Newton matrix."""
        return GaussNewton.of(self._products)

    @cached_property
    def nme(self) -> NME:
        """NME, the nonlinear modeling error."""
        return NME.of(self._products)

    @cached_property
    def activation_nme(self) -> ActivationNME:
        """The part of the NME that carries phi'', the activations' second derivatives."""
        return ActivationNME.of(self._products)

    def products(self, vectors: Vectors, parts: Sequence[Matrix] = HALVES) -> tuple[Any, ...]:
        """Return the named matrices times v, sharing passes: H, GN and NME together cost 8/3 of a gradient.

        NME = activation NME + rest, where the first carries the activations' phi'' and the rest is the NME with
        phi'' = 0; with GN they cost 10/3 of a gradient.

        Args:
            vectors: [P], [P, K] or a mapping from parameter names to tensors.
            parts: which of "hessian", "gauss_newton", "nme", "activation_nme", "rest", in the order wanted.

        Returns:
            One result for each part, of the same kind as v.

        Raises:
            TwofoldError: an unknown part, or vectors of another form.
        """
        rows = self._products.matmat(rows_of(self.layout, vectors), _check_parts(parts))
        return tuple(same_kind(self.layout, vectors, part) for part in rows)

    def loss(self) -> float:
        """Return the loss of the whole set."""
        return self._products.loss_and_gradient()[0]

    def gradient(self) -> Float[Tensor, "P"]:
        """Return the gradient of the loss of the whole set, [P]."""
        return self._products.loss_and_gradient()[1]

    def traces(
        self,
        num_matvecs: int = 64,
        *,
        parts: Sequence[Matrix] = HALVES,
        generator: torch.Generator | None = None,
    ) -> dict[Matrix, Estimate]:
        """Estimate the traces of H, GN and NME from the same Rademacher probes, E v'Av.

        Args:
            num_matvecs: the number of probes.
            parts: which matrices.
            generator: source of the probes; None takes a private one with a fixed seed.

        Returns:
            {part: Estimate}; with common probes the estimates add up as the matrices do.
        """
        return self._sampled(
            lambda probe, product: torch.dot(probe.double(), product.double()), num_matvecs, parts, generator
        )

    def frobenius(
        self,
        num_matvecs: int = 64,
        *,
        parts: Sequence[Matrix] = HALVES,
        generator: torch.Generator | None = None,
    ) -> dict[Matrix, Estimate]:
        """Estimate the Frobenius norms of H, GN and NME from the same Rademacher probes, E ||Av||^2.

        Args and returns are those of `traces`.
        """
        squares = self._sampled(lambda probe, product: product.double().square().sum(), num_matvecs, parts, generator)
        return {part: root_of(square) for part, square in squares.items()}

    def inner(self, num_matvecs: int = 64, *, generator: torch.Generator | None = None) -> InnerProduct:
        """Estimate <GN, NME>_F = E (GN v)'(NME v) and its cosine from the same Rademacher probes.

        The cosine, <GN, NME>_F / (||GN||_F ||NME||_F), says whether the halves add up or cancel:
        ||H||_F^2 = ||GN||_F^2 + 2 <GN, NME>_F + ||NME||_F^2. Its error is that of the delta method.

        Args:
            num_matvecs: the number of probes.
            generator: source of the probes; None takes a private one with a fixed seed.

        Returns:
            InnerProduct(value, cosine), each an Estimate; the cosine is nan where a half is zero.
        """
        check_count(num_matvecs)
        dots, gauss_newton, nme = [], [], []
        for probe in rademacher(self.hessian, num_matvecs, generator):
            g, n = (rows[0].double() for rows in self._products.matmat(probe.unsqueeze(0), ("gauss_newton", "nme")))
            dots.append(torch.dot(g, n).item())
            gauss_newton.append(torch.dot(g, g).item())
            nme.append(torch.dot(n, n).item())
        return InnerProduct(summarise(dots), cosine_of(dots, gauss_newton, nme))

    def _sampled(
        self,
        statistic: Callable[[Tensor, Tensor], Tensor],
        num_matvecs: int,
        parts: Sequence[Matrix],
        generator: torch.Generator | None,
    ) -> dict[Matrix, Estimate]:
        check_count(num_matvecs)
        chosen = _check_parts(parts)
        samples: dict[Matrix, list[float]] = {part: [] for part in chosen}
        for probe in rademacher(self.hessian, num_matvecs, generator):
            rows = self._products.matmat(probe.unsqueeze(0), chosen)
            for part, row in zip(chosen, rows, strict=True):
                samples[part].append(statistic(probe, row[0]).item())
        return {part: summarise(values) for part, values in samples.items()}


def _check_parts(parts: Sequence[Matrix]) -> tuple[Matrix, ...]:
    parts = parts if isinstance(parts, str) else tuple(parts)
    unknown = [part for part in parts if part not in MATRICES]
    if isinstance(parts, str) or unknown or not parts:
        raise TwofoldError(f"parts must name matrices among {', '.join(MATRICES)}; {parts!r} came.")
    return tuple(parts)
