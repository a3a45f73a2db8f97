"""The curvature matrices as linear operators over data, with SciPy's words: shape, matvec, @, T, to_dense, to_scipy."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.products import Products
from twofold.errors import TwofoldError
from twofold.parameters import ParameterLayout
from twofold.types import Forward, LossFn, Matrix, Mode, Params, Vectors, Weight


class SymmetricOperator(ABC):
    """A symmetric matrix [P, P] known by its products; sums and multiples of such are operators too.

    Attributes:
        shape: (P, P).
        dtype: the vectors' dtype.
        device: where the vectors live.
        layout: where each named parameter lies in a vector.
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self.layout = layout
        self.shape = (layout.size, layout.size)
        self.dtype = layout.dtype
        self.device = layout.device

    @abstractmethod
    def _rows(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """The matrix times K vectors given as rows [K, P]."""

    @abstractmethod
    def _block(self, names: Sequence[str]) -> "SymmetricOperator":
        """The diagonal block of these parameters of the layout."""

    def block(self, params: str | Sequence[str]) -> "SymmetricOperator":
        """Return the diagonal block of some parameters, [p, p], as an operator with a layout of its own.

        A product with a block of one of a model's matrices differentiates in these parameters alone: the later they
        come in the model, the cheaper it is. The block takes recordings of its own.

        Args:
            params: a name or glob pattern ("layer3.*") or several; tied names resolve.

        Raises:
            TwofoldError: a pattern matches none of the operator's parameters.

        Example:
            >>> model, batch = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(8, 3), torch.randn(8, 2))
            >>> hessian = twofold.Hessian(model, nn.MSELoss(), batch)
            >>> hessian.block("0.*").shape
            (16, 16)
            >>> list((hessian.block("*.bias") @ {"0.bias": torch.ones(4), "1.bias": torch.ones(2)}))
            ['0.bias', '1.bias']
        """
        return self._block(self.layout.choose(params))

    def matvec(self, vector: Tensor) -> Float[Tensor, "P"]:
        """Return the matrix times v [P]."""
        if vector.dim() != 1:
            raise TwofoldError(f"matvec takes a vector [{self.shape[0]}]; one of shape {tuple(vector.shape)} came.")
        return self @ vector

    def matmat(self, vectors: Tensor) -> Float[Tensor, "P K"]:
        """Return the matrix times v [P, K]."""
        if vectors.dim() != 2:
            raise TwofoldError(f"matmat takes vectors [{self.shape[0]}, K]; shape {tuple(vectors.shape)} came.")
        return self @ vectors

    @overload
    def __matmul__(self, vectors: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, vectors: Any) -> Any:
        """Return the matrix times v: [P], [P, K] or a mapping of named tensors, and the same kind back.

        Raises:
            TwofoldError: v has another shape or names, would lose precision, or is not finite.
        """
        return same_kind(self.layout, vectors, self._rows(rows_of(self.layout, vectors)))

    def __rmatmul__(self, vectors: Tensor) -> Tensor:
        """Return v times the matrix, v being [P] or [K, P]."""
        return (self @ vectors.T).T if isinstance(vectors, Tensor) and vectors.dim() == 2 else self @ vectors

    __array_ufunc__ = None  # NumPy's arrays leave array @ operator to the operator, which says what it takes

    @property
    def T(self) -> Self:  # noqa: N802 - SciPy's name
        """The transpose, which is the operator itself."""
        return self

    def to_dense(self, *, chunk: int = 64) -> Float[Tensor, "P P"]:
        """Return the whole matrix [P, P], `chunk` columns at a time; memory grows as P^2."""
        identity = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return torch.cat([self._rows(rows) for rows in identity.split(chunk)]).T

    def to_scipy(self) -> Any:
        """Return a scipy.sparse.linalg.LinearOperator that takes and gives NumPy arrays, in float32 at least."""
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise TwofoldError("to_scipy needs SciPy: pip install scipy (or 'twofold[lab]').") from error

        # NumPy has no bfloat16.
        dtype = torch.promote_types(self.dtype, torch.float32)

        def product(array: Any) -> Any:
            if np.iscomplexobj(array):
                raise TwofoldError("The operator is real; a complex array came. Pass its real and imaginary parts.")
            return (self @ torch.as_tensor(array, dtype=self.dtype, device=self.device)).to("cpu", dtype).numpy()

        def flat(array: Any) -> Any:
            return product(array.reshape(-1))

        options: Any = {"matvec": flat, "rmatvec": flat, "matmat": product, "rmatmat": product}
        options["dtype"] = torch.empty((), dtype=dtype).numpy().dtype
        return LinearOperator(self.shape, **options)

    def __add__(self, other: "SymmetricOperator") -> "SymmetricOperator":
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return _Combination([(1.0, self), (1.0, other)])

    def __sub__(self, other: "SymmetricOperator") -> "SymmetricOperator":
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return _Combination([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> "SymmetricOperator":
        if not isinstance(factor, int | float):
            return NotImplemented
        return _Combination([(float(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SymmetricOperator":
        return self * (1.0 / divisor) if isinstance(divisor, int | float) else NotImplemented

    def __radd__(self, other: object) -> "SymmetricOperator":
        """Let sum() start from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __neg__(self) -> "SymmetricOperator":
        return self * -1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


class _Combination(SymmetricOperator):
    """A weighted sum of operators of one shape."""

    def __init__(self, terms: Sequence[tuple[float, SymmetricOperator]]) -> None:
        first = terms[0][1]
        for _, operator in terms:
            if operator.layout.shapes != first.layout.shapes:
                raise TwofoldError(
                    f"Operators over different parameters cannot be added: {first.shape} and {operator.shape}."
                )
        super().__init__(first.layout)
        self._terms = list(terms)

    def _rows(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        return sum((factor * operator._rows(rows) for factor, operator in self._terms), torch.zeros_like(rows))

    def _block(self, names: Sequence[str]) -> SymmetricOperator:
        return _Combination([(factor, operator._block(names)) for factor, operator in self._terms])


class _CurvatureOperator(SymmetricOperator):
    part: ClassVar[Matrix]

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
        options = {"params": params, "forward": forward, "mode": mode, "memory": memory, "weight": weight}
        self._attach(Products(model, loss_fn, data, **options))

    @classmethod
    def of(cls, products: Products) -> Self:
        """Make the operator from products that it shares with others."""
        operator = cls.__new__(cls)
        operator._attach(products)
        return operator

    def _attach(self, products: Products) -> None:
        super().__init__(products.layout)
        self._products = products

    def _rows(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        return self._products.matmat(rows, (self.part,))[0]

    def _block(self, names: Sequence[str]) -> Self:
        return type(self).of(self._products.of(names))


class Hessian(_CurvatureOperator):
    """H = GN + NME, the second derivative of the loss in the parameters (2401.10809, eq. 2).

    A product costs the time of two gradients; arguments are those of `Curvature`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> hessian = Hessian(model, nn.CrossEntropyLoss(), (x, y))
        >>> (hessian @ torch.ones(8)).shape
        torch.Size([8])
    """

    part: ClassVar[Matrix] = "hessian"


class GaussNewton(_CurvatureOperator):
    """GN = mean_n J_n' H_z,n J_n, the Hessian of the loss of the linearised model; PSD for convex losses.

    A product costs the time of four thirds of a gradient; arguments are those of `Curvature`.
    """

    part: ClassVar[Matrix] = "gauss_newton"


class NME(_CurvatureOperator):
    """The nonlinear modeling error, mean_n sum_c (dl/dz_c)_n d2 z_c(x_n)/dtheta2: the model's own curvature.

    Computed as the Hessian-vector product of <stop_gradient(dl/dz), z(theta)>, never by subtraction; a product costs
    the time of two gradients; arguments are those of `Curvature`.
    """

    part: ClassVar[Matrix] = "nme"


class ActivationNME(_CurvatureOperator):
    """The part of the NME that carries phi'', the second derivatives of the elementwise activations h -> phi(h).

    The sum over activations of mean_n J_h' diag(dl/dphi(h) phi''(h)) J_h with J_h = dh/dtheta; NME minus it is the NME
    with phi'' = 0. Where twofold.second_derivative(f) holds, f takes the place of phi''. The phi'' of piecewise-linear
    activations is zero. A product costs the time of four thirds of a gradient; arguments are those of `Curvature`.

    Warns:
        TwofoldWarning: activations fused into LSTM, GRU, RNN or GLU kernels are not contained; it names them.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batch = (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> (ActivationNME(model, nn.CrossEntropyLoss(), batch) @ torch.ones(26)).count_nonzero()
        tensor(0)

    Source: arXiv 2401.10809, section 4.2.
    """

    part: ClassVar[Matrix] = "activation_nme"


def rows_of(layout: ParameterLayout, vectors: Vectors) -> Float[Tensor, "K P"]:
    """Check vectors of any accepted form and return them as rows [K, P]."""
    return layout.columns(vectors).T.contiguous()


def same_kind(layout: ParameterLayout, like: Vectors, rows: Float[Tensor, "K P"]) -> Any:
    """Return rows [K, P] in the form that `like` has: [P], [P, K] or a mapping of named tensors."""
    if isinstance(like, Tensor):
        return rows[0] if like.dim() == 1 else rows.T.contiguous()
    return layout.as_dict(rows[0])
