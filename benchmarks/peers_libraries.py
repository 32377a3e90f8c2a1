"""Curvature as other libraries give it: each function returns what a library can do on a problem, as flat vectors.

A matrix shows itself by its product with the problem's vector, a diagonal by its entries, EKFAC, whose eigenbasis need
not be unique, by its trace, and what is sampled by nothing. Kronecker factors without the bias belong to
``separate_weight_and_bias=True``, "joint" ones have it in them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from problem import LOSS, Problem, flat
from torch import Tensor, nn
from torch.utils.data import DataLoader

PRODUCTS = 10
Work = Callable[[], Tensor | None]


def kronecker_product(factors: Sequence[Sequence[Tensor]], parts: Sequence[Tensor]) -> Tensor:
    """B V A for a weight, B v for a bias."""
    found = []
    for factor, part in zip(factors, parts, strict=True):
        product = factor[0] @ part.flatten(1) @ factor[1] if len(factor) == 2 else factor[0] @ part
        found.append(product)
    return flat(found)


def repeated(product: Callable[[], Tensor], times: int = PRODUCTS) -> Tensor:
    return [product() for _ in range(times)][-1]


class Rows:
    """A data set that hands out whole batches, so that a loader's collation is not measured."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        self.X, self.y = X, y

    def __len__(self) -> int:
        return len(self.X)

    def __getitems__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        return self.X[places], self.y[places]


def loader_of(p: Problem) -> DataLoader[Any]:
    """A loader with the problem's batches, for a library that counts the data by it."""
    rows = Rows(*p.joined().data[0])
    return DataLoader(rows, batch_size=len(p.data[0][0]), collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def ours(p: Problem) -> dict[str, Work]:
    """What is compared, as we compute it."""

    def kfac(fisher_type: str, separate: bool) -> Any:
        return p.ours("KFAC", fisher_type=fisher_type, separate_weight_and_bias=separate)

    def many(kind: str) -> Tensor:
        with p.ours(kind).linearized() as operator:
            return repeated(lambda: operator @ p.v)

    def sampled(separate: bool) -> None:
        _ = kfac("mc", separate) @ p.v

    return {
        "Hessian product": lambda: p.ours("Hessian") @ p.v,
        f"Hessian, {PRODUCTS} products": lambda: many("Hessian"),
        "GGN product": lambda: p.ours("GGN") @ p.v,
        f"GGN, {PRODUCTS} products": lambda: many("GGN"),
        "EF product": lambda: p.ours("EF") @ p.v,
        "GGN diagonal": lambda: p.ours("GGNDiagonal", fisher_type="type-2").diagonal(),
        "EF diagonal": lambda: p.ours("GGNDiagonal", fisher_type="empirical").diagonal(),
        "KFAC, type-2": lambda: kfac("type-2", True) @ p.v,
        "KFAC, type-2, joint": lambda: kfac("type-2", False) @ p.v,
        "KFAC, empirical": lambda: kfac("empirical", True) @ p.v,
        "KFAC, mc": lambda: sampled(True),
        "KFAC, mc, joint": lambda: sampled(False),
        "EKFAC, type-2, joint": lambda: (
            p.ours("EKFAC", fisher_type="type-2", separate_weight_and_bias=False).trace().view(1)
        ),
        "dense Hessian": lambda: p.ours("Hessian").to_dense() @ p.v,
        "dense GGN": lambda: p.ours("GGN").to_dense() @ p.v,
        "dense EF": lambda: p.ours("EF").to_dense() @ p.v,
    }


def backpack(p: Problem) -> dict[str, Work]:
    """BackPACK: one batch at a time."""
    import backpack as library
    from backpack import extensions
    from backpack.hessianfree.ggnvp import ggn_vector_product
    from backpack.hessianfree.hvp import hessian_vector_product

    plain, model, loss = p.apart().model, library.extend(copy.deepcopy(p.model)), library.extend(nn.CrossEntropyLoss())
    (X, y), params, n = p.data[0], list(model.parameters()), p.num_data

    def quantities(extension: Any, name: str) -> list[Any]:
        with library.backpack(extension):
            loss(model(X), y).backward()
        model.zero_grad()
        return [getattr(q, name) for q in params]

    def hessian(times: int) -> Tensor:
        own = list(plain.parameters())
        value = LOSS(plain(X), y)
        grads = torch.autograd.grad(value, own, create_graph=True)
        return repeated(lambda: flat(hessian_vector_product(value, own, p.parts, grad_params=grads)), times)

    def ggn(times: int) -> Tensor:
        output = plain(X)
        value = LOSS(output, y)
        return repeated(lambda: flat(ggn_vector_product(value, output, plain, p.parts)), times)

    def dense_ef() -> Tensor:
        G = torch.cat([g.flatten(1) for g in quantities(extensions.BatchGrad(), "grad_batch")], 1)
        return n * (G.T @ G) @ p.v

    def kfac_mc() -> None:
        kronecker_product(quantities(extensions.KFAC(mc_samples=1), "kfac"), p.parts)

    return {
        "Hessian product": lambda: hessian(1),
        f"Hessian, {PRODUCTS} products": lambda: hessian(PRODUCTS),
        "GGN product": lambda: ggn(1),
        f"GGN, {PRODUCTS} products": lambda: ggn(PRODUCTS),
        "GGN diagonal": lambda: flat(quantities(extensions.DiagGGNExact(), "diag_ggn_exact")),
        # the squares of gradients of the mean, of which there is one 1/N too many
        "EF diagonal": lambda: n * flat(quantities(extensions.SumGradSquared(), "sum_grad_squared")),
        "KFAC, type-2": lambda: kronecker_product(quantities(extensions.KFLR(), "kflr"), p.parts),
        "KFAC, mc": kfac_mc,
        "dense EF": dense_ef,
    }


def nngeometry(p: Problem) -> dict[str, Work]:
    """NNGeometry: walks a loader."""
    from nngeometry import metrics
    from nngeometry.hessian import Hessian
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import pspace
    from nngeometry.object.vector import PVector

    model, loader = p.apart().model, loader_of(p)
    vector = PVector(LayerCollection.from_model(model), vector_repr=p.v)
    summed = nn.CrossEntropyLoss(reduction="sum")

    def fisher(form: Any) -> Any:
        return metrics.FIM(model, loader, form)

    def ekfac() -> Tensor:
        matrix = fisher(pspace.PMatEKFAC)
        matrix.update_diag(loader)
        return matrix.trace().detach().view(1)

    def kfac_mc() -> None:
        metrics.FIM_MonteCarlo(model, loader, pspace.PMatKFAC).mv(vector)

    def times(matrix: Any, number: int = 1) -> Tensor:
        return repeated(lambda: matrix.mv(vector).to_torch().detach(), number)

    def dense_hessian() -> Tensor:
        H = Hessian(model, loader, pspace.PMatDense, function=lambda z, y: summed(z, y) / p.num_data)
        return H.to_torch() @ p.v

    return {
        "GGN product": lambda: times(fisher(pspace.PMatImplicit)),
        f"GGN, {PRODUCTS} products": lambda: times(fisher(pspace.PMatImplicit), PRODUCTS),
        "GGN diagonal": lambda: fisher(pspace.PMatDiag).get_diag().detach(),
        "KFAC, type-2, joint": lambda: times(fisher(pspace.PMatKFAC)),
        "KFAC, mc, joint": kfac_mc,
        "EKFAC, type-2, joint": ekfac,
        "dense Hessian": dense_hessian,
        "dense GGN": lambda: fisher(pspace.PMatDense).to_torch() @ p.v,
    }


def laplace(backend: str) -> Callable[[Problem], dict[str, Work]]:
    """laplace-torch's curvature by one of its backends: one batch at a time, of the summed loss."""

    def library(p: Problem) -> dict[str, Work]:
        import laplace.curvature as curvature

        (X, y), n, model = p.data[0], p.num_data, p.apart().model
        model.output_size = model(X).shape[1]  # as `Laplace` itself says it to the backends

        def make(kind: str, **options: Any) -> Any:
            return getattr(curvature, backend + kind)(model, "classification", **options)

        def diagonal(kind: str) -> Tensor:
            return make(kind).diag(X, y)[1].detach() / n

        def kron(kind: str, **options: Any) -> Tensor:
            return kronecker_product(make(kind, **options).kron(X, y, N=n)[1].kfacs, p.parts) / n

        def kron_mc() -> None:
            kron("GGN", stochastic=True)

        def full(kind: str) -> Tensor:
            return make(kind).full(X, y)[1].detach() @ p.v / n

        works: dict[str, Work] = {
            "GGN diagonal": lambda: diagonal("GGN"),
            "EF diagonal": lambda: diagonal("EF"),
            "KFAC, type-2": lambda: kron("GGN"),
            "KFAC, mc": kron_mc,
            "dense GGN": lambda: full("GGN"),
            "dense EF": lambda: full("EF"),
        }
        if backend == "Curvlinops":
            works |= {"KFAC, empirical": lambda: kron("EF"), "dense Hessian": lambda: full("Hessian")}
        return works

    return library


def pyhessian(kept: bool) -> Callable[[Problem], dict[str, Work]]:
    """PyHessian: walks a loader, or keeps the graph of one batch."""

    def library(p: Problem) -> dict[str, Work]:
        from pyhessian import hessian
        from pyhessian.utils import hessian_vector_product

        model = p.apart().model

        def product(times: int) -> Tensor:
            if not kept:
                walking = hessian(model, LOSS, dataloader=p.data, cuda=False)
                return repeated(lambda: flat(walking.dataloader_hv_product(p.parts)[1]), times)
            model.zero_grad()
            operator = hessian(model, LOSS, data=p.data[0], cuda=False)
            return repeated(lambda: flat(hessian_vector_product(operator.gradsH, operator.params, p.parts)), times)

        return {"Hessian product": lambda: product(1), f"Hessian, {PRODUCTS} products": lambda: product(PRODUCTS)}

    return library


def eigenthings(p: Problem) -> dict[str, Work]:
    """hessian-eigenthings: walks a loader."""
    import hessian_eigenthings as library

    model = p.apart().model

    def hessian() -> Any:
        return library.HessianOperator(model, p.data, library.supervised_loss(LOSS))

    def ggn() -> Any:
        return library.GGNOperator(model, p.data, library.supervised_forward, library.supervised_loss_of_output(LOSS))

    def ef() -> Any:
        return library.EmpiricalFisherOperator(model, p.data, library.supervised_per_sample_loss(LOSS))

    def many(make: Callable[[], Any], times: int) -> Tensor:
        operator = make()
        return repeated(lambda: operator.matvec(p.v).detach(), times)

    return {
        "Hessian product": lambda: many(hessian, 1),
        f"Hessian, {PRODUCTS} products": lambda: many(hessian, PRODUCTS),
        "GGN product": lambda: many(ggn, 1),
        f"GGN, {PRODUCTS} products": lambda: many(ggn, PRODUCTS),
        "EF product": lambda: many(ef, 1),
    }


@dataclass(frozen=True)
class Library:
    """A library by its name in a package index, and whether it takes one batch at a time."""

    package: str
    works: Callable[[Problem], dict[str, Work]]
    one_batch: bool = False
    title: str = ""

    def __str__(self) -> str:
        return self.title or self.package


LIBRARIES = (
    Library("backpack-for-pytorch", backpack, one_batch=True),
    Library("nngeometry", nngeometry),
    Library("laplace-torch", laplace("BackPack"), one_batch=True, title="laplace-torch (BackPACK)"),
    Library("laplace-torch", laplace("Curvlinops"), one_batch=True, title="laplace-torch (curvlinops)"),
    Library("pyhessian", pyhessian(kept=False)),
    Library("pyhessian", pyhessian(kept=True), one_batch=True, title="pyhessian, graph kept"),
    Library("hessian-eigenthings", eigenthings),
)
