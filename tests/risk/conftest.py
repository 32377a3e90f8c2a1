"""Operators and a model that the tests of this folder share."""

import pytest
from torch import nn

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator, KFACLinearOperator


@pytest.fixture(params=[HessianLinearOperator, GGNLinearOperator, EFLinearOperator, KFACLinearOperator])
def cls(request):
    return request.param


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
