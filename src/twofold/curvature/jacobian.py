"""The Jacobian of a model's outputs in its parameters, over a whole data set."""

from collections.abc import Iterator
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.linear_operator import LinearOperator
from twofold.curvature.operators import rows_of
from twofold.curvature.products import Products
from twofold.curvature.recording import Recording
from twofold.parameters import check_columns
from twofold.types import Forward, LossFn, Mode, Params, ProcessGroup, Vectors, Weight


class Jacobian(LinearOperator):
    """J = dz/dtheta [M, P], M being the number of outputs over all batches.

    z is what the model returns: every floating-point tensor flattened, in order, batch after batch (piece after piece
    with microbatches). So J v says how all outputs move with the parameters, and J'u is the gradient of u'z. Under a
    group its rows are those of this rank's shard, and so are its products. The loss plays no part in it. Each product
    costs about two thirds of a gradient. Making the operator reads the data once, to count the outputs; arguments are
    those of `Curvature`.

    Attributes:
        layout: where each named parameter lies in a vector [P].

    Example:
        >>> model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> jacobian = Jacobian(model, nn.CrossEntropyLoss(), (x, y))
        >>> jacobian
        Jacobian(shape=(16, 8), dtype=torch.float32, device=cpu)
        >>> v = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
        >>> torch.allclose((jacobian @ v).view(8, 2), x @ v["weight"].T)
        True
        >>> jacobian.layout.as_dict(jacobian.T @ torch.ones(16))["bias"]
        tensor([8., 8.])
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
        microbatches: int = 1,
        group: ProcessGroup = None,
    ) -> None:
        options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "memory": memory}
        options |= {"weight": weight, "microbatches": microbatches, "group": group}
        self._attach(Products(model, loss_fn, data, **options))

    @classmethod
    def of(cls, products: Products) -> Self:
        """Make the operator from products that it shares with others."""
        operator = cls.__new__(cls)
        operator._attach(products)
        return operator

    def _attach(self, products: Products) -> None:
        self._products, self.layout = products, products.layout
        self._sizes = products.each(lambda recording: sum(z.numel() for z in recording.outputs))
        super().__init__((sum(self._sizes), self.layout.size), self.layout.dtype, self.layout.device)

    def __matmul__(self, vectors: Vectors) -> Tensor:
        """Return J v: [M] for v [P] or a mapping of named tensors, [M, K] for [P, K].

        Raises:
            TwofoldError: v has another shape or names, would lose precision, or is not finite.
        """
        rows = rows_of(self.layout, vectors)
        found = self._products.each(
            lambda recording: torch.stack([self._flat(recording.jvp(self.layout.unflatten(row))) for row in rows])
        )
        columns = torch.cat(found, 1).T.contiguous()
        return columns if isinstance(vectors, Tensor) and vectors.dim() == 2 else columns[:, 0]

    @property
    def T(self) -> "TransposedJacobian":  # noqa: N802 - SciPy's name
        """J', [P, M]."""
        return TransposedJacobian(self)

    def transposed_rows(self, rows: Float[Tensor, "K M"]) -> Float[Tensor, "K P"]:
        """Return J'u for K vectors u given as rows."""
        of_batches: Iterator[Tensor] = iter(rows.split(self._sizes, 1))
        total = rows.new_zeros(len(rows), self.shape[1])

        def add(recording: Recording) -> None:
            for k, row in enumerate(next(of_batches)):
                total[k] += self.layout.flatten(recording.vjp(_like_outputs(recording, row)))

        self._products.each(add)
        return total

    def to_dense(self, *, chunk: int = 64) -> Float[Tensor, "M P"]:
        """Return the whole matrix, `chunk` rows (or columns, where these are fewer) at a time."""
        if self.shape[0] > self.shape[1]:
            identity = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
            return torch.cat([self @ columns for columns in identity.split(chunk, 1)], 1)
        identity = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return torch.cat([self.transposed_rows(rows) for rows in identity.split(chunk)])

    def _flat(self, outputs: list[Tensor]) -> Float[Tensor, "m"]:
        return torch.cat([z.reshape(-1).to(self.device, self.dtype) for z in outputs])


class TransposedJacobian(LinearOperator):
    """J' [P, M]."""

    def __init__(self, jacobian: Jacobian) -> None:
        super().__init__((jacobian.shape[1], jacobian.shape[0]), jacobian.dtype, jacobian.device)
        self._jacobian = jacobian

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return J'u: [P] for u [M], [P, K] for [M, K]; `jacobian.layout.as_dict` names its parts.

        Raises:
            TwofoldError: u has another shape, would lose precision, or is not finite.
        """
        columns = check_columns(vectors, self.shape[1], self.dtype, self.device, name="u")
        found = self._jacobian.transposed_rows(columns.T).T
        return found.contiguous() if vectors.dim() == 2 else found[:, 0]

    @property
    def T(self) -> Jacobian:  # noqa: N802 - SciPy's name
        """J, [M, P]."""
        return self._jacobian

    def to_dense(self, *, chunk: int = 64) -> Float[Tensor, "P M"]:
        """Return the whole matrix."""
        return self._jacobian.to_dense(chunk=chunk).T


def _like_outputs(recording: Recording, vector: Float[Tensor, "m"]) -> list[Tensor]:
    parts = vector.split([z.numel() for z in recording.outputs])
    return [part.view(z.shape).to(z) for part, z in zip(parts, recording.outputs, strict=True)]
