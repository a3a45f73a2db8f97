"""What every linear operator has, square or not: SciPy's words for products with vectors."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError


class LinearOperator(ABC):
    """A matrix [rows, columns] known by its products.

    Attributes:
        shape: (rows, columns).
        dtype: the vectors' dtype.
        device: where the vectors live.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    @abstractmethod
    def __matmul__(self, vectors: Any) -> Any:
        """Return the matrix times v: [columns], or [columns, K] for several at once."""

    @property
    @abstractmethod
    def T(self) -> "LinearOperator":  # noqa: N802 - SciPy's name
        """The transpose."""

    @abstractmethod
    def to_dense(self, *, chunk: int = 64) -> Tensor:
        """Return the whole matrix, `chunk` products at a time."""

    def __rmatmul__(self, vectors: Tensor) -> Tensor:
        """Return v times the matrix, v being [rows] or [K, rows]."""
        return (self.T @ vectors.T).T if isinstance(vectors, Tensor) and vectors.dim() == 2 else self.T @ vectors

    __array_ufunc__ = None  # NumPy's arrays leave array @ operator to the operator, which says what it takes

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the matrix times one v [columns]."""
        if isinstance(vector, Tensor) and vector.dim() != 1:
            raise TwofoldError(f"matvec takes a vector [{self.shape[1]}]; one of shape {tuple(vector.shape)} came.")
        return self @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the matrix times v [columns, K]."""
        if isinstance(vectors, Tensor) and vectors.dim() != 2:
            raise TwofoldError(f"matmat takes vectors [{self.shape[1]}, K]; shape {tuple(vectors.shape)} came.")
        return self @ vectors

    def rmatvec(self, vector: Tensor) -> Tensor:
        """Return the transpose times one u [rows]."""
        return self.T.matvec(vector)

    def rmatmat(self, vectors: Tensor) -> Tensor:
        """Return the transpose times u [rows, K]."""
        return self.T.matmat(vectors)

    def to_scipy(self) -> Any:
        """Return a scipy.sparse.linalg.LinearOperator that takes and gives NumPy arrays, in float32 at least.

        Raises:
            TwofoldError: SciPy is not installed; or, of a product, the array is complex.
        """
        try:
            import scipy.sparse.linalg
        except ImportError as error:
            raise TwofoldError("to_scipy needs SciPy: pip install scipy (or 'twofold[lab]').") from error
        dtype = torch.promote_types(self.dtype, torch.float32)  # NumPy has no bfloat16

        def times(operator: LinearOperator, array: Any) -> Any:
            if np.iscomplexobj(array):
                raise TwofoldError("The operator is real; a complex array came. Pass its real and imaginary parts.")
            vectors = torch.as_tensor(array, dtype=self.dtype, device=self.device)
            return (operator @ vectors).to("cpu", dtype).numpy()

        options: Any = {
            "matvec": lambda array: times(self, array.reshape(-1)),
            "rmatvec": lambda array: times(self.T, array.reshape(-1)),
            "matmat": lambda array: times(self, array),
            "rmatmat": lambda array: times(self.T, array),
            "dtype": torch.empty((), dtype=dtype).numpy().dtype,
        }
        return scipy.sparse.linalg.LinearOperator(self.shape, **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"
