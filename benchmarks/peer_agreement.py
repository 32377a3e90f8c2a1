"""KFAC and EKFAC beside curvlinops', option by option, on networks of linear and convolution layers.

Usage: python benchmarks/peer_agreement.py
Prints the largest relative difference for each network, loss and option, in double precision. Where the two differ, a
matrix that PyTorch's autograd gives without either library says which side is right. For EKFAC it is the trace of the
dense Fisher, for KFAC the distance to its blocks, and where an approximation with a flaw happens to be nearer, KFAC's
definition, term by term. Exit status 1 if a difference does not speak for us.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import curvlinops
import torch
from peers_oracle import kfac_factors
from problem import relative
from torch import Tensor, nn

import curvops

TOLERANCE = 1e-9
FISHER_TYPES = ("type-2", "empirical", "forward-only")
N = 24  # so many that factors have full rank, and EKFAC's eigenbasis is unique
SAMPLES, SEEDS = (2, 32, 512), 10


@dataclass
class Problem:
    """A model, a loss and data in two batches of different size."""

    model: nn.Module
    loss: Any
    X: Tensor
    y: Tensor

    @property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        """The batches."""
        return [(self.X[:7], self.y[:7]), (self.X[7:], self.y[7:])]


class Last(nn.Module):
    """Channels to axis 1, where cross-entropy looks for classes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class Mixing(nn.Module):
    """Mixes the positions of a datum, as attention does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Twice(nn.Module):
    """Uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 3)
        ),
        (2, 4, 4),
    ),
    "shared": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mixing(), nn.Flatten(), nn.Linear(10, 3)), (2, 4)),
    "terms": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (2, 4)),
    "mixed terms": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mixing(), nn.Linear(5, 3)), (2, 4)),
    "reused layer": (Twice, (4,)),
}
WEIGHT = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
LOSSES: dict[str, Callable[[str], Any]] = {
    "cross-entropy": lambda r: nn.CrossEntropyLoss(reduction=r),
    "MSE": lambda r: nn.MSELoss(reduction=r),
    "BCE": lambda r: nn.BCEWithLogitsLoss(reduction=r),
}
SPECIAL: dict[str, Callable[[str], Any]] = {
    "class weights": lambda r: nn.CrossEntropyLoss(WEIGHT, reduction=r),
    "label smoothing": lambda r: nn.CrossEntropyLoss(label_smoothing=0.2, reduction=r),
    "ignored targets": lambda r: nn.CrossEntropyLoss(ignore_index=0, reduction=r),
    "pos_weight": lambda r: nn.BCEWithLogitsLoss(pos_weight=WEIGHT, reduction=r),
}


def build(network: str, loss: Any) -> Problem:
    """A network with a loss, always the same."""
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    model, X = make(), torch.randn(N, *shape)
    lead = (N, 2) if "terms" in network else (N,)
    if isinstance(loss, nn.CrossEntropyLoss):
        y = torch.randint(3, lead)
        if len(lead) > 1:
            model = nn.Sequential(*model, Last())
    else:
        y = torch.rand(*lead, 3)
        if isinstance(loss, nn.BCEWithLogitsLoss):
            y = y.round()
    return Problem(model.double(), loss, X.double(), y if y.dtype == torch.int64 else y.double())


def ours(kind: str, problem: Problem, **options: Any) -> Tensor:
    """Our matrix."""
    make = getattr(curvops, f"{kind}LinearOperator")
    params = dict(problem.model.named_parameters())
    return make(problem.model, problem.loss, params, problem.data, **options).to_dense()


def peer(kind: str, problem: Problem, **options: Any) -> Tensor:
    """The peer's matrix: the operator times the identity."""
    make = getattr(curvlinops, f"{kind}LinearOperator")
    params = list(problem.model.parameters())
    operator = make(problem.model, problem.loss, params, problem.data, **options)
    return (operator @ torch.eye(sum(p.numel() for p in params), dtype=torch.float64)).detach()


def columns(problem: Problem, z: Tensor, fisher_type: str) -> Tensor:
    """√c S, one cotangent of the output for each loss term and column: ``[columns, *z.shape]``."""
    loss, y = problem.loss, problem.y
    if fisher_type == "type-2":
        # the Hessian at the output is block-diagonal over terms, and so is its root
        H = torch.autograd.functional.hessian(lambda v: loss(v.view(z.shape), y), z.detach().flatten())
        axis = 1 if isinstance(loss, nn.CrossEntropyLoss) else z.ndim - 1
        places = torch.arange(z.numel()).view(z.shape).movedim(axis, -1).flatten(0, -2)
        found = []
        for where in places:
            values, vectors = torch.linalg.eigh(H[where[:, None], where])
            roots = torch.zeros(len(where), z.numel(), dtype=z.dtype)
            roots[:, where] = (vectors * values.clamp(min=0).sqrt()).T
            found.append(roots)
        return torch.cat(found).view(-1, *z.shape)
    # the gradient of each term by itself; a weight of 2 is a datum that comes twice
    weighted = isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None
    each = (
        nn.CrossEntropyLoss(ignore_index=loss.ignore_index, reduction="none", label_smoothing=loss.label_smoothing)
        if isinstance(loss, nn.CrossEntropyLoss)
        else type(loss)(reduction="none", **({"pos_weight": loss.pos_weight} if hasattr(loss, "pos_weight") else {}))
    )
    leaf = z.detach().requires_grad_()
    entries = each(leaf, y)
    if not isinstance(loss, nn.CrossEntropyLoss):
        entries = entries.sum(-1)  # a term is a vector
    weights = WEIGHT[y].flatten() if weighted else torch.ones(entries.numel(), dtype=z.dtype)
    if loss.reduction == "sum":
        c = 1.0
    elif isinstance(loss, nn.CrossEntropyLoss):
        c = 1.0 / float(weights[(y != loss.ignore_index).flatten()].sum())
    else:
        c = 1.0 / z.numel()
    slopes = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in entries.flatten()]
    return torch.stack([(c * w) ** 0.5 * g for w, g in zip(weights, slopes, strict=True)])


def oracle(problem: Problem, fisher_type: str) -> Tensor:
    """The GGN, or the empirical Fisher, by autograd alone."""
    params = list(problem.model.parameters())
    z = problem.model(problem.X)
    slopes = [torch.autograd.grad(z, params, u, retain_graph=True) for u in columns(problem, z, fisher_type)]
    G = torch.stack([torch.cat([g.flatten() for g in slope]) for slope in slopes])
    return G.T @ G


def definition(problem: Problem, fisher_type: str, kfac_approx: str, separate_weight_and_bias: bool) -> Tensor:
    """KFAC by its definition."""

    def cotangents(z: Tensor) -> Iterable[Tensor]:
        return () if fisher_type == "forward-only" else columns(problem, z, fisher_type)

    blocks = []
    for A, B in kfac_factors(problem.model, problem.X, cotangents, not separate_weight_and_bias, kfac_approx):
        block = torch.kron(B, A)
        if separate_weight_and_bias:
            blocks += [block, B]
        else:  # from rows with the bias at their end to the weight before the bias
            places = torch.arange(len(block)).view(-1, len(A))
            order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
            blocks.append(block[order[:, None], order])
    return torch.block_diag(*blocks)


def blocks(matrix: Tensor, problem: Problem, separate: bool) -> list[Tensor]:
    """The matrix's blocks by parameter or by layer."""
    owners: dict[str, list[Tensor]] = {}
    start = 0
    for name, p in problem.model.named_parameters():
        places = torch.arange(start, start + p.numel())
        owners.setdefault(name if separate else name.rpartition(".")[0], []).append(places)
        start += p.numel()
    found = [torch.cat(places) for places in owners.values()]
    return [matrix[where[:, None], where] for where in found]


def verdict(kind: str, problem: Problem, mine: Tensor, its: Tensor, options: dict[str, Any]) -> tuple[bool, str]:
    """Whether the oracle speaks for our side, and its numbers."""
    if kind == "EKFAC":
        trace = oracle(problem, options["fisher_type"]).trace()
        traces = [abs(float(m.trace() / trace) - 1) for m in (mine, its)]
        return traces[0] < TOLERANCE < traces[1], f"trace off by: ours {traces[0]:.0e}, peer's {traces[1]:.0e}"
    text = ""
    if options["fisher_type"] != "forward-only":
        wanted = blocks(oracle(problem, options["fisher_type"]), problem, options["separate_weight_and_bias"])

        def distance(matrix: Tensor) -> float:
            found = blocks(matrix, problem, options["separate_weight_and_bias"])
            squares = sum(float((a - b).norm() ** 2) for a, b in zip(found, wanted, strict=True))
            return (squares / sum(float(b.norm() ** 2) for b in wanted)) ** 0.5

        near, far = distance(mine), distance(its)
        text = f"distance to the dense blocks: ours {near:.3f}, peer's {far:.3f}; "
    by_definition = definition(problem, **options)
    off = [relative(m, by_definition) for m in (mine, its)]
    text += f"distance to the definition: ours {off[0]:.0e}, peer's {off[1]:.0e}"
    return off[0] < TOLERANCE < off[1], text


def compare(network: str, name: str, make_loss: Callable[[str], Any]) -> tuple[dict[str, str], list[str], bool]:
    """Cells by option, remarks on differences, and whether all of them speak for us."""
    cells: dict[str, str] = {}
    remarks: list[str] = []
    fine = True
    for kind, fisher_type, approximation in itertools.product(("KFAC", "EKFAC"), FISHER_TYPES, ("expand", "reduce")):
        if (kind, fisher_type) == ("EKFAC", "forward-only"):
            continue
        worst, where = 0.0, ""
        for reduction, separate in itertools.product(("mean", "sum"), (True, False)):
            options = {
                "fisher_type": fisher_type,
                "kfac_approx": approximation,
                "separate_weight_and_bias": separate,
            }
            problem = build(network, make_loss(reduction))
            mine = ours(kind, problem, **options)
            try:
                its = peer(kind, problem, **options)
            except Exception as error:  # what the peer does not support, it says in many ways
                where = f"the peer refuses: {str(error).splitlines()[0][:80]}"
                worst = float("nan")
                break
            difference = relative(mine, its)
            if difference > max(worst, TOLERANCE):
                good, text = verdict(kind, problem, mine, its, options)
                fine &= good
                where = (
                    f"{reduction}, {'separate' if separate else 'joint'}: {text}; for {'us' if good else 'THE PEER'}"
                )
            worst = max(worst, difference)
        title = f"{kind} {fisher_type} {approximation}"
        cells[title] = f"{worst:.0e}"
        if where.startswith("the peer refuses"):
            remarks.append(f"  {network}, {kind}: {where}")
        elif where:
            remarks.append(f"  {network}, {name}, {title}: difference {worst:.1e}; {where}")
    return cells, remarks, fine


def monte_carlo() -> bool:
    """Print how both sides' samples approach the exact expectation; whether both do at the rate 1/√M."""
    fine = True
    print("\nMonte Carlo: root mean square of the relative distance to type-2, which must fall as 1/√M")
    for network, name in itertools.product(("linear", "convolution"), LOSSES):
        problem = build(network, LOSSES[name]("mean"))
        exact = ours("KFAC", problem, fisher_type="type-2")
        for side, compute in (("ours", ours), ("peer's", peer)):
            rms = []
            for samples in SAMPLES:
                draws = [
                    compute("KFAC", problem, fisher_type="mc", mc_samples=samples, seed=seed) for seed in range(SEEDS)
                ]
                rms.append(statistics.mean(relative(draw, exact) ** 2 for draw in draws) ** 0.5)
            falls = all(2.5 < a / b < 6.5 for a, b in itertools.pairwise(rms))
            fine &= falls or side != "ours"
            print(f"  {network:<12}{name:<15}{side:<8}{', '.join(f'{d:.4f}' for d in rms)} {'ok' if falls else 'NOT'}")
    return fine


def main() -> int:
    """Print everything and return the exit status."""
    warnings.filterwarnings("ignore")
    print(f"curvlinops {version('curvlinops-for-pytorch')}, torch {torch.__version__}, float64; nan: the peer refuses")
    pairs = [(network, name, make) for network in NETWORKS for name, make in LOSSES.items()]
    pairs += [("linear", name, make) for name, make in SPECIAL.items()]
    fine, notes, header = True, [], False
    for network, name, make in pairs:
        cells, remarks, good = compare(network, name, make)
        if not header:
            titles = [f"{k}: {title}" for k, title in enumerate(cells, 1)]
            print("\n".join(titles))
            print(f"{'network':<14}{'loss':<16}" + "".join(f"{k:>7}" for k in range(1, len(cells) + 1)))
            header = True
        print(f"{network:<14}{name:<16}" + "".join(f"{cell:>7}" for cell in cells.values()))
        notes += remarks
        fine &= good
    print("\nDifferences, and which side a dense matrix by autograd speaks for:")
    print("\n".join(dict.fromkeys(notes)) or "  none")
    fine &= monte_carlo()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
