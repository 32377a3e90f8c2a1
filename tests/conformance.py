"""What every linear operator of this package must satisfy, whatever it computes.

A new operator is registered in `OPERATORS` (or handed to the checks directly) and passes.
"""

import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from curvops import (
    DiagonalOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    LinearOperator,
    OuterProductOperator,
    SubmatrixLinearOperator,
    TensorSpace,
)
from curvops.operators.inverse import InverseOperator
from curvops.substitutions import Substitutions, plain_kernels
from curvops.tree import tensors_of

Make = Callable[..., LinearOperator]


@contextmanager
def substitutions() -> Iterator[None]:
    with plain_kernels(), Substitutions():
        yield


RISK: dict[str, Make] = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "mc fisher": partial(GGNLinearOperator, mc_samples=2, seed=3),
    "ef": EFLinearOperator,
}


FISHERS: dict[str, dict[str, Any]] = {
    "type-2": {"fisher_type": "type-2"},
    "mc": {"fisher_type": "mc", "mc_samples": 2},
    "empirical": {"fisher_type": "empirical"},
}
KRONECKER: dict[str, Make] = {
    f"{name} {kind} {approx} {blocks}": partial(
        cls, **fisher, kfac_approx=approx, separate_weight_and_bias=blocks == "separate"
    )
    for name, cls in (("kfac", KFACLinearOperator), ("ekfac", EKFACLinearOperator))
    for kind, fisher in (FISHERS | {"forward-only": {"fisher_type": "forward-only"}}).items()
    for approx in ("expand", "reduce")
    for blocks in ("separate", "joint")
    if (name, kind) != ("ekfac", "forward-only")  # there are no eigenvalues to correct
}
for kind, fisher in FISHERS.items():
    KRONECKER[f"kfoc {kind}"] = partial(KFOCLinearOperator, **fisher)
    KRONECKER[f"diagonal {kind}"] = partial(GGNDiagonalLinearOperator, **fisher)

ALGEBRA: dict[str, Make] = {
    "sum": lambda *a, **k: HessianLinearOperator(*a, **k) + EFLinearOperator(*a, **k),
    "difference": lambda *a, **k: HessianLinearOperator(*a, **k) - 0.3 * GGNLinearOperator(*a, **k),
    "scaled": lambda *a, **k: -(GGNLinearOperator(*a, **k) / 3) * 2.0,
    "product": lambda *a, **k: GGNLinearOperator(*a, **k) @ HessianLinearOperator(*a, **k),
    "inverse": lambda *a, **k: InverseOperator(GGNLinearOperator(*a, **k), damping=1.0, tolerance=1e-13),
    "adjoint": lambda *a, **k: (KFACLinearOperator(*a, **k) @ (2 * EFLinearOperator(*a, **k))).T,
}


def entries(*a: Any, **k: Any) -> LinearOperator:
    return SubmatrixLinearOperator(HessianLinearOperator(*a, **k), [5, 0, 5], slice(3, 9))


def space_of(*a: Any, **k: Any) -> TensorSpace:
    return HessianLinearOperator(*a, **k).domain


def low_rank(*a: Any, **k: Any) -> LinearOperator:
    space = space_of(*a, **k)
    u, d = draws(space.dim, 2), draws(space.dim, seed=1).square()
    return OuterProductOperator(u, codomain=space) + DiagonalOperator(d, space)


# of a problem whose modules have numbers for names; not all between the spaces of all parameters
COMBINED: dict[str, Make] = {
    "damped hessian": lambda *a, **k: HessianLinearOperator(*a, **k).damped(0.1),
    "damped kfac": lambda *a, **k: KFACLinearOperator(*a, **k).damped(0.1),
    "scaled and damped ekfac": lambda *a, **k: (6 * EKFACLinearOperator(*a, **k)).damped(0.1),
    "shifted diagonal": lambda *a, **k: GGNDiagonalLinearOperator(*a, **k) + IdentityOperator(space_of(*a, **k), 0.5),
    "square": lambda *a, **k: (lambda ggn: ggn @ ggn)(GGNLinearOperator(*a, **k)),
    "layer": lambda *a, **k: HessianLinearOperator(*a, **k)["0.*"],
    "off-diagonal": lambda *a, **k: GGNLinearOperator(*a, **k)["*.bias", "0.*"],
    "layer of a sum": lambda *a, **k: (EFLinearOperator(*a, **k) + 2 * KFACLinearOperator(*a, **k))["0.*"],
    "layers of kfac": lambda *a, **k: KFACLinearOperator(*a, **k)[["0.bias", "*.weight"]],
    "part of a joint block": lambda *a, **k: KFACLinearOperator(*a, separate_weight_and_bias=False, **k)["0.bias"],
    "part of a product": lambda *a, **k: ALGEBRA["product"](*a, **k)["0.bias", "*.weight"],
    "entries": entries,
    "low rank": low_rank,
}

OPERATORS: dict[str, Make] = {**RISK, **KRONECKER, **ALGEBRA}
# one of each kind and option, where all combinations would take long
SOME = [
    *RISK,
    *ALGEBRA,
    "kfac type-2 expand separate",
    "kfac mc reduce joint",
    "kfac empirical expand joint",
    "kfac forward-only expand separate",
    "ekfac type-2 expand joint",
    "ekfac mc expand separate",
    "ekfac empirical expand separate",
    "kfoc type-2",
    "diagonal type-2",
]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    scale = b.abs().max().item() if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (scale or 1.0))


def draws(dim: int, columns: int | None = None, seed: int = 0) -> Tensor:
    shape = (dim,) if columns is None else (dim, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_shape(op: LinearOperator) -> None:
    assert op.shape == (op.codomain.dim, op.domain.dim)
    assert op.dtype == op.domain.dtype and op.device == op.domain.device
    assert f"{op.shape[0]} × {op.shape[1]}" in repr(op) and op.name in repr(op)
    if op.psd:
        assert op.symmetric


def check_dense(op: LinearOperator) -> Tensor:
    dense = op.to_dense()
    assert dense.shape == op.shape and dense.dtype == op.dtype and not dense.requires_grad
    assert torch.isfinite(dense).all()
    eye = torch.eye(op.shape[1], dtype=op.dtype)
    columns = op @ eye
    close(dense, columns, 1e-9)
    few = range(0, op.shape[1], max(1, op.shape[1] // 5))
    close(torch.stack([op @ eye[k] for k in few], 1), columns[:, list(few)])
    return columns


def check_linear(op: LinearOperator, dense: Tensor) -> None:
    a, b = draws(op.shape[1], seed=1), draws(op.shape[1], seed=2)
    close(op @ (2 * a - 3 * b), 2 * (op @ a) - 3 * (op @ b))
    close(op @ a, dense @ a)
    assert not (op @ torch.zeros_like(a)).any()


def check_adjoint(op: LinearOperator, dense: Tensor) -> None:
    u, v = draws(op.shape[0], seed=3), draws(op.shape[1], seed=4)
    close(u @ (op @ v), (op.T @ u) @ v)
    close(op.T @ u, dense.T @ u)
    close(op.H.T @ v, op @ v)
    assert op.adjoint().shape == (op.shape[1], op.shape[0])
    if op.symmetric:
        assert op.T is op
        close(dense, dense.T)
    if op.psd:
        smallest, largest = torch.linalg.eigvalsh((dense + dense.T) / 2)[[0, -1]]
        assert smallest >= -1e-12 * largest


def check_left(op: LinearOperator, dense: Tensor) -> None:
    u = draws(op.shape[0], 2, seed=5)
    close(u[:, 0] @ op, u[:, 0] @ dense)
    close(u.T @ op, u.T @ dense)
    close(torch.cat([t.flatten() for t in op.codomain.split(u[:, 0]) @ op]), u[:, 0] @ dense)
    rows = [t.movedim(-1, 0) for t in op.codomain.split(u)]
    for given in (rows, dict(zip(op.codomain.names, rows, strict=True))):
        found = given @ op
        parts = list(found.values()) if isinstance(found, dict) else found
        assert [tuple(t.shape) for t in parts] == [(2, *s) for s in op.domain.shapes.values()]
        close(torch.cat([t.reshape(2, -1) for t in parts], 1), u.T @ dense)


def check_numpy(op: LinearOperator, dense: Tensor) -> None:
    u, v = draws(op.shape[0], 2, seed=7).numpy(), draws(op.shape[1], 2, seed=8).numpy()
    v.setflags(write=False)
    for found, expected in (
        (op @ v, dense.numpy() @ v),
        (op @ v[:, 0], dense.numpy() @ v[:, 0]),
        (op @ v[:, ::-1], dense.numpy() @ v[:, ::-1]),
        (u.T @ op, u.T @ dense.numpy()),
        (u[:, 0] @ op, u[:, 0] @ dense.numpy()),
    ):
        assert isinstance(found, np.ndarray) and found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * (np.abs(expected).max() or 1.0))


def check_formats(op: LinearOperator, dense: Tensor) -> None:
    for columns in (None, 2, 0):
        v = draws(op.shape[1], columns)
        expected, trailing = dense @ v, () if columns is None else (columns,)
        assert (op @ v).shape == expected.shape
        close(op @ v, expected)
        tensors = op.domain.split(v)
        named = dict(zip(op.domain.names, tensors, strict=True))
        for given in (tensors, tuple(tensors), named, dict(reversed(named.items()))):
            found = op @ given
            assert type(found) is type(given)
            if isinstance(found, dict):
                assert list(found) == op.codomain.names
            parts = list(found.values()) if isinstance(found, dict) else found
            assert [tuple(t.shape) for t in parts] == [(*s, *trailing) for s in op.codomain.shapes.values()]
            sizes = op.codomain.sizes
            close(torch.cat([t.reshape(n, *trailing) for t, n in zip(parts, sizes, strict=True)]), expected)


def check_any_memory(op: LinearOperator, dense: Tensor) -> None:
    """Strided, differentiable and inference vectors, which stay as they are; results own their memory."""
    v = draws(op.shape[1], 3)
    strided = draws(op.shape[1], 6)[:, ::2]
    close(op @ strided, dense @ strided)
    close(op @ v.T.contiguous().T, dense @ v)
    close(op @ v[:, :1].expand(-1, 2), dense @ v[:, :1].expand(-1, 2))
    leaf, before, w = v.clone().requires_grad_(), v.clone(), draws(op.shape[0], 3, seed=6)
    found = op @ leaf
    close(found.detach(), dense @ v)
    (w * found).sum().backward()
    close(leaf.grad, dense.T @ w)
    found.detach().add_(1.0)
    assert torch.equal(leaf, before)
    with torch.no_grad():
        assert not (op @ leaf).requires_grad
    assert not (op @ v).requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = op @ v.clone()
        close(found, dense @ v)
        assert not found.is_inference()


def check_errors(op: LinearOperator) -> None:
    dim, tensors = op.shape[1], op.domain.split(draws(op.shape[1]))
    v, named = draws(dim), dict(zip(op.domain.names, tensors, strict=True))
    wrong: list[tuple[type[Exception], str, Any]] = [
        (ValueError, f"expected {dim} rows", draws(dim + 1)),
        (ValueError, "one or two axes", v.reshape(1, 1, -1)),
        (ValueError, "one or two axes", v[0]),
        (TypeError, r"got torch\.float32", v.float()),
        (TypeError, r"got torch\.int64", v.long()),
        (ValueError, "on meta", v.to("meta")),
        (TypeError, r"expected an array of float64, got float32.*\.astype\('float64'\)", v.float().numpy()),
        (TypeError, "got int", (3.5).__int__()),
        (ValueError, f"expected {len(tensors)} tensors", [*tensors, tensors[0]]),
        (ValueError, "unknown: 'more'", {**named, "more": v}),
        (ValueError, "missing: ", {"more": v}),
        (TypeError, "expected a tensor for", [None] * len(tensors)),
        (ValueError, "expected shape", [t[..., None, None] for t in tensors]),
        (TypeError, r"got torch\.float32", [t.float() for t in tensors]),
    ]
    for error, message, vector in wrong:
        with pytest.raises(error, match=message) as caught:
            op @ vector
        assert f"'{op.name} @ v'" in str(caught.value)


def check_scipy(op: LinearOperator, dense: Tensor) -> None:
    from scipy.sparse.linalg import aslinearoperator

    u, v = draws(op.shape[0]).numpy(), draws(op.shape[1], 2).numpy()
    for dtype, tolerance in ((None, 1e-10), (np.float32, 1e-5)):
        view = op.to_scipy(dtype)
        assert view.shape == op.shape and view.dtype == (dtype or np.float64)
        for found, expected in (
            (view @ v[:, 0], dense.numpy() @ v[:, 0]),
            (view @ v, dense.numpy() @ v),
            (view.H @ u, dense.numpy().T @ u),
        ):
            assert found.dtype == view.dtype and found.shape == expected.shape
            scale = np.abs(expected).max() or 1.0
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)
    with pytest.raises(TypeError, match=r"SciPy takes op\.to_scipy\(\)"):
        aslinearoperator(op)
    for wrong in (np.asarray, np.linalg.eigvalsh, lambda array: np.dot(array, v)):
        with pytest.raises(TypeError, match=r"NumPy takes its matrix, op\.to_dense\(\)\.numpy\(\)"):
            wrong(op)


class Untouched:
    def __init__(self, model: torch.nn.Module, data: Iterable[Any] = ()) -> None:
        self.model, self.data = model, data

    def __enter__(self) -> None:
        self.before = self._look()

    def __exit__(self, *_: object) -> None:
        for (name, was), (_, now) in zip(self.before, self._look(), strict=True):
            same = torch.equal(was, now) if isinstance(was, Tensor) and isinstance(now, Tensor) else was == now
            assert same, f"{name} changed from {was} to {now}"

    def _look(self) -> list[tuple[str, Any]]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        tensors = [*named, *((f"datum {k}", t) for k, t in enumerate(tensors_of(list(self.data))))]
        return [
            ("names", [name for name, _ in tensors]),
            ("identity", [(id(t), t.requires_grad, t.device, t.dtype) for _, t in tensors]),
            # what a model does to its buffers is put back in place
            ("versions", [t._version for name, t in tensors if name not in dict(self.model.named_buffers())]),
            *((name, t.detach().clone()) for name, t in tensors),
            *((f"{name}.grad", None if t.grad is None else t.grad.clone()) for name, t in named),
            ("modes", [m.training for m in self.model.modules()]),
            ("hooks", [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()]),
            ("torch's random state", torch.get_rng_state()),
            ("NumPy's random state", pickle.dumps(np.random.get_state())),  # noqa: NPY002 — the global one is what must not move
            ("Python's random state", random.getstate()),
            ("autocast", (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))),
            ("autocast's cache", torch.is_autocast_cache_enabled()),
            ("gradient modes", (torch.is_grad_enabled(), torch.is_inference_mode_enabled())),
            ("function modes", len(_get_current_function_mode_stack())),
            ("attention", torch.backends.cuda.flash_sdp_enabled()),
            ("cuDNN", torch.backends.cudnn.enabled),
            ("default dtype", torch.get_default_dtype()),
        ]


def check_inverse(op: LinearOperator, dense: Tensor) -> None:
    if op.psd and op.domain == op.codomain:
        v, damping = draws(op.shape[0], seed=9), float(dense.diagonal().amax()) or 1.0
        x = op.inverse(damping) @ v
        close(dense @ x + damping * x, v, 1e-5)


def conforms(op: LinearOperator) -> None:
    check_shape(op)
    dense = check_dense(op)
    for check in (
        check_linear,
        check_adjoint,
        check_left,
        check_formats,
        check_numpy,
        check_any_memory,
        check_scipy,
        check_inverse,
    ):
        check(op, dense)
    check_errors(op)
