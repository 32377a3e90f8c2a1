"""A datum of two rows, as of reward modeling, where laplace-torch's own backends differ."""

import pytest
import torch
from torch import nn

from curvops.clients.laplace import CurvopsGGN

pytestmark = pytest.mark.filterwarnings("ignore")  # laplace-torch's own


class Reward(nn.Module):
    """Two rows a datum, through one layer (reward modeling)."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(4, 1, bias=False)

    def forward(self, X):
        return self.score(X.flatten(0, -2)).view(X.shape[:-1])


def test_pairs_of_rewards():
    """The rows of a datum are not data of their own, as laplace-torch's backends take them: B ⊗ A would be twice this."""
    torch.manual_seed(0)
    model, X, y = Reward().double(), torch.randn(17, 2, 4).double(), torch.randint(2, (17,))
    p = model(X).softmax(1).detach()
    S = p.diag_embed() - p[:, :, None] * p[:, None]
    backend = CurvopsGGN(model, "classification")
    torch.testing.assert_close(backend.full(X, y)[1], torch.einsum("nra,nrs,nsb->ab", X, S, X))
    ((B, A),) = backend.kron(X, y, N=17)[1].kfacs
    torch.testing.assert_close(B * A, S.diagonal(dim1=1, dim2=2).sum() * torch.einsum("nra,nrb->ab", X, X) / (2 * 17))
