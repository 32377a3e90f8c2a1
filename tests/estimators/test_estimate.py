"""Estimates are tensors that carry their error."""

import copy
import pickle

import pytest
import torch

from curvops.estimators import Estimate


def estimate(value, error=0.4, **more):
    value = torch.as_tensor(value)
    return Estimate.of(value, torch.full_like(value, error), **{"products": 30, "method": "Hutch++"} | more)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.412, "12.35 ± 0.41"),
        (12.3456, 12.0, "12 ± 12"),
        (1234.5, 99.9, "1234 ± 100"),
        (-3.4e-9, 2e-11, "-3.400e-09 ± 2.0e-11"),
        (0.0, 3e-9, "0e+00 ± 3.0e-09"),
        (5e8, 3e4, "5.00000e+08 ± 3.0e+04"),
        (5.25, 0.0, "5.25"),
        (5.25, float("inf"), "5.25 ± inf"),
    ],
)
def test_no_more_figures_than_the_error_allows(value, error, text):
    found = estimate(torch.tensor(value, dtype=torch.float64), error)
    assert repr(found) == str(found) == f"{found}" == f"Estimate({text}, Hutch++, 30 products)"


def test_what_is_exact_says_so():
    assert repr(estimate(2.5, 0.0, exact=True)) == "Estimate(2.5, exact, 30 products)"
    assert repr(estimate([1.0, 2.0], 0.0, exact=True)) == "Estimate(2 entries, exact, 30 products)"
    assert repr(estimate([3.0, 4.0], 0.5)).startswith("Estimate(2 entries, ‖standard error‖ / ‖·‖ 0.14")


def test_it_is_a_number():
    found = estimate(2.5)
    assert float(found) == 2.5 and f"{found:.2f}" == "2.50" and found > 2 and found.item() == 2.5


def test_results_of_operations_are_plain_tensors():
    found = estimate([1.0, 2.0])
    for result in (found + 1, 1 - found, found.sum(), found[0], found.detach(), found.clone(), torch.exp(found)):
        assert type(result) is torch.Tensor
    assert type(found.part(0)) is Estimate and found.part(0).products == 30 and found.part(0).standard_error == 0.4


def test_gradients_pass_through():
    source = torch.tensor(3.0, requires_grad=True)
    found = estimate(source**2)
    assert found.requires_grad and not found.standard_error.requires_grad
    found.backward()
    assert source.grad == 6


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda found: pickle.loads(pickle.dumps(found))])
def test_copies_keep_everything(again):
    found = estimate([1.0, 2.0], exact=True)
    other = again(found)
    assert type(other) is Estimate and repr(other) == repr(found) and other.exact and other.method == "Hutch++"
    assert torch.equal(other, found) and torch.equal(other.standard_error, found.standard_error)
    if again is copy.deepcopy:
        found.zero_()
        assert other[1] == 2
