"""eigsh: known spectra with their multiplicities, bounds that hold, and refusals."""

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from scipy.sparse.linalg import eigsh as scipy_eigsh

import twofold
from models import CASES
from twofold import TwofoldError, TwofoldWarning

SPECTRA = {
    "outliers_and_bulk": torch.cat([torch.tensor([20.0, 10, 5, 2, 1]), torch.linspace(0, 1e-3, 180)]),
    "one_and_fifty": torch.cat([torch.ones(199), torch.tensor([50.0])]),
    "half_and_half": torch.cat([torch.ones(100), torch.full((100,), 50.0)]),
    "identity": torch.ones(100),
    "zero": torch.zeros(100),
    "negative_end_larger": torch.cat([torch.linspace(-30, -10, 5), torch.linspace(-1, 1, 150), torch.tensor([12.0])]),
    "multiple": torch.cat([torch.tensor([9.0, 9, 9, 7, 7, -8, -8]), torch.linspace(-2, 2, 200)]),
    "twenty_copies": torch.cat([torch.full((20,), 3.0), torch.linspace(0, 1, 200)]),
    "low_rank": torch.cat([torch.linspace(-4, 6, 9), torch.zeros(191)]),
    "clustered_ends": torch.cat([10 - 1e-4 * torch.arange(8), -9 + 1e-4 * torch.arange(8), torch.linspace(-1, 1, 250)]),
    "geometric": 0.9 ** torch.arange(200),
    "large": 1e30 * torch.linspace(-1, 2, 80),
    "small": 1e-30 * torch.linspace(-1, 2, 80),
    "tiny": torch.tensor([3.0, 1, -2]),
}
ENDS = ["LA", "SA", "LM", "BE"]


def symmetric(values, dtype=torch.float64):
    """A dense matrix with this spectrum, in random directions."""
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    A = (Q * values.double()) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def expected(A, k, which):
    values = torch.linalg.eigvalsh(A.double())
    if which == "BE":
        chosen = torch.cat([values[: k // 2], values[len(values) - (k - k // 2) :]])
    else:
        key = {"LA": values, "SA": -values, "LM": values.abs()}[which]
        chosen = values[key.argsort(descending=True)[:k]]
    return chosen.sort().values


def check_pairs(A, found, which):
    """Values against LAPACK, orthonormal vectors, and residual bounds that hold."""
    A, k = A.double(), len(found.values)
    values, vectors = found.values.double(), found.vectors.double()
    scale = torch.linalg.matrix_norm(A, 2)
    precision = 1e-8 if found.values.dtype == torch.float64 else 1e-5
    assert found.converged
    truth, got = expected(A, k, which), values
    if which == "LM":  # of x and -x either will do
        truth, got = truth.abs().sort().values, got.abs().sort().values
    torch.testing.assert_close(got, truth, rtol=0, atol=precision * scale.item())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k).double(), rtol=0, atol=precision)
    residuals = torch.linalg.vector_norm(A @ vectors - vectors * values, dim=0)
    assert (residuals <= found.residuals).all()
    assert (found.residuals <= precision * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_known_spectra(spectrum, which, dtype):
    A = symmetric(SPECTRA[spectrum], dtype)
    for k, block_size in [(1, 1), (6, 1), (6, 3), (25, 1)]:
        found = twofold.eigsh(A, min(k, len(A)), which=which, block_size=block_size)
        assert found.values.dtype == found.vectors.dtype == dtype
        check_pairs(A, found, which)


def test_no_ghosts_and_no_lost_copies_in_a_long_run():
    values = torch.cat([torch.linspace(0, 1, 300), torch.tensor([1.02, 1.02, 1.03])])
    A = symmetric(values)
    found = twofold.eigsh(A, 8)
    assert found.num_matvecs > 60
    check_pairs(A, found, "LA")


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_every_eigenvalue_of_a_matrix(size):
    A = symmetric(torch.randn(size))
    found = twofold.eigsh(A, size)
    check_pairs(A, found, "LA")
    assert found.num_matvecs == 2 * size


@pytest.mark.parametrize("which", ENDS)
def test_agrees_with_scipy(which):
    A = symmetric(torch.randn(150))
    values, vectors = scipy_eigsh(A.numpy(), 5, which=which)
    found = twofold.eigsh(A, 5, which=which)
    np.testing.assert_allclose(found.values, np.sort(values), atol=1e-10)
    overlap = np.abs((found.vectors.numpy() * vectors[:, np.argsort(values)]).sum(0))
    np.testing.assert_allclose(overlap, 1, atol=1e-8)


@pytest.mark.parametrize("part", ["hessian", "gauss_newton", "nme"])
@pytest.mark.parametrize("case", ["mlp", "ragged"])
def test_matrices_of_a_model(case, part, float64):
    case = CASES[case]()
    operator = getattr(twofold.Curvature(case.model, case.loss_fn, case.batches), part)
    dense = operator.to_dense()
    for which in ENDS:
        check_pairs(dense, twofold.eigsh(operator, 4, which=which, basis_size=20), which)
    check_pairs(dense, twofold.eigsh(operator, 4, which="LM", block_size=2, basis_size=12), "LM")


SCALES = [(torch.float64, 1e-280), (torch.float64, 1e-200), (torch.float64, 1e200), (torch.float64, 1e300)]
SCALES += [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float32, 1e36)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
@pytest.mark.parametrize("options", [{}, {"block_size": 2}, {"basis_size": 12}, {"basis_size": 200}], ids=str)
def test_the_scale_of_a_matrix_does_not_matter(dtype, scale, options):
    A = symmetric(torch.cat([torch.tensor([20.0, 10, 5, 5, -7]), torch.linspace(0, 1e-3, 150)]))
    tol = 1e-8 if dtype == torch.float64 else 1e-5
    found = twofold.eigsh((A * scale).to(dtype), 5, which="LM", **options)
    assert found.converged
    np.testing.assert_allclose(found.values.double() / scale, [-7, 5, 5, 10, 20], atol=20 * tol)
    vectors, values = found.vectors.double(), found.values.double() / scale
    assert (vectors.T @ vectors - torch.eye(5)).abs().max() < 100 * torch.finfo(dtype).eps
    assert (torch.linalg.vector_norm(A @ vectors - vectors * values, dim=0) <= found.residuals.double() / scale).all()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e-310), (torch.float32, 1e-40)], ids=str)
def test_what_is_too_small_for_its_dtype_is_told(dtype, scale):
    A = symmetric(torch.cat([torch.tensor([20.0, 10, 5, 5, -7]), torch.linspace(0, 1e-3, 150)]))
    with pytest.warns(TwofoldWarning, match=f"too small for {dtype}"):
        found = twofold.eigsh((A * scale).to(dtype), 3)
    assert not found.converged
    assert ((found.values - torch.tensor([5.0, 10, 20]) * scale).abs() <= found.residuals).all()


def test_what_counts_as_an_operator():
    A = symmetric(torch.cat([torch.tensor([9.0, 4, -7]), torch.linspace(-1, 1, 97)]))
    only_vectors = LinearOperator(A.shape, matvec=lambda v: A.numpy() @ v, dtype=np.float64)
    for operator in (A, A.to_sparse(), A.numpy(), aslinearoperator(A.numpy()), scipy.sparse.csr_array(A.numpy())):
        check_pairs(A, twofold.eigsh(operator, 3, which="LM"), "LM")
        check_pairs(A, twofold.eigsh(operator, 3, which="LM", block_size=2), "LM")
    check_pairs(A, twofold.eigsh(only_vectors, 3, which="LM"), "LM")
    integers = torch.diag(torch.arange(-40, 60))
    assert twofold.eigsh(integers, 2).values.tolist() == pytest.approx([58, 59])
    assert twofold.eigsh(integers.numpy(), 2).values.tolist() == pytest.approx([58, 59])
    half = twofold.eigsh(torch.diag(torch.arange(-40.0, 60)).bfloat16(), 1, tol=1e-2)
    assert half.values.dtype == torch.float32
    assert half.values.item() == pytest.approx(59, rel=1e-2)
    single = twofold.eigsh(aslinearoperator(A.numpy().astype(np.float32)), 3)
    assert single.values.dtype == torch.float32


def test_a_warm_start_takes_fewer_products():
    A = symmetric(torch.randn(400))
    near = A + 1e-3 * symmetric(torch.randn(400))
    known = twofold.eigsh(A, 4)
    cold, warm = twofold.eigsh(near, 4), twofold.eigsh(near, 4, v0=known.vectors)
    check_pairs(near, warm, "LA")
    assert warm.num_matvecs < cold.num_matvecs
    top = twofold.eigsh(near, 1, v0=known.vectors[:, -1])
    assert top.num_matvecs < twofold.eigsh(near, 1).num_matvecs


def test_a_warm_start_from_the_wrong_vectors_is_no_trap():
    A = symmetric(torch.cat([torch.tensor([9.0, 8, 7, -9]), torch.linspace(-1, 1, 200)]))
    exact = torch.linalg.eigh(A).eigenvectors
    for start in (exact[:, :3], exact[:, -4:-1], exact[:, 50]):
        check_pairs(A, twofold.eigsh(A, 3, v0=start), "LA")
    doubled = torch.stack([exact[:, 5], exact[:, 5]], dim=1)
    check_pairs(A, twofold.eigsh(A, 3, v0=doubled, block_size=2), "LA")


def test_a_small_basis_restarts_often_and_still_finds_both_ends():
    A = symmetric(SPECTRA["negative_end_larger"])
    found = twofold.eigsh(A, 3, which="BE", basis_size=8)
    assert found.num_matvecs > 40
    check_pairs(A, found, "BE")


class Elementwise:
    """A diagonal matrix of any size, as a user's own operator."""

    def __init__(self, entries):
        self.entries, self.shape, self.dtype, self.device = entries, (len(entries),) * 2, entries.dtype, entries.device

    def __matmul__(self, vectors):
        return vectors if (self.entries == 1).all() else (vectors.T * self.entries).T


def test_an_operator_may_return_what_it_was_given():
    for block_size in (1, 2):
        found = twofold.eigsh(Elementwise(torch.ones(90)), 3, block_size=block_size)
        check_pairs(torch.eye(90), found, "LA")


class Reusing:
    """Gives the same memory each time."""

    def __init__(self, A):
        self.A, self.shape, self.dtype, self.device, self.memory = A, A.shape, A.dtype, A.device, {}

    def __matmul__(self, vectors):
        held = self.memory.setdefault(vectors.shape, torch.empty_like(vectors))
        return held.copy_(self.A @ vectors)


@pytest.mark.parametrize("options", [{}, {"block_size": 3}, {"basis_size": 100}, {"basis_size": 8}], ids=str)
def test_an_operator_may_give_the_same_memory_each_time(options):
    A = symmetric(torch.linspace(-2, 1, 60))
    found, expected = twofold.eigsh(Reusing(A), 3, **options), twofold.eigsh(A, 3, **options)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=1e-9)


def test_single_precision_holds_for_long_vectors():
    """torch sums float32 norms of long vectors to 1e-5 on the CPU: too coarse for unit vectors."""
    entries = torch.linspace(-1, 1, 300_000)
    entries[:3] = torch.tensor([4.0, 3.0, -5.0])
    u = torch.ones(300_000) / 300_000**0.5
    spread = Elementwise(entries)
    spread.__class__ = type(
        "Spread", (Elementwise,), {"__matmul__": lambda self, v: self.entries * v + 9 * u * (u @ v)}
    )
    found = twofold.eigsh(spread, 3, which="LM")
    assert found.converged
    vectors = found.vectors.double()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3).double(), rtol=0, atol=2e-6)
    exact = (entries.double()[:, None] * vectors) + 9 * u.double()[:, None] * (u.double() @ vectors)
    residuals = torch.linalg.vector_norm(exact - vectors * found.values.double(), dim=0)
    assert (residuals <= found.residuals).all()
    assert (residuals < 5e-5).all()


def test_a_small_matrix_takes_no_more_than_two_dense_solutions():
    A = symmetric(SPECTRA["geometric"].double())
    found = twofold.eigsh(A, 6, which="SA")
    check_pairs(A, found, "SA")
    assert found.num_matvecs == 2 * 200 + 6
    assert twofold.eigsh(A, 6, which="LA").num_matvecs < 200


def test_what_did_not_converge_says_so():
    A = symmetric(torch.linspace(0, 1, 500))
    with pytest.warns(TwofoldWarning, match="max_matvecs"):
        found = twofold.eigsh(A, 4, max_matvecs=30)
    assert not found.converged
    assert "not converged" in str(found)
    assert found.num_matvecs <= 30
    residuals = torch.linalg.vector_norm(A @ found.vectors - found.vectors * found.values, dim=0)
    assert (residuals <= found.residuals).all()
    truth = torch.linalg.eigvalsh(A)
    nearest = (found.values[:, None] - truth).abs().min(1).values
    assert (nearest <= found.residuals).all()


@pytest.mark.filterwarnings("ignore::twofold.TwofoldWarning")
@pytest.mark.parametrize("size", [7, 60])
@pytest.mark.parametrize("block_size", [1, 4, 7])
def test_the_budget_is_kept(size, block_size):
    least = 2 * 5 + block_size - 1
    for budget in range(least, least + 30):
        found = twofold.eigsh(symmetric(torch.randn(size)), 5, max_matvecs=budget, block_size=block_size)
        assert found.vectors.shape == (size, 5)
        assert found.num_matvecs <= budget


@pytest.mark.parametrize("size", [2, 10, 200])
def test_an_operator_that_is_not_symmetric_is_refused(size):
    with pytest.raises(TwofoldError, match="not symmetric"):
        twofold.eigsh(torch.randn(size, size), 1)
    almost = symmetric(torch.randn(size)) + 1e-2 * torch.randn(size, size).double()
    with pytest.raises(TwofoldError, match="not symmetric"):
        twofold.eigsh(almost, 1)


def test_products_that_are_not_finite_are_refused():
    for size in (5, 60):
        A = torch.eye(size)
        A[1, 1] = torch.nan
        with pytest.raises(TwofoldError, match="not finite"):
            twofold.eigsh(A, 2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"k": 61}, "k = 61"),
        ({"k": 0}, "k must"),
        ({"k": 2.0}, "k must"),
        ({"which": "SM"}, "which"),
        ({"tol": -1.0}, "tol"),
        ({"tol": float("nan")}, "tol"),
        ({"max_matvecs": 3}, "max_matvecs"),
        ({"block_size": 0}, "block_size"),
        ({"basis_size": 5}, "basis_size"),
        ({"v0": torch.ones(59)}, "v0"),
        ({"v0": torch.zeros(60)}, "v0"),
        ({"v0": torch.full((60, 2), torch.nan)}, "v0"),
    ],
)
def test_bad_arguments_are_refused(arguments, match):
    with pytest.raises(TwofoldError, match=match):
        twofold.eigsh(torch.eye(60), **arguments)


@pytest.mark.parametrize("operator", [torch.ones(3, 2), [[1.0]], torch.eye(3, dtype=torch.complex64)])
def test_bad_operators_are_refused(operator):
    with pytest.raises(TwofoldError, match="Expected"):
        twofold.eigsh(operator, 1)


def test_same_call_same_numbers_and_no_global_randomness():
    A = symmetric(torch.randn(80))
    before = torch.get_rng_state()
    first, second = twofold.eigsh(A, 3), twofold.eigsh(A, 3)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(5)
    check_pairs(A, twofold.eigsh(A, 3, generator=generator), "LA")


def test_pairs_read_well():
    pairs = twofold.Eigenpairs(torch.tensor([1.5, 20]), torch.eye(2), torch.tensor([1e-6, 2e-6]), True, 12)
    assert str(pairs) == "1.5 ± 1e-06, 20 ± 2e-06 (12 matvecs)"


@pytest.mark.parametrize("part", ["hessian", "gauss_newton", "nme", "activation_nme", "rest"])
def test_eigenvalues_are_told_by_halves(part, float64):
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    found = c.eigsh(3, which="BE", part=part)
    check_pairs(getattr(c, part).to_dense(), found, "BE")
    assert list(found.parts) == ["gauss_newton", "nme"]
    for half, forms in found.parts.items():
        dense = getattr(c, half).to_dense()
        torch.testing.assert_close(forms, torch.einsum("pk,pq,qk->k", found.vectors, dense, found.vectors))
    if part == "hessian":
        torch.testing.assert_close(found.parts["gauss_newton"] + found.parts["nme"], found.values)
    elif part == "gauss_newton":
        torch.testing.assert_close(found.parts["gauss_newton"], found.values, atol=1e-7, rtol=0)


def test_pairs_told_by_halves_read_well():
    parts = {"gauss_newton": torch.tensor([1.0, 19]), "nme": torch.tensor([0.5, 1])}
    pairs = twofold.Eigenpairs(torch.tensor([1.5, 20]), torch.eye(2), torch.tensor([1e-6, 2e-6]), False, 12, parts)
    assert str(pairs).splitlines() == [
        "1.5 ± 1e-06: gauss_newton 1, nme 0.5",
        "20 ± 2e-06 : gauss_newton 19, nme 1",
        "(12 matvecs, not converged)",
    ]


def test_only_matrices_have_eigenvalues_told_by_halves():
    case = CASES["mlp"]()
    with pytest.raises(TwofoldError, match="parts"):
        twofold.Curvature(case.model, case.loss_fn, case.batches).eigsh(1, part="hesian")
