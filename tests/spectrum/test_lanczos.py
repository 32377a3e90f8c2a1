"""Eigenpairs against dense eigendecompositions and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg as linalg
import torch

from curvops import Checkpoint, TensorSpace
from curvops.spectrum.lanczos import eigenpairs
from curvops.spectrum.pairs import EigenPairs

SPECTRA = {
    "decaying": torch.logspace(2, -4, 90),
    "indefinite": torch.linspace(-3, 2, 90),
    "clustered": torch.cat([torch.linspace(0, 1, 80), 5 + 1e-4 * torch.arange(10)]),
    "few values": torch.cat([torch.ones(50), 2 * torch.ones(30), 7 * torch.ones(10)]),
    "low rank": torch.cat([torch.zeros(86), torch.tensor([-2.0, 1.0, 3.0, 4.0])]),
    "zero": torch.zeros(90),
    "identity": torch.ones(90),
    "one": torch.tensor([2.0]),
    "three": torch.tensor([-1.0, 2.0, 2.0]),
    "five": torch.arange(5.0),
}
ENDS = {
    "largest": lambda values, k: values[-k:],
    "smallest": lambda values, k: values[:k],
    "both": lambda values, k: values if 2 * k >= len(values) else torch.cat([values[:k], values[-k:]]),
    "magnitude": lambda values, k: values[values.abs().argsort(descending=True)[:k]].sort().values,
}


def symmetric(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    matrix = basis * values @ basis.T
    return ((matrix + matrix.T) / 2).contiguous()


def checked(matrix, pairs, expected, atol=1e-10):
    """Values, orthonormality and residuals, all with products that are not ours."""
    values, vectors = pairs
    scale = max(1.0, float(expected.abs().max()))
    assert pairs.converged and pairs.reason == "converged", pairs.reason
    torch.testing.assert_close(values, expected, rtol=0, atol=atol * scale)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=vectors.dtype), rtol=0, atol=1e-12)
    residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    torch.testing.assert_close(residuals, pairs.residuals, rtol=1e-5, atol=1e-13 * scale * len(matrix))


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", SPECTRA)
def test_dense_eigenvalues(name, which):
    matrix = symmetric(SPECTRA[name])
    exact = torch.linalg.eigvalsh(matrix)
    for k in {1, min(4, len(matrix)), min(5, len(matrix))}:
        expected = ENDS[which](exact, k)
        checked(matrix, eigenpairs(matrix, k, which, tolerance=1e-9), expected)


@pytest.mark.parametrize("subspace", [14, 20, 40])
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("which", ENDS)
def test_restarts_and_blocks(which, block, subspace):
    matrix = symmetric(torch.linspace(-1, 1.1, 200).pow(3))
    expected = ENDS[which](torch.linalg.eigvalsh(matrix), 3)
    pairs = eigenpairs(matrix, 3, which, block=block, subspace=subspace, tolerance=1e-9, max_products=3000)
    assert pairs.products > subspace
    checked(matrix, pairs, expected)


@pytest.mark.parametrize("k", [3, 9, 20, 29, 30])
def test_many_pairs(k):
    matrix = symmetric(torch.linspace(-1, 2, 30))
    pairs = eigenpairs(matrix, k, "largest", tolerance=1e-10)
    checked(matrix, pairs, torch.linalg.eigvalsh(matrix)[-k:])
    assert pairs.products <= 30
    forced = eigenpairs(matrix, 9, "largest", max_products=29)
    assert (
        not forced.converged and "stopped after 29 products" in forced.reason and "Raise max_products" in forced.reason
    )
    assert forced.products == 29


def test_copies_by_a_block():
    matrix = symmetric(torch.cat([torch.linspace(0, 1, 200), torch.full((3,), 4.0), torch.tensor([3.0])]))
    pairs = eigenpairs(matrix, 4, block=3, tolerance=1e-10)
    checked(matrix, pairs, torch.tensor([3.0, 4.0, 4.0, 4.0], dtype=torch.float64))


def test_scipys_eigenvalues_for_no_more_products():
    generator = np.random.default_rng(0)
    matrix = scipy.sparse.random(400, 400, 0.02, random_state=generator)
    matrix = (matrix + matrix.T).tocsr()
    count = 0

    def product(vector):
        nonlocal count
        count += 1
        return matrix @ vector

    counted = linalg.LinearOperator(matrix.shape, matvec=product, dtype=matrix.dtype)
    values, vectors = linalg.eigsh(counted, 10, which="BE", v0=generator.standard_normal(400))
    reached = np.linalg.norm(matrix @ vectors - vectors * values, axis=0).max() / abs(values).max()
    pairs = eigenpairs(matrix, 5, "both", tolerance=float(reached))
    torch.testing.assert_close(pairs.values, torch.from_numpy(np.sort(values)), rtol=0, atol=1e-12)
    assert pairs.products < count


def test_generalised_problem():
    matrix = symmetric(torch.linspace(-1, 3, 80))
    metric = symmetric(torch.logspace(-2, 1, 80), seed=1)
    inverse = torch.linalg.inv(metric)
    exact = torch.from_numpy(scipy.linalg.eigh(matrix.numpy(), metric.numpy(), eigvals_only=True))
    for k in (3, 20):  # by Lanczos, and dense
        pairs = eigenpairs(matrix, k, "both", metric=metric, metric_inverse=(inverse + inverse.T) / 2, tolerance=1e-9)
        values, vectors = pairs
        torch.testing.assert_close(values, torch.cat([exact[:k], exact[-k:]]), rtol=1e-10, atol=1e-9)
        identity = torch.eye(2 * k, dtype=torch.float64)
        torch.testing.assert_close(vectors.T @ metric @ vectors, identity, rtol=0, atol=1e-10)
        assert (matrix @ vectors - metric @ vectors * values).norm(dim=0).max() < 1e-6
        assert pairs.converged


def test_a_warm_start_takes_fewer_products():
    matrix = symmetric(torch.cat([torch.linspace(-1, 1, 300), torch.arange(2, 8)]))
    moved = matrix + 1e-4 * symmetric(torch.linspace(-1, 1, 306), seed=1)
    earlier = eigenpairs(matrix, 6, tolerance=1e-8)
    expected = torch.linalg.eigvalsh(moved)[-6:]
    cold = eigenpairs(moved, 6, tolerance=1e-8)
    for start in (earlier, earlier.vectors):
        warm = eigenpairs(moved, 6, tolerance=1e-8, start=start)
        checked(moved, warm, expected)
        assert warm.products < cold.products
    # of the very matrix: the space ends in the start, and what lies outside is looked at
    again = eigenpairs(matrix, 6, tolerance=1e-8, start=earlier)
    checked(matrix, again, torch.arange(2, 8, dtype=torch.float64))
    wrong = eigenpairs(matrix, 2, tolerance=1e-8, start=torch.linalg.eigh(matrix)[1][:, :3])
    checked(matrix, wrong, torch.tensor([6.0, 7.0], dtype=torch.float64))


def test_seeds_and_the_random_state():
    matrix = symmetric(SPECTRA["indefinite"])
    before = torch.get_rng_state()
    first, again, other = (eigenpairs(matrix, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, again.vectors) and torch.equal(first.values, again.values)
    assert not torch.equal(first.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["numpy", "sparse", "operator", "float32"])
def test_anybodys_matrices(kind):
    matrix = symmetric(SPECTRA["decaying"])
    given = {
        "numpy": matrix.numpy(),
        "sparse": scipy.sparse.csr_matrix(matrix.numpy()),
        "operator": linalg.aslinearoperator(matrix.numpy()),
        "float32": matrix.float(),
    }[kind]
    pairs = eigenpairs(given, 3)
    tolerance = {"rtol": 1e-5, "atol": 0} if kind == "float32" else {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(pairs.values.double(), torch.linalg.eigvalsh(matrix)[-3:], **tolerance)
    assert pairs.values.dtype == (torch.float32 if kind == "float32" else torch.float64)


def test_a_basis_in_lower_precision_says_its_residuals():
    matrix = symmetric(SPECTRA["decaying"])
    pairs = eigenpairs(matrix, 3, basis_dtype=torch.float32, basis_device="cpu", tolerance=1e-5)
    values, vectors = pairs
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix)[-3:], rtol=1e-8, atol=0)
    torch.testing.assert_close((matrix @ vectors - vectors * values).norm(dim=0), pairs.residuals)


def test_eigenvectors_by_name():
    class Named:
        def __init__(self, dense, domain):
            self.dense, self.domain, self.codomain = dense, domain, domain
            self.shape, self.dtype = dense.shape, dense.dtype

        def __matmul__(self, columns):
            return self.dense @ columns

    space = TensorSpace({"weight": torch.zeros(8, 10).double(), "bias": torch.zeros(10).double()})
    matrix = Named(symmetric(SPECTRA["indefinite"]), space)
    pairs = eigenpairs(matrix, 2)
    named = pairs.named(1)
    assert named["weight"].shape == (8, 10) and named["bias"].shape == (10,)
    assert torch.equal(torch.cat([part.flatten() for part in named.values()]), pairs.vectors[:, 1])
    assert eigenpairs(matrix, 1, start=named).products < pairs.products
    with pytest.raises(TypeError, match="the matrix has no 'domain' that names tensors"):
        eigenpairs(torch.eye(3), 1).named(0)


def test_what_cannot_be_is_refused():
    matrix = symmetric(SPECTRA["indefinite"])
    for arguments, message in [
        ({"k": 0}, "k: expected an integer from 1 to 90, the size of the matrix, got 0"),
        ({"k": 91}, "got 91"),
        ({"k": 1, "which": "top"}, "which: expected one of 'largest', 'smallest', 'both', 'magnitude', got 'top'"),
        ({"k": 1, "block": 0}, "block: expected an integer from 1 to 90, got 0"),
        ({"k": 5, "subspace": 6}, "subspace: expected at least 8 vectors for 5 pairs, got 6"),
        ({"k": 5, "max_products": 4}, "max_products: expected at least the 5 pairs asked, got 4"),
        ({"k": 5, "metric": matrix}, "'metric' and 'metric_inverse' together"),
        ({"k": 1, "start": torch.ones(3).double()}, r"expected shape \(90,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            eigenpairs(matrix, **arguments)
    with pytest.raises(MemoryError, match="the memory budget holds a basis of 2 vectors"):
        eigenpairs(matrix, 3, memory_budget=2000)
    for k in (1, 90):
        with pytest.raises(ValueError, match="are not symmetric"):
            eigenpairs(matrix.triu(), k)
        with pytest.raises(ValueError, match="is not finite"):
            eigenpairs(matrix * torch.nan, k)
        with pytest.raises(ValueError, match=r"the metric is not positive definite|are not symmetric"):
            eigenpairs(matrix, k, metric=-matrix.abs(), metric_inverse=matrix)
        positive = symmetric(torch.linspace(1, 3, 90))
        with pytest.raises(ValueError, match="metric_inverse: expected the inverse of the metric; for a random x"):
            eigenpairs(matrix, k, metric=positive, metric_inverse=2 * torch.linalg.inv(positive))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_basis_of_low_precision_looks_symmetric(k):
    """Where eigenvalues are many times the same, what is left of an image is the basis's rounding, and all copies are found."""
    matrix = symmetric(torch.cat([torch.zeros(30), torch.ones(30)]))
    found = eigenpairs(matrix, k, basis_dtype=torch.float32)
    torch.testing.assert_close(found.values, torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="not symmetric"):
        eigenpairs(matrix + torch.ones(60, 60).triu(1).double(), k, basis_dtype=torch.float32)


def test_residuals_of_large_numbers_are_numbers():
    found = eigenpairs((1e30 * symmetric(torch.linspace(1, 2, 60))).float(), 60)
    assert (found.residuals < 1e26).all()


def flat_float32():
    return 1 + torch.rand(400, generator=torch.Generator().manual_seed(0))


def residuals_of(matrix, pairs):
    matrix, values, vectors = (part.double() for part in (matrix, *pairs))
    return (matrix @ vectors - vectors * values).norm(dim=0)


def test_convergence_is_judged_by_the_residuals_that_are_returned():
    matrix = torch.diag(torch.linspace(1, 2, 400, dtype=torch.float64))
    pairs = eigenpairs(matrix, 5, basis_dtype=torch.float32)
    assert residuals_of(matrix, pairs).max() > 2 * torch.finfo(torch.float64).eps ** 0.5
    assert not pairs.converged and "That is rounding" in pairs.reason and "basis_dtype" in pairs.reason
    assert eigenpairs(matrix, 5, basis_dtype=torch.float32, tolerance=1e-6).converged
    generator = torch.Generator().manual_seed(0)
    bulk = torch.cat([-4e-3 + 1e-4 * torch.rand(50, generator=generator), 1e-2 * torch.rand(349, generator=generator)])
    matrix = torch.diag(torch.cat([bulk, torch.ones(1)])).bfloat16()
    pairs = eigenpairs(matrix, 2, "both")  # couplings below its rounding are not in the space's residuals
    norms = pairs.vectors.double().norm(dim=0)
    assert (residuals_of(matrix, pairs) / norms <= 1.5 * pairs.residuals.double() + 1e-3).all()
    assert "the sign is not told of 2 of 4" in repr(pairs)


@pytest.mark.parametrize("values", [torch.arange(1, 201) ** -2.0, torch.logspace(0, -12, 200)])
def test_the_dense_matrix_where_as_many_products_do_not_suffice(values, tmp_path):
    matrix = torch.diag(values.double())
    found = [
        eigenpairs(matrix, 4, "smallest", tolerance=1e-10, checkpoint=Checkpoint(tmp_path / "pairs.safetensors"))
        for _ in range(2)
    ]
    for pairs in found:
        torch.testing.assert_close(pairs.values, values.double().sort().values[:4], rtol=0, atol=1e-14)
        assert pairs.converged and pairs.products <= 2 * 200 + 1 and "by the dense matrix" in pairs.reason
    assert found[0].products == found[1].products and torch.equal(found[0].vectors, found[1].vectors)
    for limit in ({"max_products": 300}, {"memory_budget": 200 * 130 * 8, "subspace": 100}):
        assert "dense" not in eigenpairs(matrix, 4, "smallest", tolerance=1e-10, **limit).reason


def test_single_precision_skips_no_eigenvalue_of_a_flat_spectrum():
    values = flat_float32()
    for seed in range(4):
        pairs = eigenpairs(torch.diag(values), 3, seed=seed)
        torch.testing.assert_close(pairs.values, values.sort().values[-3:], rtol=0, atol=2e-5)
        assert pairs.converged and residuals_of(torch.diag(values), pairs).max() < 5e-5


def test_single_precision_tells_a_lower_end_far_below_the_largest():
    values = torch.cat([-torch.linspace(1e-3, 3e-3, 22), 1e-5 * torch.arange(300), torch.tensor([2.0, 5.0, 9.0])])
    matrix = symmetric(values).float()
    pairs = eigenpairs(matrix, 5, "smallest")
    torch.testing.assert_close(pairs.values.double(), torch.linalg.eigvalsh(matrix.double())[:5], rtol=0, atol=2e-4)
    assert pairs.converged and (pairs.values < 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_start_at_another_eigenvector_does_not_hide_the_largest(seed):
    values = torch.linspace(0, 1, 400, dtype=torch.float64)
    values[-2:] = torch.tensor([5.0, 4.0])
    start = 1e-8 * torch.randn(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start[-1] += 1
    pairs = eigenpairs(torch.diag(values), 1, start=start)
    torch.testing.assert_close(pairs.values, torch.tensor([5.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_pairs_print_in_a_line():
    matrix = torch.diag(torch.linspace(-1, 1, 41, dtype=torch.float64))
    for k in (2, 41):
        text = repr(eigenpairs(matrix, k))
        assert len(text) < 300 and "\n" not in text and "tensor" not in text
        assert "converged=True, reason='converged" in text
    close = EigenPairs(torch.tensor([-1.0, 1e-4]), torch.eye(2), torch.full((2,), 1e-3), 7, True, "converged")
    for text in (repr(close), close._repr_html_()):
        assert "converged; the sign is not told of 1 of 2, no larger than their residuals" in text
