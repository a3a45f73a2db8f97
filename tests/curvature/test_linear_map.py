"""LinearMap: every kind of operator gives the same products, and what is none is refused."""

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import twofold
from twofold import TwofoldError
from twofold.curvature.linear_map import LinearMap


class Plain:
    """Only .shape and @, as a user writes it."""

    def __init__(self, matrix, **attributes):
        self.matrix, self.shape = matrix, tuple(matrix.shape)
        self.__dict__.update(attributes)

    def __matmul__(self, vectors):
        return self.matrix @ vectors


def kinds(A):
    return {
        "tensor": A,
        "requires_grad": A.clone().requires_grad_(),
        "sparse": A.to_sparse(),
        "array": A.numpy(),
        "scipy": aslinearoperator(A.numpy()),
        "scipy_function": LinearOperator(A.shape, matvec=lambda v: A.numpy() @ v),
        "scipy_sparse": scipy.sparse.csr_array(A.numpy()),
        "plain": Plain(A),
        "plain_numpy": Plain(A.numpy()),
        "numpy_dtype": Plain(A.numpy(), dtype=np.dtype("float64")),
        "torch_dtype": Plain(A, dtype=A.dtype, device=A.device),
        "map": LinearMap(A),
    }


@pytest.mark.parametrize("kind", kinds(torch.eye(2)))
def test_every_kind_of_operator(kind):
    A = torch.randn(7, 7, dtype=torch.float64)
    found = LinearMap(kinds(A)[kind])
    assert (found.shape, found.dtype, found.device) == ((7, 7), torch.float64, torch.device("cpu"))
    for vectors in (torch.randn(7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)):
        product = found @ vectors
        assert not product.requires_grad
        torch.testing.assert_close(product, A @ vectors)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operator_without_a_dtype_is_asked(dtype, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert LinearMap(Plain(torch.eye(3, dtype=dtype))).dtype == dtype
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool])
def test_tensors_of_low_precision_are_multiplied_exactly(dtype):
    A = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=dtype)
    found = LinearMap(A)
    assert found.dtype == (torch.float32 if dtype.is_floating_point else torch.float64)
    vector = torch.tensor([1 / 3, 1e-4, 7.0], dtype=found.dtype)
    assert torch.equal(found @ vector, A.to(found.dtype) @ vector)
    assert found.eps == torch.finfo(found.dtype).eps


def test_an_operator_of_half_precision_is_known_to_half_precision():
    A = torch.diag(torch.linspace(0, 1, 60)).bfloat16()
    operator = Plain(A, dtype=torch.bfloat16, device=A.device)
    assert LinearMap(operator).dtype == torch.float32
    assert LinearMap(operator).eps == torch.finfo(torch.bfloat16).eps
    found = twofold.eigsh(operator, 1)
    assert found.converged
    assert abs(found.values.item() - 1) <= found.residuals.item() < 0.4


@pytest.mark.parametrize(
    ("operator", "match"),
    [
        (torch.ones(3, 2), "Expected"),
        (torch.ones(3), "Expected"),
        (torch.ones(0, 0), "Expected"),
        ([[1.0]], "Expected"),
        (None, "Expected"),
        (torch.eye(3, dtype=torch.complex64), "real"),
        (np.eye(3) * 1j, "real"),
        (Plain(torch.eye(3, dtype=torch.bfloat16)), "no .dtype"),
    ],
)
def test_what_is_no_square_real_matrix_is_refused(operator, match):
    with pytest.raises(TwofoldError, match=match):
        LinearMap(operator)


def test_products_of_another_shape_or_not_finite_are_refused():
    short = Plain(torch.ones(2, 3), shape=(3, 3), dtype=torch.float32)
    with pytest.raises(TwofoldError, match=r"gave shape \(2,\)"):
        LinearMap(short) @ torch.ones(3)
    A = torch.eye(3)
    A[0, 1] = torch.nan
    for estimator in (twofold.trace, twofold.frobenius_norm, twofold.diagonal, twofold.eigsh, twofold.spectral_density):
        with pytest.raises(TwofoldError, match="not finite"):
            estimator(A, 2) if estimator is not twofold.spectral_density else estimator(A)
    large = LinearMap(torch.full((4, 4), 1e38)) @ torch.tensor([1.0, 1, -1, 1])  # the sum overflows, the entries do not
    assert torch.isfinite(large).all()
