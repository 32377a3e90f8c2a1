"""Anybody's matrices, dtypes, seeds, stopping, and errors that say what came and what to do."""

import numpy as np
import pytest
import scipy.sparse.linalg as linalg
import torch

from curvops.estimators import Estimate, by_group, diagonal, logdet, squared_norm, trace, trace_function
from estimators.matrices import GROUPS, SPECTRA, D, block, hessian, with_spectrum

MATRIX = with_spectrum(SPECTRA["harmonic"])
ALL = {
    "hutchinson": lambda matrix, **more: trace(matrix, method="hutchinson", **more),
    "hutch++": lambda matrix, **more: trace(matrix, method="hutch++", **more),
    "xtrace": trace,
    "diagonal": lambda matrix, **more: diagonal(matrix, method="hutchinson", **more),
    "xdiag": diagonal,
    "norm": squared_norm,
    "norms": lambda matrix, **more: squared_norm(matrix, groups={"all": slice(None)}, **more)["all"],
    "function": lambda matrix, **more: trace_function(matrix, torch.exp, depth=6, **more),
    "logdet": lambda matrix, **more: logdet(matrix, damping=1.0, depth=6, **more),
    "blocks": lambda matrix, **more: by_group(matrix, {"all": slice(None)}, **more)["all"].diagonal,
}
TOLERANT = [name for name in ALL if name != "blocks"]


class Bare:
    """A matrix with nothing but what the protocol asks."""

    def __init__(self, dense):
        self.dense, self.shape, self.dtype = dense, dense.shape, dense.dtype

    def __matmul__(self, columns):
        return self.dense @ columns


def plain(found):
    return found.as_subclass(torch.Tensor)


@pytest.mark.parametrize("name", ALL)
def test_anybody_s_matrix_gives_the_same(name):
    expected = ALL[name](MATRIX, num_products=48)
    bare = Bare(MATRIX)
    bare.symmetric = True
    for matrix in (MATRIX.numpy(), linalg.aslinearoperator(MATRIX.numpy()), bare):
        found = ALL[name](matrix, num_products=48)
        torch.testing.assert_close(plain(found), plain(expected))
        torch.testing.assert_close(found.standard_error, expected.standard_error)
        assert found.products == expected.products == 48 and isinstance(found, Estimate)


@pytest.mark.parametrize("name", ALL)
def test_our_operators(name):
    operator, dense = hessian()
    shift = torch.eye(len(dense)).double()
    found, expected = ALL[name](operator, num_products=24), ALL[name](dense, num_products=24)
    assert len(shift) > 24 and not found.exact
    torch.testing.assert_close(plain(found), plain(expected))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_lower_precision(name, dtype, tolerance):
    """The same random signs in any dtype; sums, bases and results in at least single precision."""
    found, expected = ALL[name](MATRIX.to(dtype), num_products=48), ALL[name](MATRIX, num_products=48)
    assert found.dtype == torch.float32
    difference = torch.linalg.vector_norm(plain(found).double() - plain(expected))
    assert difference < tolerance * torch.linalg.vector_norm(plain(expected))


@pytest.mark.parametrize("name", ALL)
def test_the_seed_decides_and_the_global_state_is_left_alone(name):
    before = torch.get_rng_state()
    found = [plain(ALL[name](MATRIX, num_products=48, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", TOLERANT)
def test_rounds_stop_at_a_tolerance(name):
    """Vectors of earlier rounds are used again: the result is that of as many products at once."""
    matrix = with_spectrum(torch.linspace(0, 2, 400).double() ** 2)
    first = ALL[name](matrix, num_products=24)
    wanted = (first.standard_error.norm() / plain(first).norm()).item() / 1.4
    found = ALL[name](matrix, num_products=24, tolerance=wanted)
    assert 24 < found.products < 400 and found.standard_error.norm() / plain(found).norm() <= wanted
    at_once = ALL[name](matrix, num_products=found.products)
    torch.testing.assert_close(plain(found), plain(at_once))
    torch.testing.assert_close(found.standard_error, at_once.standard_error)


@pytest.mark.parametrize("name", TOLERANT)
def test_a_tolerance_out_of_reach(name):
    with pytest.warns(UserWarning, match=r"relative standard error is .* after (48|50) products, wanted was 1e-09"):
        found = ALL[name](MATRIX, num_products=24, tolerance=1e-9, max_products=50)
    assert found.products in (48, 50)


def test_a_tolerance_out_of_reach_is_exact_where_that_may_be_spent():
    found = trace(MATRIX, num_products=24, tolerance=1e-9, method="hutchinson")
    assert found.exact and found.products == 48 + D
    torch.testing.assert_close(plain(found), MATRIX.trace())
    already = trace(MATRIX, num_products=24, tolerance=0.5)
    assert already.products == 24


@pytest.mark.parametrize(("method", "products"), [("xtrace", 20), ("hutch++", 30), ("hutchinson", 10)])
def test_the_error_of_a_few_samples_stops_nothing(method, products):
    """Where rounds stop as soon as a small error is met by chance, the stated errors are too small."""
    found = trace(MATRIX, method=method, num_products=6, tolerance=10.0)
    assert found.products == products
    assert trace(MATRIX, method=method, num_products=6, tolerance=10.0, max_products=9).products in (8, 9)


@pytest.mark.parametrize("name", TOLERANT)
@pytest.mark.parametrize("scale", [2.0**60, 2.0**-60])
def test_any_scale(name, scale):
    """Estimates of c A are c times those of A, but of functions."""
    if name in ("function", "logdet"):
        scaled = trace_function(scale * MATRIX, lambda x: x, depth=6, num_products=48)
        expected = trace_function(MATRIX, lambda x: x, depth=6, num_products=48)
    else:
        scaled, expected = ALL[name](scale * MATRIX, num_products=48), ALL[name](MATRIX, num_products=48)
    power = scale**2 if name.startswith("norm") else scale
    torch.testing.assert_close(plain(scaled) / power, plain(expected), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(scaled.standard_error / power, expected.standard_error, rtol=1e-6, atol=0.0)


def test_columns_are_taken_a_bounded_number_at_a_time(monkeypatch):
    widths = []

    class Counting(Bare):
        def __matmul__(self, columns):
            widths.append(columns.shape[1])
            return self.dense @ columns

        mT = property(lambda self: Counting(self.dense.mT))

    monkeypatch.setattr("curvops.estimators.probes._ENTRIES", 5 * D)
    for name, estimate in ALL.items():
        found, expected = estimate(Counting(MATRIX), num_products=48), estimate(MATRIX, num_products=48)
        assert max(widths) <= 5 and sum(widths) == 48, name
        torch.testing.assert_close(plain(found), plain(expected))
        widths.clear()
        estimate(Counting(MATRIX), num_products=300)
        assert max(widths) <= 5 and sum(widths) == D, name
        widths.clear()


@pytest.mark.parametrize("name", ALL)
def test_products_that_are_not_finite(name):
    for bad in (float("nan"), float("inf")):
        matrix = MATRIX.clone()
        matrix[3, 4] = matrix[4, 3] = bad
        for products in (48, 300):
            with pytest.raises(FloatingPointError, match=r"products with Tensor are not finite\. Look for NaN"):
                ALL[name](matrix, num_products=products)


@pytest.mark.parametrize("name", ALL)
def test_products_are_validated(name):
    for wrong in (0, -3, 2.5, True, None):
        with pytest.raises(ValueError, match="num_products: expected a positive integer, got"):
            ALL[name](MATRIX, num_products=wrong)
    with pytest.raises(ValueError, match=r"num_products: .* a sample and needs at least . samples .* got 1\."):
        ALL[name](MATRIX, num_products=1)
    for wrong in (1.0, "0", True):
        with pytest.raises(TypeError, match="seed: expected an integer"):
            ALL[name](MATRIX, seed=wrong)


def test_other_arguments_are_validated():
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tolerance: expected a positive number"):
            trace(MATRIX, num_products=10, tolerance=wrong)
    with pytest.raises(ValueError, match=r"max_products: expected at least num_products \(20\), got 10"):
        trace(MATRIX, num_products=20, tolerance=0.1, max_products=10)
    with pytest.raises(ValueError, match=r"method: expected one of 'xtrace', 'hutch\+\+', 'hutchinson', got 'x'"):
        trace(MATRIX, method="x")
    with pytest.raises(ValueError, match="method: expected one of 'xdiag', 'hutchinson', got 'x'"):
        diagonal(MATRIX, method="x")
    with pytest.raises(ValueError, match="distribution: expected 'rademacher' or 'normal', got 'uniform'"):
        trace(MATRIX, distribution="uniform")
    with pytest.raises(ValueError, match="depth: expected a positive integer, got 0"):
        trace_function(MATRIX, torch.exp, depth=0)
    with pytest.raises(ValueError, match=r"expected a square matrix, got shape \(40, 60\)"):
        trace(MATRIX[:40])
    with pytest.raises(TypeError, match="expected a matrix with 'adjoint\\(\\)', 'mT' or 'T', Bare has none"):
        diagonal(Bare(MATRIX), num_products=10)


def test_functions_are_validated():
    with pytest.raises(ValueError, match=r"function: expected values of shape \(60,\), got \(\)"):
        trace_function(MATRIX, torch.sum)
    with pytest.raises(ValueError, match="function: expected finite values at eigenvalues between"):
        trace_function(-MATRIX, torch.log)
    for products in (60, 48):
        with pytest.raises(ValueError, match=r"logdet: expected a positive definite matrix, .*Raise the damping"):
            logdet(-MATRIX, damping=1e-3, depth=6, num_products=products)
    skew = Bare(MATRIX)
    skew.symmetric = False
    for refused in (lambda: logdet(skew), lambda: by_group(skew, GROUPS), lambda: squared_norm(skew, groups=GROUPS)):
        with pytest.raises(ValueError, match="expected a symmetric matrix"):
            refused()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("layers", "expected 'tensors', 'modules' or a dict of slices, indices or names, got 'layers'"),
        ("tensors", "Tensor has no named tensors"),
        ({}, "expected 'tensors', 'modules' or a dict"),
        ([slice(0, 3)], "expected 'tensors', 'modules' or a dict"),
        ({"a": slice(0, 61)}, r"groups\['a'\]: expected a slice within 0 and 60"),
        ({"a": slice(3, 3)}, "that is not empty"),
        ({"a": slice(0, 6, 2)}, "expected a slice within"),
        ({"a": [1, 2]}, r"groups\['a'\]: expected a slice, a tensor of indices .* or names, got list"),
        ({"a": torch.ones(60, dtype=torch.bool)}, "got torch.bool"),
        ({"a": torch.tensor([0, 60])}, "expected different indices between 0 and 59"),
        ({"a": torch.tensor([1, 1])}, "expected different indices"),
    ],
)
def test_groups_are_validated(groups, message):
    with pytest.raises(ValueError, match=message):
        trace(MATRIX, groups=groups)


def test_groups_by_name():
    operator, dense = hessian()
    slices = {name: operator.domain.slice(name) for name in operator.domain.names}
    found, diagonals = trace(operator, groups="tensors"), diagonal(operator, groups="tensors")
    assert list(found) == list(diagonals) == list(slices)
    for name, rows in slices.items():
        torch.testing.assert_close(plain(found[name]), block(dense, rows).trace())
        torch.testing.assert_close(plain(diagonals[name]), block(dense, rows).diagonal())


def test_groups_by_patterns():
    operator, dense = hessian()
    space = operator.domain
    groups = {"weights": "*.weight", "one": [space.names[-1]], "rows": slice(0, 2)}
    found = trace(operator, groups=groups)
    assert list(found) == list(groups)
    for name, rows in {
        "weights": space.positions(space.match("*.weight")),
        "one": space.slice(space.names[-1]),
    }.items():
        torch.testing.assert_close(plain(found[name]), block(dense, rows).trace())
    torch.testing.assert_close(plain(found["rows"]), dense[:2, :2].trace())
    with pytest.raises(KeyError, match=r"no parameter's name matches 'weights'"):
        trace(operator, groups={"a": ["weights"]})


def test_modules_need_not_be_contiguous():
    class Domain:
        names = ("b.weight", "a.weight", "b.bias", "alone")

        def slice(self, name):
            start = 15 * self.names.index(name)
            return slice(start, start + 15)

    matrix = Bare(MATRIX)
    matrix.domain = Domain()
    found = trace(matrix, groups="modules")
    rows = {"b": torch.cat([torch.arange(15), torch.arange(30, 45)]), "a": slice(15, 30), "": slice(45, 60)}
    assert list(found) == list(rows)
    for name, index in rows.items():
        torch.testing.assert_close(plain(found[name]), block(MATRIX, index).trace())


def test_progress_is_shown(capsys):
    trace(MATRIX, num_products=10, progressbar=True)
    assert "trace: 10 products" in capsys.readouterr().err


def test_numpy_single_precision():
    found = trace(MATRIX.numpy().astype(np.float32), num_products=48)
    assert found.dtype == torch.float32
