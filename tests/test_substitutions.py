"""Each substitution has the original's value, and derivatives that central differences confirm."""

from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conformance import substitutions
from oracles import real
from problems import WEIGHT
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.functional import hessian

from curvops.products.judge import compare
from curvops.products.reference import GradientLinearization
from curvops.space import TensorSpace
from curvops.substitutions import TABLE

ROWS = torch.tensor([[[1.0], [0.0], [1.0]], [[0.0], [0.0], [0.0]]]).double()  # zero where there is padding
LISTS = torch.tensor([[2, 0, -1], [1, -1, 0], [0, 1, 2]])
LABELS = torch.tensor([0, 2, 1, 1])
BAGS = torch.tensor([[0, 3, 3], [1, 2, 4]])
FLAT, OFFSETS = torch.tensor([0, 3, 3, 1, 2, 4]), torch.tensor([0, 3, 3, 5])
RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


def batch_norm(x, *affine, training=False):
    return F.batch_norm(x, torch.zeros(3).double(), torch.ones(3).double(), *affine, training)


def of_one_datum(norm):
    """A norm of one datum, whose gradient comes as of positions before channels."""
    return lambda x, *affine: norm(x, *affine).flatten(2).transpose(1, 2).contiguous().cos()


def bag(mode, *inputs, weights=False, **options):
    leaves = (real(5, 3), real(*inputs[0].shape, seed=1))[: 1 + weights]
    bags, *offsets = inputs
    return lambda w, s=None: F.embedding_bag(bags, w, *offsets, mode=mode, per_sample_weights=s, **options), leaves


def recurrent(kind, **options):
    cls, fixed = RECURRENT[kind]
    layer = cls(2, 2, **fixed, **options).double()
    names, leaves = zip(*layer.named_parameters(), strict=True)

    def function(x, *ps):
        return torch.func.functional_call(layer, dict(zip(names, ps, strict=True)), (x,))[0]

    return function, (real(3, 2, 2), *(p.detach() for p in leaves))


CASES = {
    "hardsigmoid": (F.hardsigmoid, (real(7) * 2,)),
    "hardsigmoid in place": (lambda x: F.hardsigmoid(x * 2, inplace=True), (real(7),)),
    **{
        f"weight norm, dim {dim}": (partial(torch._weight_norm, dim=dim), (real(2, 3, 2), g))
        for dim, g in ((0, real(2, 1, 1)), (2, real(1, 1, 2)), (-1, real(1, 1, 1)[0, 0, 0]))
    },
    **{f"norm except {dim}": (partial(torch.norm_except_dim, dim=dim), (real(2, 3, 2),)) for dim in (0, 2, -1)},
    "batch norm, train": (partial(batch_norm, training=True), (real(4, 3), real(3), real(3))),
    "batch norm, eval": (batch_norm, (real(4, 3, 2), real(3), real(3))),
    **{
        f"{mode} of bags, {name}": bag(mode, *inputs, **options)
        for mode in ("sum", "mean", "max")
        for name, inputs, options in (
            ("rectangular", (BAGS,), {}),
            ("offsets", (FLAT, OFFSETS), {}),
            ("last offset", (FLAT, torch.tensor([0, 2, 2, 6])), {"include_last_offset": True}),
            ("padding", (FLAT, OFFSETS), {"padding_idx": 3}),
            ("negative padding", (BAGS,), {"padding_idx": -1}),
            ("empty", (FLAT[:0], OFFSETS[:1]), {}),
        )
    },
    "weighted bags": bag("sum", BAGS, weights=True),
    "weighted bags, offsets": bag("sum", FLAT, OFFSETS, weights=True, padding_idx=3),
    "embedding": (lambda w: F.embedding(BAGS, w), (real(5, 3),)),
    "embedding, padding": (lambda w: F.embedding(BAGS, w, padding_idx=-2), (real(5, 3),)),
    **{
        f"margin loss {options}": (partial(F.multi_margin_loss, target=LABELS, margin=0.8, **options), (real(4, 3),))
        for p, reduction, weight in product((1, 2), ("mean", "sum", "none"), (None, WEIGHT))
        for options in [{"p": p, "reduction": reduction, "weight": weight}]
    },
    "margin loss of one datum": (lambda z: F.multi_margin_loss(z, LABELS[1], reduction="none"), (real(3),)),
    **{
        f"multilabel margin loss, {kind}": (
            partial(F.multilabel_margin_loss, target=LISTS, reduction=kind),
            (real(3, 3),),
        )
        for kind in ("mean", "sum", "none")
    },
    **{
        f"distances, p = {p}": (partial(torch.cdist, p=p), (real(3, 4), real(2, 4, seed=1)))
        for p in (1.0, 1.5, 2.0, 3.0)
    },
    "distances of batches": (torch.cdist, (real(2, 3, 4), real(2, 2, 4, seed=1))),
    "distances of the same": (lambda x: torch.cdist(x, x), (real(3, 2),)),
    **{f"pairs, p = {p}": (partial(torch.pdist, p=p), (real(4, 3),)) for p in (1.0, 2.0, 3.0)},
    **{kind: recurrent(kind) for kind in RECURRENT},
    "two bidirectional layers": recurrent("gru", num_layers=2, bidirectional=True),
    "projected": recurrent("lstm", proj_size=1),
    **{
        f"attention, causal {causal}": (partial(F.scaled_dot_product_attention, is_causal=causal), real(3, 2, 3, 2))
        for causal in (False, True)
    },
}
# of rows of which some are zero, whatever the input is
NORMS = {
    "method": lambda x: x.norm(dim=-1),
    "method, all": lambda x: (x[1] + 0.0).norm() + x.norm(),
    "method, axes": lambda x: x.norm(2, (0, 2), True),
    "method, p = 3": lambda x: x.norm(p=3, dim=2),
    "function": lambda x: torch.norm(x, dim=1),
    "function, p = none": lambda x: torch.norm(x, None, -1),
    "function, fro": lambda x: torch.norm(x, "fro", (1, 2), keepdim=True),
    "function, nuc": lambda x: torch.norm(x[0, ::2], "nuc"),
    "of vectors": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "of vectors, several axes": lambda x: torch.linalg.vector_norm(x, 2, dim=(-1, 1), keepdim=True),
    "of vectors, whole": lambda x: torch.linalg.vector_norm(x[1]),
    "of one number": lambda x: torch.linalg.vector_norm(x[0, 1, 0]) + torch.linalg.vector_norm(x[0, 0, 0]),
    "linalg": lambda x: torch.linalg.norm(x, dim=-1),
    "linalg, all": lambda x: torch.linalg.norm(x[1]) + torch.linalg.norm(x),
    "linalg, ord = 2": lambda x: torch.linalg.norm(x, 2, dim=-1, keepdim=True),
    "linalg, fro": lambda x: torch.linalg.norm(x, "fro", dim=(1, 2)),
    "linalg, nuc": lambda x: torch.linalg.norm(x[0, ::2], "nuc"),
    "of matrices": lambda x: torch.linalg.matrix_norm(x),
    "of matrices, nuc": lambda x: torch.linalg.matrix_norm(x[0, ::2], "nuc"),
    "normalised": lambda x: F.normalize(x, dim=-1),
    "normalised, p = 3": lambda x: F.normalize(x, 3.0, dim=1),
    "normalised to the bound": lambda x: F.normalize(x, dim=2, eps=1.0),
    "cosines": lambda x: F.cosine_similarity(x, x.flip(1).cos(), dim=-1),
    "cosines of matrices": lambda x: F.cosine_similarity(x, x[0].cos(), dim=1, eps=0.5),
    "distances of the same": lambda x: torch.cdist(x, x),
    "weight norms of the same": lambda x: torch.norm_except_dim(x, 2, 0),
}
aten = torch.ops.aten
STATISTICS = torch.zeros(3).double(), torch.ones(3).double()
STATE = torch.zeros(1, 2, 2).double()
FLAT_BAGS = BAGS.flatten(), torch.tensor([0, 3])
# as exported programs call them
OVERLOADS = {
    "hardsigmoid": (aten.hardsigmoid.default, (real(7) * 2,)),
    "hardsigmoid in place": (lambda x: aten.hardsigmoid_.default(x * 2), (real(7),)),
    "weight norm": (aten._weight_norm.default, (real(2, 3, 2), real(2, 1, 1))),
    "weight norm, any": (lambda v, g: aten._weight_norm(v, g, 2), (real(2, 3, 2), real(1, 1, 2))),
    "norm except": (lambda v: aten.norm_except_dim.default(v, 2, 1), (real(2, 3, 2),)),
    "batch norm": (
        lambda x, w, b: aten.batch_norm.default(x, w, b, *STATISTICS, False, 0.1, 1e-5, False),
        (real(1, 3, 2), real(3), real(3)),
    ),
    "batch norm, function": (
        lambda x, w: torch.batch_norm(x, w, None, *STATISTICS, False, 0.1, 1e-5, False),
        (real(1, 3, 2), real(3)),
    ),
    "batch norm, decomposed": (
        lambda x, w, b: aten._native_batch_norm_legit_no_training.default(x, w, b, *STATISTICS, 0.1, 1e-5)[0],
        (real(1, 3, 2), real(3), real(3)),
    ),
    "instance norm": (
        lambda x: aten.instance_norm.default(x, None, None, None, None, True, 0.1, 1e-5, False),
        (real(1, 3, 4),),
    ),
    "instance norm, function": (
        lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        (real(1, 3, 4),),
    ),
    "attention": (lambda *x: aten.scaled_dot_product_attention.default(*x, is_causal=True), tuple(real(3, 1, 2, 3, 2))),
    "embedding": (lambda w: aten.embedding.default(w, BAGS), (real(5, 3),)),
    "embedding, padding": (lambda w: aten.embedding.default(w, BAGS, 3), (real(5, 3),)),
    "bags": (lambda w: aten.embedding_bag.default(w, *FLAT_BAGS)[0], (real(5, 3),)),
    "bags, padding": (
        lambda w, s: aten.embedding_bag.padding_idx(w, *FLAT_BAGS, False, 0, False, s, False, 3)[0],
        (real(5, 3), real(6)),
    ),
    "bags, decomposed": (lambda w: aten._embedding_bag.default(w, *FLAT_BAGS, False, 1)[0], (real(5, 3),)),
    "distances": (lambda x, y: aten.cdist.default(x, y, 3.0), (real(3, 4), real(2, 4, seed=1))),
    "distances, decomposed": (
        lambda x, y: aten._cdist_forward.default(x, y, 2.0, None),
        (real(3, 4), real(2, 4, seed=1)),
    ),
    "pairs": (aten.pdist.default, (real(4, 3),)),
    "pairs, decomposed": (aten._pdist_forward.default, (real(4, 3),)),
    "margin loss": (lambda z: aten.multi_margin_loss.default(z, LABELS, 2, 0.8, WEIGHT, 2), (real(4, 3),)),
    "multilabel margin loss": (lambda z: aten.multilabel_margin_loss.default(z, LISTS, 0), (real(3, 3),)),
    "norm of vectors": (lambda x: aten.linalg_vector_norm.default(x * ROWS, 2, [-1], True), (real(2, 3, 2),)),
    "linalg norm": (lambda x: aten.linalg_norm.default(x * ROWS, None, [-1]), (real(2, 3, 2),)),
    "linalg norm, fro": (lambda x: aten.linalg_norm.ord_str(x * ROWS, "fro", [1, 2]), (real(2, 3, 2),)),
    "norm of matrices": (lambda x: aten.linalg_matrix_norm.str_ord(x * ROWS, "fro", [1, 2]), (real(2, 3, 2),)),
    "norm": (lambda x: aten.norm.ScalarOpt_dim(x * ROWS, None, [-1], True), (real(2, 3, 2),)),
    "norm, all": (lambda x: aten.norm.Scalar((x * ROWS)[1]) + aten.norm.Scalar(x, 3), (real(2, 3, 2),)),
    "lstm": (
        lambda x, *ps: aten.lstm.input(x, [STATE, STATE], ps, True, 1, 0.0, False, False, False)[0],
        (real(3, 2, 2), real(8, 2), real(8, 2, seed=1), real(8), real(8, seed=1)),
    ),
    **{
        kind: (
            lambda x, *ps, kind=kind: getattr(aten, kind).input(x, STATE, ps, True, 1, 0.0, False, False, False)[0],
            (real(3, 2, 2), real(size, 2), real(size, 2, seed=1), real(size), real(size, seed=1)),
        )
        for kind, size in (("gru", 6), ("rnn_tanh", 2), ("rnn_relu", 2))
    },
    "cosines": (lambda x: aten.cosine_similarity.default(x * ROWS, x.cos(), -1), (real(2, 3, 2),)),
}
CASES |= {f"overload, {name}": case for name, case in OVERLOADS.items()}
CASES |= {f"norm, {name}": (lambda x, f=f: f(x * ROWS), (real(2, 3, 2),)) for name, f in NORMS.items()}
if hasattr(F, "linear_cross_entropy"):
    CASES |= {
        f"linear cross-entropy {sorted(options)}": (
            lambda x, w, b, options=options: F.linear_cross_entropy(x, w, LABELS, linear_bias=b, **options),
            (real(4, 2), real(3, 2, seed=1), real(3, seed=2)),
        )
        for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 2}, {"reduction": "none"})
    }
if hasattr(F, "grouped_mm"):
    CASES["grouped product"] = (
        lambda a, b: F.grouped_mm(a, b, offs=torch.tensor([1, 4], dtype=torch.int32)),
        (real(4, 2), real(2, 2, 3, seed=1)),
    )
if hasattr(torch, "_grouped_mm"):
    CASES["overload, grouped product"] = (
        lambda a, b: aten._grouped_mm.default(a, b, torch.tensor([1, 4], dtype=torch.int32)),
        (real(4, 2), real(2, 2, 3, seed=1)),
    )
# the originals have no kernel, or refuse, in double precision
WITHOUT_ORIGINAL = {"grouped product", "overload, grouped product"}
ONE_DATUM = {
    "batch norm": (batch_norm, (real(1, 3, 2, 2), real(3), real(3))),
    "batch norm, train": (partial(batch_norm, training=True), (real(1, 3, 2, 2), real(3), real(3))),
    "instance norm": (F.instance_norm, (real(1, 3, 2, 2),)),
}


def weights(out):
    return torch.arange(1, out.numel() + 1, dtype=out.dtype).cos().reshape(out.shape)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_ORIGINAL])
def test_same_value_and_gradient(name):
    function, inputs = CASES[name]

    def value_and_gradient():
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, weights(out), allow_unused=True)

    expected = value_and_gradient()
    with substitutions():
        found = value_and_gradient()
    # PyTorch's own slope of hardsigmoid is 1/6 in single precision
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 if "hardsigmoid" in name else 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_second_derivative(name):
    function, inputs = CASES[name]
    space = TensorSpace({str(k): t for k, t in enumerate(inputs)})
    flat = torch.cat([t.flatten() for t in inputs])

    def value(*leaves):
        out = function(*leaves)
        return (out * weights(out)).tanh().sum()

    for seed in range(2):
        v = space.random(torch.Generator().manual_seed(seed))

        def gradient(step, v=v):
            leaves = [t.requires_grad_() for t in space.split(flat + step * v)]
            return space.join(torch.autograd.grad(value(*leaves), leaves, allow_unused=True))

        with substitutions():
            leaves = {str(k): t.clone().requires_grad_() for k, t in enumerate(inputs)}
            second = space.join(GradientLinearization(value(*leaves.values()), leaves, space).parts(v))
            verdict = compare(second, gradient)
        assert verdict.error is not None and verdict.error < 1e-6


@pytest.mark.parametrize("name", NORMS)
def test_norms_have_the_same_bits_and_no_branch_that_a_transform_refuses(name):
    function, (x,) = CASES[f"norm, {name}"]
    many = torch.stack([x, 2 * x])
    values = torch.stack([function(each) for each in many])

    def scalar(x):
        return (function(x) * weights(function(x))).tanh().sum()

    def slope(x):
        return torch.autograd.grad(scalar(x.requires_grad_()), x)[0]

    steps = 1e-5 * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    columns = torch.stack([(slope(x + step) - slope(x - step)) / 2e-5 for step in steps]).view(len(steps), -1)
    with substitutions():
        found = torch.func.vmap(function)(many)
        second = torch.func.jacfwd(torch.func.grad(scalar))(x).reshape(columns.shape)
    exact = "cosines" not in name and "distances" not in name
    torch.testing.assert_close(found, values, rtol=0, atol=0 if exact else 1e-14)
    torch.testing.assert_close(second, columns, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ONE_DATUM)
def test_the_gradient_of_norms_of_one_datum(name):
    """PyTorch's own is wrong where it comes in another order than the output's."""
    norm, inputs = ONE_DATUM[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    with substitutions():
        assert torch.autograd.gradcheck(of_one_datum(norm), leaves, raise_exception=False)
        assert torch.autograd.gradgradcheck(of_one_datum(norm), leaves, raise_exception=False)


def test_every_entry_is_tried():
    tried = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            tried.add(func)
            return func(*args, **(kwargs or {}))

    for name, (function, inputs) in (CASES | ONE_DATUM).items():
        with substitutions() if name in WITHOUT_ORIGINAL else nullcontext(), Watch():
            function(*inputs)
    operators = {f for f in TABLE if isinstance(f, (OpOverload, OpOverloadPacket))}
    # what torch.compile's own functions call is the same function under another name
    names = {getattr(f, "__name__", "").strip("_") for f in tried}
    assert {f.__name__.strip("_") for f in TABLE.keys() - operators} <= names
    # all overloads of an operator have one substitute, which takes their arguments
    assert {str(f).split(".")[1] for f in operators} <= {str(f).split(".")[1] for f in tried & operators}


def test_legacy_reduction_of_the_margin_loss():
    z = real(4, 3)
    with pytest.warns(UserWarning, match="deprecated"):
        expected = F.multi_margin_loss(z, LABELS, size_average=False)
        with substitutions():
            torch.testing.assert_close(F.multi_margin_loss(z, LABELS, size_average=False), expected)


@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag])
def test_a_bound_on_norms_leaves_the_table_alone(function):
    table = real(5, 3)
    expected = function(BAGS, table.clone(), max_norm=0.5)
    with substitutions():
        leaf = table.clone().requires_grad_()
        found = function(BAGS, leaf, max_norm=0.5)
    torch.testing.assert_close(found, expected)
    assert torch.equal(leaf, table) and found.requires_grad


def test_what_is_changed_in_place_and_what_is_not():
    mean, variance, x = torch.zeros(3), torch.ones(3), real(5)
    expected = F.hardsigmoid(x.clone())
    with substitutions():
        F.batch_norm(torch.randn(4, 3), mean, variance, training=True)
        F.hardsigmoid(x, inplace=True)
    assert not mean.any() and bool((variance == 1).all())
    torch.testing.assert_close(x, expected)


def test_the_table_is_off_outside():
    with pytest.raises(RuntimeError, match="not implemented"):
        hessian(lambda z: F.multi_margin_loss(z, LABELS, p=2), real(4, 3))
