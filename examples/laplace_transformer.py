"""A Laplace posterior of a transformer with laplace-torch, whose own Kronecker backends refuse attention and layer norms."""

import warnings

import torch
from laplace import Laplace
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvops.clients.laplace import CurvopsGGN

warnings.filterwarnings("ignore")
torch.manual_seed(0)
WORDS, LENGTH, WIDTH = 12, 8, 16


class Classifier(nn.Module):
    """Does a sequence have more small words than large ones?"""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(WIDTH, 2)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.words(X) + self.places).mean(1))


X = torch.randint(WORDS, (160, LENGTH))
y = ((X < WORDS // 2).sum(1) > LENGTH // 2).long()
train = DataLoader(TensorDataset(X[:96], y[:96]), batch_size=32)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
for _ in range(30):
    for inputs, labels in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

for backend in (CurvlinopsGGN, AsdlGGN, BackPackGGN, CurvopsGGN):
    laplace = Laplace(Classifier(), "classification", "all", "kron", backend=backend)
    laplace.model.load_state_dict(model.state_dict())
    try:
        laplace.fit(train)
        laplace.optimize_prior_precision(n_steps=50)  # by the marginal likelihood
    except Exception as error:
        print(f"{backend.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
        continue
    evidence = laplace.log_marginal_likelihood().item()
    print(f"{backend.__name__}: log evidence {evidence:.1f} at prior precision {laplace.prior_precision.item():.2f}")

with torch.no_grad():
    point = model.eval()(X[96:]).softmax(1)
for name, answer in (("point estimate", point), ("posterior", laplace(X[96:]))):
    nll, accuracy = nn.functional.nll_loss(answer.log(), y[96:]), (answer.argmax(1) == y[96:]).float().mean()
    print(
        f"{name:>14}: accuracy {accuracy:.0%}, negative log-likelihood {nll:.3f}, mean certainty {answer.amax(1).mean():.0%}"
    )
