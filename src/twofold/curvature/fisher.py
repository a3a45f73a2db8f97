"""The Fisher matrices: Gauss-Newton matrices whose H_z is sampled, or taken from the labels."""

from collections.abc import Sequence
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.gathering import Gathering
from twofold.curvature.operators import SymmetricOperator
from twofold.curvature.probes import check_count, generator_for
from twofold.curvature.products import Products
from twofold.curvature.recording import Recording
from twofold.distributed import rank
from twofold.errors import TwofoldError
from twofold.types import Forward, LossFn, Mode, Params, ProcessGroup, Weight

FisherKind: TypeAlias = Literal["mc", "empirical"]

_APART = 2**40
"""How far apart the seeds of two ranks are: farther than any number of batches."""


class Fisher(SymmetricOperator):
    """F = sum_n w_n g_n g_n', g_n the gradient of term n's own loss l_n and w_n its weight in L = sum_n w_n l_n.

    A term is what the loss averages over (an example, a token, a pixel; for BCE and MSE an entry of the outputs; for a
    callable that is not torch's own, a row), so that w_n is 1/N, the class weight of its label over their sum, or 0
    where it is ignored; 1 where the loss is a sum.

    kind="mc": labels are drawn from the model's own predictive distribution, y^_n ~ p(y | z_n), `num_samples` times,
    and F is averaged over the draws. Its expectation is the Fisher matrix, which is GN for cross-entropy, BCE and MSE
    (whose p is a Gaussian of variance 1/2, so that -log p is the squared error).

    kind="empirical": the data's own labels take their place. It is what many optimisers call Fisher; as a measure of
    curvature it misleads (1905.12558): it grows with the squared residuals and vanishes where the data are fitted,
    whatever GN does, and tends to GN only where the model's probabilities are right and data are many.

    Products cost what those of GaussNewton cost.

    Args:
        model, loss_fn, data, params, forward, mode, memory, weight, microbatches, group: as in `Curvature`. Each rank
            draws the labels of its own shard.
        kind: "mc" or "empirical".
        num_samples: draws of labels for each term, for "mc".
        generator: gives, at construction, the seed of all labels; None takes a private one with a fixed seed. Products
            see the same random numbers each time, for every batch, also where the data are read anew.

    Raises:
        TwofoldError: an unknown kind; or, of a product, a loss whose predictive distribution is not known (for "mc").

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = nn.Linear(3, 2), torch.randn(64, 3), torch.randint(2, (64,))
        >>> gauss_newton = twofold.GaussNewton(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
        >>> fisher = Fisher(model, nn.CrossEntropyLoss(), (x, y), num_samples=100).to_dense()
        >>> bool((fisher - gauss_newton).norm() < 0.1 * gauss_newton.norm())
        True

    Source: Kunstner, Balles & Hennig 2019, 1905.12558; Martens 2020, 1412.1193.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        *,
        kind: FisherKind = "mc",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        params: Params = None,
        forward: Forward | None = None,
        mode: Mode = None,
        memory: int | None = None,
        weight: Weight | None = None,
        microbatches: int = 1,
        group: ProcessGroup = None,
    ) -> None:
        options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "memory": memory}
        options |= {"weight": weight, "microbatches": microbatches, "group": group}
        self._attach(Products(model, loss_fn, data, **options), kind, num_samples, generator)

    @classmethod
    def of(
        cls, products: Products, kind: FisherKind, num_samples: int = 1, generator: torch.Generator | None = None
    ) -> Self:
        """Make the operator from products that it shares with others."""
        operator = cls.__new__(cls)
        operator._attach(products, kind, num_samples, generator)
        return operator

    def _attach(
        self, products: Products, kind: FisherKind, num_samples: int, generator: torch.Generator | None
    ) -> None:
        if kind not in get_args(FisherKind):
            raise TwofoldError(f'kind must be "mc" or "empirical"; {kind!r} came.')
        check_count(num_samples, "num_samples")
        super().__init__(products.layout, products.group)
        self._products, self._kind, self._num_samples = products, kind, num_samples
        source = generator_for(self, generator)
        self._seed = int(torch.randint(2**62, (), generator=source, device=source.device))

    def _rows(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        def product(recording: Recording, v: list[Tensor]) -> list[tuple[str, Float[Tensor, "P"]]]:
            with Gathering(recording.parameters, self.layout) as gathering:
                return [("fisher", gathering.vector(self._product(recording, v)))]

        return self._products.averaged(rows, (), product, ["fisher"])["fisher"]

    def _block(self, names: Sequence[str]) -> Self:
        block = type(self).of(self._products.of(names), self._kind, self._num_samples)
        block._seed = self._seed
        return block

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._products.present_parameters()

    def _product(self, recording: Recording, vector: Sequence[Tensor]) -> list[Tensor]:
        """J' [mean over draws of r (r'J v)], r'Jv being taken within each term."""
        key = ("fisher", self._kind, self._num_samples, self._seed)
        draws = recording.once(key, lambda: self._residuals(recording))
        tangents, loss = recording.jvp(vector), self._products.loss
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tangents]
        curved = [torch.zeros_like(t) for t in wide]
        for r in draws:
            inner = loss.within_terms([a * t for a, t in zip(r, wide, strict=True)])
            for total, a, along in zip(curved, r, inner, strict=True):
                total.add_(a * along, alpha=1 / len(draws))
        return recording.vjp([total.to(t) for total, t in zip(curved, tangents, strict=True)])

    def _residuals(self, recording: Recording) -> list[list[Tensor]]:
        """sqrt(w_n) dl_n/dz for each draw, one tensor for each of the outputs."""
        loss, outputs, targets = self._products.loss, recording.detached, recording.targets
        if self._kind == "empirical":
            # dL/dz holds w_n dl_n/dz.
            pairs = zip(recording.output_gradient, loss.term_weights(outputs, targets), strict=True)
            return [[torch.where(w > 0, u / w.sqrt(), 0.0).to(u.dtype) for u, w in pairs]]
        generator = torch.Generator(self.device).manual_seed(self._seed + recording.index + _APART * rank(self.group))
        draws = range(self._num_samples)
        return [[loss.residual(outputs, targets, "labels", generator).detach()] for _ in draws]
