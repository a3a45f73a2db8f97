"""Anything square with .shape and @, whatever library it speaks, as a map from torch vectors to torch vectors."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twofold.errors import NotFiniteError, TwofoldError


class LinearMap:
    """A [P, P] behind one interface: vectors [P] or [P, K] in, checked products of the same shape, dtype, device out.

    It takes tensors (integers and half precision are converted once), NumPy arrays, SciPy operators and sparse
    matrices, and any object with .shape and @ over torch tensors or NumPy arrays.

    Attributes:
        shape: (P, P).
        dtype: of the vectors: the operator's own, in float32 at least; float64 for integers.
        device: of the vectors: the operator's own, or the CPU.
        eps: the relative precision of a product: that of the operator's dtype if it computes in half precision.
        underflow: by how much, in norm, a product may be wrong through numbers too small for its dtype.
        name: the operator's class, for messages.
        group: the process group whose ranks take each product together, if the operator has one.

    Raises:
        TwofoldError: it is not square or not real; a product has another shape.
        NotFiniteError: a product is not finite.
    """

    def __init__(self, operator: Any) -> None:
        shape = tuple(getattr(operator, "shape", ()))
        self.name = type(operator).__name__
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0] or not hasattr(operator, "__matmul__"):
            raise TwofoldError(f"Expected an operator with .shape (P, P) and @; {self.name} has shape {shape}.")
        self.shape: tuple[int, int] = (int(shape[0]), int(shape[1]))
        device = getattr(operator, "device", None)
        # NumPy arrays have had a .device, which is a string, since 2.0.
        self.device = device if isinstance(device, torch.device) else torch.device("cpu")
        own = getattr(operator, "dtype", None)
        if not isinstance(own, torch.dtype | np.dtype):
            own = _probed(operator, self.shape[0], self.device)
        if (isinstance(own, torch.dtype) and own.is_complex) or (isinstance(own, np.dtype) and own.kind == "c"):
            raise TwofoldError(f"Expected a real operator; {self.name} has dtype {own}.")
        self._speaks_numpy = isinstance(own, np.dtype)
        taken = _torch_dtype(own)
        self.dtype = torch.promote_types(taken, torch.float32)
        if isinstance(operator, Tensor):
            operator = operator.detach().to(self.dtype)
            taken = self.dtype
        self._taken = taken
        self._operator = operator
        limits = torch.finfo(taken)
        self.eps = limits.eps
        # Kernels may flush what is below the normal numbers to zero; those of half precision add up in float32.
        self.underflow = math.sqrt(self.shape[0]) * limits.tiny * (limits.eps if limits.bits < 32 else 1.0)
        self.group = getattr(operator, "group", None)

    def __matmul__(self, vectors: Float[Tensor, "P *K"]) -> Float[Tensor, "P *K"]:
        """A times v."""
        if self._speaks_numpy:
            product = torch.as_tensor(np.asarray(self._operator @ vectors.cpu().numpy()))
        else:
            product = self._operator @ vectors.to(self._taken)
        if product.shape != vectors.shape:
            raise TwofoldError(
                f"{self.name} @ [{', '.join(map(str, vectors.shape))}] gave shape {tuple(product.shape)}; "
                "a product must have the shape of the vectors."
            )
        product = product.detach().to(self.device, self.dtype)
        # A finite sum proves finite entries and is much cheaper to take; a sum may also overflow.
        if not torch.isfinite(product.sum()) and not torch.isfinite(product).all():
            raise NotFiniteError(
                f"{self.name} @ v is not finite for a finite v: it holds NaN or infinity, or overflows {self._taken}. "
                "Look for diverged parameters or NaN in the data, or measure in float64."
            )
        return product


def _torch_dtype(own: torch.dtype | np.dtype) -> torch.dtype:
    """The dtype of the vectors that an operator takes: its own; float64 where that is of integers or unknown to torch.

    NumPy's products of half precision are slow, and it has no bfloat16: those take float32.
    """
    if isinstance(own, np.dtype):
        return torch.float32 if own.kind == "f" and own.itemsize <= 4 else torch.float64
    return own if own.is_floating_point else torch.float64


def _probed(operator: Any, size: int, device: torch.device) -> torch.dtype | np.dtype:
    """The dtype of an operator that does not tell: that of the first kind of zero vector that it takes."""
    dtypes = {torch.get_default_dtype(): None, torch.float32: None, torch.float64: None}
    attempts = [torch.zeros(size, dtype=dtype, device=device) for dtype in dtypes]
    errors = []
    for vector in [*attempts, np.zeros(size)]:
        try:
            product = operator @ vector
        except Exception as error:  # whatever an operator raises on vectors of a kind that it does not know
            errors.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
            continue
        if isinstance(product, Tensor | np.ndarray) and isinstance(product, Tensor) == isinstance(vector, Tensor):
            return product.dtype if isinstance(product, np.ndarray) else vector.dtype
        errors.append(f"it returned {type(product).__name__}")
    raise TwofoldError(
        f"{type(operator).__name__} has no .dtype, and A @ v worked neither with a torch tensor nor with a NumPy array "
        f"v [{size}] on {device}; tried in turn: {'; '.join(errors)}. Give it .dtype and .device, as torch names them."
    )
