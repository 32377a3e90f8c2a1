"""What a Kronecker preconditioner saves on a trained classifier's damped GGN."""

import pytest
import torch

from curvops import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator
from curvops.solvers.cg import cg


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_at_most_a_third_of_the_products_on_softmax_regression(cls):
    from sklearn.datasets import load_digits  # which takes long to import

    digits = load_digits()
    X, y = torch.tensor(digits.data[:600] / 16), torch.tensor(digits.target[:600])
    model, loss = torch.nn.Linear(64, 10).double(), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    problem = model, loss, dict(model.named_parameters()), [(X, y)]
    ggn = GGNLinearOperator(*problem)
    kfac = cls(*problem, fisher_type="type-2")
    damping = 1e-3 * float(kfac.trace()) / len(kfac.diagonal())  # a thousandth of the mean eigenvalue
    b = ggn.risk.value_and_gradient()[1]
    plain = cg(ggn, b, damping=damping)
    found = cg(ggn, b, damping=damping, preconditioner=kfac.inverse(damping))
    assert plain.converged and found.converged
    assert found.products <= plain.products / 3
