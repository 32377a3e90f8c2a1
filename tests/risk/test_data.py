"""Loaders: what is walked, moved and measured, and what is refused with a reason."""

from collections import UserDict, namedtuple
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conformance import Untouched, close, draws
from kronecker.cases import Net
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from curvops import EFLinearOperator, EmpiricalRisk, GGNLinearOperator, HessianLinearOperator, KFACLinearOperator
from curvops.risk.determinism import NotFiniteWarning
from curvops.tree import tensors_of

OPERATORS = [HessianLinearOperator, GGNLinearOperator, KFACLinearOperator]
X, Y = draws(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
LOSS = nn.CrossEntropyLoss()


@pytest.fixture(params=OPERATORS)
def cls(request):
    return request.param


@pytest.fixture
def model():
    return nn.Linear(3, 2).double()


def op(model, data, cls=HessianLinearOperator, **options):
    return cls(model, LOSS, dict(model.named_parameters()), data, **options)


@pytest.fixture
def expected(model):
    return op(model, [(X, Y)]).to_dense()


def shuffling(size, **options):
    return DataLoader(TensorDataset(X, Y), size, shuffle=True, **options)


class Once:
    def __init__(self, batches):
        self.iterator = iter(batches)

    def __iter__(self):
        return self.iterator


@pytest.mark.parametrize(
    "data,error,message",
    [
        (lambda: (batch for batch in [(X, Y)]), TypeError, "generator, which can be walked only once"),
        (lambda: iter([(X, Y)]), TypeError, "list_iterator, which can be walked only once"),
        (lambda: zip([X], [Y], strict=True), TypeError, "zip, which can be walked only once"),
        (lambda: Once([(X, Y)]), TypeError, "a second pass yields nothing"),
        (list, ValueError, "the loader is empty"),
        (lambda: [(X[:0], Y[:0])], ValueError, "the loader is empty"),
        (lambda: 3, TypeError, "expected an iterable of batches"),
        (lambda: {"x": X}, TypeError, "got a dict"),
        (lambda: X, TypeError, r"got a tensor of shape \(6, 3\)\. Pass"),
        (lambda: [X], TypeError, r"expected batches \(X, y\), got a tensor of shape \(6, 3\)"),
        (lambda: (X, Y), TypeError, r"got a tuple of 2 tensors\. This is one batch: pass it in a list, \[\(X, y\)\]"),
        (lambda: TensorDataset(X, Y), TypeError, r"got TensorDataset\. .* torch\.utils\.data\.DataLoader\(dataset"),
        (
            lambda: {"x": X, "y": Y},
            TypeError,
            r"If this is one batch, pass \(\{.* if k != 'y'\}, batch\['y'\]\) in a list",
        ),
        (lambda: "loader", TypeError, "got str"),
        (lambda: [(X, Y, Y)], TypeError, r"got a tuple of 3 tensors\. .* \[\(\(a, b\), y\) for a, b, y in loader\]"),
        (lambda: [(X,)], TypeError, r"got a tuple of 1 tensors\. There are no targets"),
        (
            lambda: [{"x": X, "y": Y}],
            TypeError,
            r"a dict with keys \['x', 'y'\]. Pass pairs: .* batch\['y'\]\) for batch in",
        ),
        (lambda: [{"x": X, "labels": Y}] * 2, TypeError, r"Pass pairs: .* batch\['labels'\]\) for batch in loader"),
        (
            lambda: [(X.numpy(), Y)],
            ValueError,
            r"the number of data of X \(ndarray; it has no tensors\)\. Pass tensors",
        ),
        (lambda: shuffling(2), RuntimeError, "The loader shuffles"),
        (lambda: shuffling(6), RuntimeError, "The loader shuffles"),
        (lambda: shuffling(2, generator=torch.Generator().manual_seed(0)), RuntimeError, "The loader shuffles"),
        (lambda: DataLoader(Augmented(), 2), RuntimeError, "changes the data at each pass"),
        (lambda: DataLoader(Augmented(np.random.rand), 2), RuntimeError, "changes the data at each pass"),
    ],
)
def test_refused(model, cls, data, error, message):
    loader = data()
    with Untouched(model), pytest.raises(error, match=message):
        op(model, loader, cls)


class Augmented(Dataset):
    def __init__(self, noise=lambda: torch.randn(3)):
        self.noise = noise

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[index] + self.noise(), Y[index]


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def test_without_the_check_the_random_state_is_still_the_callers(model):
    data = DataLoader(Augmented(), 2)
    with Untouched(model):
        op(model, data, check_deterministic=False) @ draws(8)


@pytest.mark.parametrize("num_data,right", [(6, True), (5, False)])
def test_num_data_is_compared(model, cls, num_data, right):
    data = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    for check in (True, False):
        with nullcontext() if right else pytest.raises(ValueError, match="expected 5 data, the loader yields 6"):
            op(model, data, cls, num_data=num_data, check_deterministic=check) @ draws(8)


LOADERS = {
    "list": lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "tuple of lists": lambda: ([X[:4], Y[:4]], [X[4:], Y[4:]]),
    "an empty batch in between": lambda: [(X[:4], Y[:4]), (X[:0], Y[:0]), (X[4:], Y[4:])],
    "loader": lambda: DataLoader(TensorDataset(X, Y), 4),
    "loader with its own generator": lambda: DataLoader(TensorDataset(X, Y), 4, generator=torch.Generator()),
    "workers": lambda: DataLoader(TensorDataset(X, Y), 4, num_workers=2, multiprocessing_context="fork"),
    "stream": lambda: DataLoader(Stream(), 4),
}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("progressbar", [False, True])
def test_any_loader(model, expected, name, progressbar, capsys):
    data = LOADERS[name]()
    generator = getattr(data, "generator", None)
    before = None if generator is None else generator.get_state()
    with Untouched(model):
        close(op(model, data, progressbar=progressbar) @ torch.eye(8).double(), expected)
    assert generator is None or torch.equal(generator.get_state(), before)
    assert ("HessianLinearOperator" in capsys.readouterr().err) == progressbar


def test_a_sampler_with_its_own_generator_is_put_back(model):
    generator = torch.Generator().manual_seed(0)
    data = DataLoader(TensorDataset(X, Y), 6, sampler=RandomSampler(X, generator=generator))
    before = generator.get_state()
    op(model, data, check_deterministic=False) @ draws(8)
    assert torch.equal(generator.get_state(), before)


def test_progress_bars_name_the_work(model, capsys):
    kfac = op(model, [(X, Y)], KFACLinearOperator, progressbar=True)
    printed = capsys.readouterr().err
    assert "Determinism check" in printed and "KFACLinearOperator" in printed
    kfac.risk.value()
    assert "Risk" in capsys.readouterr().err


class Encoding(UserDict):
    """What a tokenizer gives: its own `.to` would change the caller's."""

    def __init__(self, data=None, encoding=None):
        super().__init__(data or {})

    def convert_to_tensors(self):
        raise AssertionError("not to be called")

    def to(self, device):
        raise AssertionError("not to be called")


Pair = namedtuple("Pair", ["a", "b"])


def added(net, inputs):
    if isinstance(inputs, (dict, UserDict)):
        assert not isinstance(inputs, dict) or inputs.get("note", "kept") == "kept"
        inputs = (inputs["a"], inputs["b"])
    a, b = inputs
    return net.linear(a + b)


def graph_convolution(net, graph):
    """Data along no axis that can be seen: a pair of edges and nodes."""
    nodes, edges = graph
    return net.linear(nodes).index_add(0, edges[0], net.linear(nodes)[edges[1]])[:4]


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, b],
        lambda a, b: Pair(a, b),
        lambda a, b: {"a": a, "b": b},
        lambda a, b: {"a": a, "b": b, "note": "kept"},
        lambda a, b: UserDict({"a": a, "b": b}),
        lambda a, b: Encoding({"a": a, "b": b}),
    ],
)
def test_inputs_of_several_tensors(cls, make):
    model, B = Net(added, linear=nn.Linear(3, 2).double()), draws(6, 3, seed=1)
    inputs = [make(X[:4], B[:4]), make(X[4:], B[4:])]
    before = [id(t) for t in tensors_of(inputs)]
    found = op(model, list(zip(inputs, Y.split([4, 2]), strict=True)), cls).to_dense()
    assert [id(t) for t in tensors_of(inputs)] == before and len(before) == 4
    params = {"weight": model.linear.weight, "bias": model.linear.bias}
    close(found, cls(model.linear, LOSS, params, [(X + B, Y)]).to_dense())


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator])
def test_batch_size_fn(cls):
    model, graph = Net(graph_convolution, linear=nn.Linear(3, 2).double()), (X, torch.tensor([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match="batch_size_fn"):
        op(model, [(graph, Y[:4])], cls)
    found = op(model, [(graph, Y[:4])], cls, batch_size_fn=lambda _: 4)
    close(found.to_dense(), found @ torch.eye(8).double())
    for inputs, kind in ((3, "int"), ((X, torch.tensor(2.0)), "a tuple of 2")):
        with pytest.raises(ValueError, match=rf"cannot see the number of data of X \({kind}"):
            op(model, [(inputs, Y[:4])], cls)


def test_wrong_targets(model):
    with pytest.raises(ValueError, match="MSELoss"):
        EmpiricalRisk(model, nn.MSELoss(), dict(model.named_parameters()), [(X, draws(6, 3))]).value()


def test_data_made_in_inference_mode(model, expected):
    with torch.inference_mode():
        data = [(X.clone(), Y.clone())]
        inside = op(model, data) @ torch.eye(8).double()
    close(inside, expected)
    for cls in OPERATORS:
        close(op(model, data, cls).to_dense(), op(model, [(X, Y)], cls).to_dense())


def test_half_precision_sums_over_many_batches_in_single():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    risk = nn.MSELoss(reduction="sum"), dict(model.named_parameters()), [(one, one * 3)] * 600
    hessian = HessianLinearOperator(model, *risk)
    # 1200 is no number of bfloat16 sums by one, which stop at 256
    assert abs(hessian.to_dense().item() / 1200 - 1) < 0.01
    assert abs((hessian @ one[0]).item() / 1200 - 1) < 0.01
    value = hessian.risk.value()
    expected = 600 * (model.weight.item() - 3) ** 2
    assert value.dtype == torch.bfloat16 and abs(value.item() / expected - 1) < 0.02


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_names_its_batch(model, value):
    data = [(X[:2], Y[:2]), (X[2:4] * value, Y[2:4]), (X[4:], Y[4:])]
    with pytest.warns(NotFiniteWarning, match="from batch 1 on \\(counted from 0\\). Are there NaNs or infinities"):
        op(model, data)
    with torch.no_grad():
        model.weight.fill_(value)
    with pytest.warns(NotFiniteWarning, match="from batch 0 on"):
        op(model, data)


def test_infinite_inputs_are_not_taken_for_others(model):
    limited = nn.Sequential(nn.Hardtanh(), model)
    op(limited, [(X / 0, Y)])  # two passes agree


def test_params_are_named_in_what_is_refused(model):
    for wrong, message in (
        (list(model.parameters()), "expected a dict of named tensors"),
        ({}, "expected at least one named"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"params: {message}"):
            HessianLinearOperator(model, LOSS, wrong, [(X, Y)])


class Read(torch.nn.Module):
    """The last state of a recurrent net."""

    def __init__(self):
        super().__init__()
        self.cell = torch.nn.GRU(2, 3, batch_first=True).double()

    def forward(self, X):
        return self.cell(X)[1][0]


def test_packed_sequences_are_those_one_by_one():
    model, sequences = Read(), [draws(n, 2, seed=n) for n in (2, 4, 1, 3)]
    packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    y = torch.tensor([0, 2, 1, 1])
    alone = [(sequence.unsqueeze(0), y[k : k + 1]) for k, sequence in enumerate(sequences)]
    for cls in (HessianLinearOperator, GGNLinearOperator, EFLinearOperator):
        close(op(model, [(packed, y)], cls).to_dense(), op(model, alone, cls).to_dense())


def test_kronecker_operators_refuse_nested_tensors():
    nested = torch.nested.nested_tensor([draws(n, 3) for n in (2, 1)], layout=torch.jagged)
    pooled = Net(lambda own, X: own.layer(torch.stack([x.mean(0) for x in X.unbind()])))
    pooled.layer = nn.Linear(3, 2).double()
    with pytest.raises(NotImplementedError, match=r"Kronecker operators take no nested tensors\. Pad them"):
        op(pooled, [(nested, Y[:2])], KFACLinearOperator)


class Irreps(tuple):
    def __len__(self):
        raise NotImplementedError


def test_attributes_may_have_lengths_of_their_own(model, expected):
    model.irreps = Irreps((1, torch.nn.ReLU()))
    close(op(model, [(X, Y)]) @ torch.eye(8).double(), expected)
