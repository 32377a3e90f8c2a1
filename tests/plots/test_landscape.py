"""The loss is evaluated elsewhere, and the caller's parameters are afterwards what they were, to the bit."""

import pytest
import torch

from curvops import HessianLinearOperator
from curvops.plots import Landscape
from curvops.plots.landscape import displaced


class Failing(torch.nn.Module):
    """A model that fails at its n-th call."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.last = inner, 0, None

    def forward(self, X):
        self.calls += 1
        if self.calls == self.last:
            raise RuntimeError("out of patience")
        return self.inner(X)


def problem(dtype=torch.float32):
    torch.manual_seed(3)
    model = Failing(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))).to(dtype)
    with torch.no_grad():  # numbers that no sum gives back
        model.inner[0].weight.mul_(1e-7)
        model.inner[0].bias[0] = -0.0
    data = [(torch.rand(5, 3, dtype=dtype), torch.rand(5, 2, dtype=dtype))]
    return model, HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)


def bits(model):
    return [p.detach().clone().view(torch.uint8) for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_bit_equal_afterwards_also_after_a_failure(dtype, fails):
    model, operator = problem(dtype)
    before, tensors = bits(model), list(model.parameters())
    line = Landscape(operator, [torch.ones(26, dtype=dtype)])
    steps = torch.linspace(-1e3, 1e3, 7).unsqueeze(1)
    if fails:
        model.last = model.calls + 3
        with pytest.raises(RuntimeError, match="out of patience"):
            line.losses(steps)
    else:
        assert len(set(line.losses(steps).tolist())) == 7
    assert all(map(torch.equal, before, bits(model)))
    assert all(p is q and p.requires_grad for p, q in zip(tensors, model.parameters(), strict=True))


def test_a_graph_of_the_callers_and_linearized_stay_good():
    model, operator = problem()
    v = torch.ones(26)
    loss = model(torch.rand(5, 3)).square().sum()
    with operator.linearized():
        expected = operator @ v
        Landscape(operator, [v]).losses(torch.ones(2, 1))
        torch.testing.assert_close(operator @ v, expected)
    loss.backward()


def test_gradients_of_the_caller_and_the_random_state_stay():
    model, operator = problem()
    model(torch.rand(5, 3)).sum().backward()
    gradients, state = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    Landscape(operator, [torch.ones(26)]).losses(torch.ones(2, 1))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_without_a_gradient_strided_and_in_half_precision_are_moved_and_put_back():
    tensors = [torch.rand(4, 3).T, torch.rand(3).bfloat16(), torch.tensor([float("nan"), float("inf")])]
    before = [t.clone() for t in tensors]
    with displaced(tensors) as move:
        move([torch.ones_like(t) for t in tensors])
        assert torch.equal(tensors[0], before[0] + 1)
        move([torch.zeros_like(t) for t in tensors])
        assert torch.equal(tensors[0], before[0])
        move([torch.ones_like(t) for t in tensors])
    for tensor, own in zip(tensors, before, strict=True):
        assert torch.equal(tensor.contiguous().view(torch.uint8), own.contiguous().view(torch.uint8))


def test_a_slice_of_an_operator_moves_its_own_parameters_only():
    model, operator = problem(torch.float64)
    last = operator["inner.2.*"]
    line = Landscape(last, [torch.ones(10).double()])
    outputs = []
    model.inner[0].register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    steps = torch.tensor([[0.0], [1.0], [2.0]])
    torch.testing.assert_close(line.losses(steps), line.model(steps))  # quadratic in the last layer
    assert all(torch.equal(outputs[0], output) for output in outputs)
