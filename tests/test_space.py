"""TensorSpace: formats, columns, slices and what it refuses."""

import re

import numpy as np
import pytest
import torch

from curvops import TensorSpace
from curvops.space import describe

SHAPES = {"weight": (2, 3), "scale": (), "empty": (0, 4), "bias": (2,)}


@pytest.fixture
def space():
    return TensorSpace({name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()})


def test_layout(space):
    assert space.dim == 9 and space.names == list(SHAPES) and space.dtype == torch.float64
    assert [space.slice(name) for name in SHAPES] == [slice(0, 6), slice(6, 7), slice(7, 7), slice(7, 9)]
    with pytest.raises(KeyError, match="'other'"):
        space.slice("other")
    assert "dim=9" in repr(space) and "'weight'" in repr(space)


@pytest.mark.parametrize("columns", [None, 0, 1, 3])
@pytest.mark.parametrize("kind", ["flat", "list", "tuple", "dict"])
def test_there_and_back(space, kind, columns):
    shape = (9,) if columns is None else (9, columns)
    flat = torch.randn(shape, dtype=torch.float64)
    tensors = space.split(flat)
    assert [tuple(t.shape) for t in tensors] == [(*s, *shape[1:]) for s in SHAPES.values()]
    vector = {"flat": flat, "list": tensors, "tuple": tuple(tensors), "dict": dict(zip(SHAPES, tensors, strict=True))}
    found, form = space.to_columns(vector[kind], "test")
    assert torch.equal(found, flat.reshape(9, -1) if columns != 0 else flat)
    if kind == "dict":  # it may be in another order
        assert torch.equal(space.to_columns(dict(reversed(vector[kind].items())), "test")[0], found)
    again = space.from_columns(found, form)
    torch.testing.assert_close(again, vector[kind], rtol=0, atol=0)
    assert type(again) is type(vector[kind])


def parts(vector):
    if isinstance(vector, dict):
        return list(vector.values())
    return list(vector) if isinstance(vector, (list, tuple)) else [torch.as_tensor(vector)]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_lead_from_the_left(space, rows):
    flat = torch.randn(rows, 9, dtype=torch.float64)
    tensors = [t.movedim(-1, 0) for t in space.split(flat.T)]
    assert [tuple(t.shape) for t in tensors] == [(rows, *s) for s in SHAPES.values()]
    for vector in (flat, tensors, tuple(tensors), dict(zip(SHAPES, tensors, strict=True)), flat.numpy()):
        columns, form = space.to_columns(vector, "test", leading=True)
        assert torch.equal(columns, flat.T)
        again = space.from_columns(columns, form)
        assert type(again) is type(vector)
        for found, given in zip(parts(again), parts(vector), strict=True):
            torch.testing.assert_close(found, given, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"'weight', or with one leading axis of rows, got \(2, 3, 7\)"):
        space.to_columns(space.split(torch.zeros(9, 7, dtype=torch.float64)), "test", leading=True)
    with pytest.raises(ValueError, match=r"expected 9 columns .* got 8"):
        space.to_columns(flat[:, :8], "test", leading=True)


def test_arrays(space):
    array = np.arange(18.0).reshape(9, 2)[:, ::-1]
    columns, form = space.to_columns(array, "test")
    columns.zero_()
    assert array[0, 0] == 1 and isinstance(space.from_columns(columns, form), np.ndarray)
    for wrong, got in ((np.ones(9, np.float32), "float32"), (np.ones(9, int), "int64"), (np.array(["a"] * 9), "str")):
        with pytest.raises(TypeError, match=rf"expected an array of float64, got {got}.*\.astype\('float64'\)"):
            space.to_columns(wrong, "test")
    with pytest.raises(ValueError, match=r"expected 9 rows .* got 8"):
        space.to_columns(np.ones(8), "test")
    with pytest.raises(ValueError, match=r"one or two axes, got shape \(\)"):
        space.to_columns(np.array(1.0), "test")
    with pytest.raises(TypeError, match=r"expected an array of bfloat16, got float32\. Pass a tensor"):
        TensorSpace.flat(2, torch.bfloat16).to_columns(np.ones(2, np.float32), "test")


def test_subspaces(space):
    part = space.subspace(["bias", "weight"])
    assert part.names == ["weight", "bias"] and part.dim == 8 and part.dtype == space.dtype
    assert part == TensorSpace({n: torch.zeros(SHAPES[n], dtype=torch.float64) for n in ("weight", "bias")})
    assert space.positions(["scale", "bias"]).tolist() == [6, 7, 8]
    flat = TensorSpace.flat(3)
    assert (flat.dim, flat.dtype, flat.names) == (3, torch.get_default_dtype(), ["vector"])
    with pytest.raises(KeyError, match="'other'"):
        space.subspace(["other"])


def test_patterns():
    names = ["a.weight", "a.bias", "b.0.weight", "b.1.weight", "odd[0]"]
    space = TensorSpace({name: torch.zeros(1) for name in names})
    for patterns, found in (
        ("*", names),
        ("a.*", names[:2]),
        (["*.weight", "a.bias"], names[:4]),
        ("b.?.weight", names[2:4]),
        ("b.[1-9].*", names[3:4]),
        ("odd[0]", names[4:]),
        (["b.*", "a.weight"], [names[0], *names[2:4]]),
    ):
        assert space.match(patterns) == found
    for wrong, hint in (
        ("a.wieght", "near: 'a.weight'"),
        ("a", "near: 'a.*'"),
        ("zzz", "there are 'a.weight', 'a.bias', …"),
    ):
        with pytest.raises(KeyError, match=re.escape(hint)):
            space.match(wrong)


def test_mixed_precisions():
    space = TensorSpace({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64), "c": torch.zeros(1).bfloat16()})
    assert space.dtype == torch.float64
    tensors = [torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(1).bfloat16()]
    columns, form = space.to_columns(tensors, "test")
    assert columns.dtype == torch.float64
    assert [t.dtype for t in space.from_columns(columns, form)] == [t.dtype for t in tensors]
    with pytest.raises(TypeError, match=r"'b': expected torch\.float64, got torch\.float32"):
        space.to_columns([torch.ones(2), torch.ones(2), torch.ones(1).bfloat16()], "test")
    with pytest.raises(TypeError, match=r"expected torch\.float64, got torch\.float32"):
        space.to_columns(torch.ones(5), "test")
    both = TensorSpace({"a": torch.zeros(2).half(), "b": torch.zeros(2).bfloat16()})
    assert both.dtype == torch.float32 and TensorSpace({"a": torch.zeros(1).bfloat16()}).sum_dtype == torch.float32


def test_join_takes_none_for_zeros(space):
    flat = space.join([torch.ones(2, 3), None, None, torch.ones(2)])
    assert flat.dtype == torch.float64 and flat.tolist() == [1.0] * 6 + [0.0] + [1.0] * 2


def test_random_does_not_touch_the_global_state(space):
    before = torch.get_rng_state()
    a = space.random(torch.Generator().manual_seed(0), columns=2)
    assert a.shape == (9, 2) and torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, space.random(torch.Generator().manual_seed(0), columns=2))


def test_equality(space):
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    assert space == TensorSpace(tensors) and hash(space) == hash(TensorSpace(tensors))
    assert space != TensorSpace(dict(reversed(tensors.items()))) and space != 3
    assert space != TensorSpace({**tensors, "bias": torch.zeros(2)})


@pytest.mark.parametrize(
    "tensors,error,message",
    [
        ({}, ValueError, "empty dict"),
        ([torch.zeros(2)], TypeError, "expected a dict of named tensors, got list"),
        ({"b": torch.zeros(2).long()}, TypeError, "'b': expected a real floating-point tensor, got torch.int64"),
        ({"a": torch.zeros(2).to(torch.complex64)}, TypeError, "got torch.complex64"),
        ({"a": None}, TypeError, "got NoneType"),
        ({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}, ValueError, r"one device, got \['cpu', 'meta'\]"),
    ],
)
def test_what_is_no_space(tensors, error, message):
    with pytest.raises(error, match=message):
        TensorSpace(tensors)


def test_different_columns(space):
    tensors = space.split(torch.zeros(9, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="the same columns"):
        space.to_columns([tensors[0][..., :1], *tensors[1:]], "test")


def test_names_in_messages(space):
    assert space.mismatch({"bias": 0, "x": 1}) == "; missing: 'weight', 'scale', 'empty'; unknown: 'x'"
    assert space.mismatch(SHAPES) == ""
    assert describe(["a", "b"]) == "'a', 'b'"
    assert describe(list("abcdef")) == "'a', 'b', …, 'f'"


def test_sparse_vectors_are_refused():
    space = TensorSpace({"a": torch.zeros(2), "b": torch.zeros(3)})
    for vector in (torch.ones(5).to_sparse(), [torch.ones(2), torch.ones(3).to_sparse()]):
        with pytest.raises(TypeError, match=r"expected a dense tensor, got one of layout .*: pass v\.to_dense\(\)"):
            space.to_columns(vector, "test")
