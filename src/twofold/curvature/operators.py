"""The curvature matrices as linear operators over data, with SciPy's words: shape, matvec, @, T, to_dense, to_scipy."""

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar, Self, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.curvature.linear_operator import LinearOperator
from twofold.curvature.preconditioning import preconditioner
from twofold.curvature.products import Products
from twofold.errors import TwofoldError
from twofold.parameters import ParameterLayout
from twofold.types import Forward, LossFn, Matrix, Mode, Params, ProcessGroup, Vectors, Weight


class SymmetricOperator(LinearOperator):
    """A symmetric matrix [P, P] over parameters; sums, multiples and diagonal blocks of such are operators too.

    Attributes:
        layout: where each named parameter lies in a vector.
        group: the process group whose ranks take each product together; None where it is this process alone.
    """

    def __init__(self, layout: ParameterLayout, group: ProcessGroup = None) -> None:
        super().__init__((layout.size, layout.size), layout.dtype, layout.device)
        self.layout, self.group = layout, group

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

    @abstractmethod
    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the layout names, as they are now."""

    def preconditioned(self, by: torch.optim.Optimizer | Vectors) -> "Preconditioned":
        """Return P^-1/2 A P^-1/2 for a positive diagonal P: the curvature as an optimiser sees that divides by P.

        Its eigenvalues are those of P^-1 A; gradient steps of size eta divided by P are stable while eta times the
        largest is below 2. An eigenvector u stands for the direction P^-1/2 u of the parameters.

        Args:
            by: a torch optimiser after its first step: Adam, AdamW, NAdam, RMSprop, Adagrad or Adamax, P being what it
                divides by at this moment, bias correction, amsgrad and eps included; its parameters are matched by
                identity. Or P itself, as a vector [P] or by names.

        Raises:
            TwofoldError: another optimiser, a parameter that it does not hold or has not stepped, P not positive.

        Example:
            >>> model, batch = nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
            >>> optimizer = torch.optim.Adam(model.parameters())
            >>> nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
            >>> _ = optimizer.step()
            >>> hessian = twofold.Hessian(model, nn.MSELoss(), batch)
            >>> sharpness = twofold.eigsh(hessian.preconditioned(optimizer), k=1).values

        Source: Cohen et al. 2022, 2207.14484.
        """
        if isinstance(by, torch.optim.Optimizer):
            by = preconditioner(by, self._parameters())
        diagonal = rows_of(self.layout, by)
        if len(diagonal) != 1 or not (diagonal > 0).all():
            came = f"{len(diagonal)} vectors" if len(diagonal) != 1 else f"a smallest entry of {diagonal.min().item()}"
            raise TwofoldError(f"A preconditioner is one vector [{self.shape[0]}] of positive entries; {came} came.")
        return Preconditioned(self, diagonal[0].rsqrt())

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

    @property
    def T(self) -> Self:  # noqa: N802 - SciPy's name
        """The transpose, which is the operator itself."""
        return self

    def to_dense(self, *, chunk: int = 64) -> Float[Tensor, "P P"]:
        """Return the whole matrix [P, P], `chunk` columns at a time; memory grows as P^2."""
        identity = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return torch.cat([self._rows(rows) for rows in identity.split(chunk)]).T

    def __add__(self, other: "SymmetricOperator") -> "SymmetricOperator":
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return _Combination([(1.0, self), (1.0, other)])

    def __sub__(self, other: "SymmetricOperator") -> "SymmetricOperator":
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return _Combination([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> "SymmetricOperator":
        if not _is_number(factor):
            return NotImplemented
        return _Combination([(float(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SymmetricOperator":
        return self * (1.0 / divisor) if _is_number(divisor) else NotImplemented

    def __radd__(self, other: object) -> "SymmetricOperator":
        """Let sum() start from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __neg__(self) -> "SymmetricOperator":
        return self * -1.0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)


class _Combination(SymmetricOperator):
    """A weighted sum of operators of one shape."""

    def __init__(self, terms: Sequence[tuple[float, SymmetricOperator]]) -> None:
        first = terms[0][1]
        for _, operator in terms:
            if operator.layout.shapes != first.layout.shapes:
                raise TwofoldError(
                    f"Operators over different parameters cannot be added: {first.shape} and {operator.shape}."
                )
        super().__init__(first.layout, next((one.group for _, one in terms if one.group is not None), None))
        self._terms = list(terms)

    def _rows(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        return sum((factor * operator._rows(rows) for factor, operator in self._terms), torch.zeros_like(rows))

    def _block(self, names: Sequence[str]) -> SymmetricOperator:
        return _Combination([(factor, operator._block(names)) for factor, operator in self._terms])

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._terms[0][1]._parameters()


class Preconditioned(SymmetricOperator):
    """P^-1/2 A P^-1/2 for a diagonal P.

    Attributes:
        inverse_root: P^-1/2, [P].
    """

    def __init__(self, operator: SymmetricOperator, inverse_root: Float[Tensor, "P"]) -> None:
        super().__init__(operator.layout, operator.group)
        self._operator, self.inverse_root = operator, inverse_root

    def _rows(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        return self._operator._rows(rows * self.inverse_root) * self.inverse_root

    def _block(self, names: Sequence[str]) -> "Preconditioned":
        parts = self.layout.as_dict(self.inverse_root)
        return Preconditioned(self._operator._block(names), torch.cat([parts[name].reshape(-1) for name in names]))

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._operator._parameters()


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
        microbatches: int = 1,
        compile: bool = False,
        group: ProcessGroup = None,
    ) -> None:
        options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "memory": memory}
        options |= {"weight": weight, "microbatches": microbatches, "compile": compile, "group": group}
        self._attach(Products(model, loss_fn, data, **options))

    @classmethod
    def of(cls, products: Products) -> Self:
        """Make the operator from products that it shares with others."""
        operator = cls.__new__(cls)
        operator._attach(products)
        return operator

    def _attach(self, products: Products) -> None:
        super().__init__(products.layout, products.group)
        self._products = products

    def _rows(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        return self._products.matmat(rows, (self.part,))[0]

    def _block(self, names: Sequence[str]) -> Self:
        return type(self).of(self._products.of(names))

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._products.present_parameters()


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


class RestOfNME(_CurvatureOperator):
    """The NME without its activation part: the NME of the same model with phi'' = 0.

    A product costs the time of two gradients; arguments are those of `Curvature`.
    """

    part: ClassVar[Matrix] = "rest"


def rows_of(layout: ParameterLayout, vectors: Vectors) -> Float[Tensor, "K P"]:
    """Check vectors of any accepted form and return them as rows [K, P]."""
    return layout.columns(vectors).T.contiguous()


def same_kind(layout: ParameterLayout, like: Vectors, rows: Float[Tensor, "K P"]) -> Any:
    """Return rows [K, P] in the form that `like` has: [P], [P, K] or a mapping of named tensors."""
    if isinstance(like, Tensor):
        return rows[0] if like.dim() == 1 else rows.T.contiguous()
    return layout.as_dict(rows[0])
