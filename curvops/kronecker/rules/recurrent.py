"""Recurrent layers and cells, step by step in linear maps, so that the taps see their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops.kronecker.taps import Rule, Taps

State = tuple[Tensor, ...]  # the output first
# from the input's part of the gates and the state to the next state; the weights act on the state
Step = Callable[[Tensor, State, Sequence[Any]], State]


def _lstm(x: Tensor, state: State, weights: Sequence[Any]) -> State:
    hidden, bias, projection = weights
    h, c = state
    i, f, g, o = (x + F.linear(h, hidden, bias)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if projection is None else F.linear(h, projection)), c


def _gru(x: Tensor, state: State, weights: Sequence[Any]) -> State:
    hidden, bias, _ = weights
    (h,) = state
    reset, update, new = F.linear(h, hidden, bias).chunk(3, -1)
    r, z, n = x.chunk(3, -1)
    n = (n + (r + reset).sigmoid() * new).tanh()
    return (n + (z + update).sigmoid() * (h - n),)


def _plain(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(x: Tensor, state: State, weights: Sequence[Any]) -> State:
        hidden, bias, _ = weights
        return (activation(x + F.linear(state[0], hidden, bias)),)

    return step


STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _plain(torch.tanh),
    "rnn_relu": _plain(torch.relu),
}


def _cell(step: Step) -> Callable[..., Any]:
    def run(taps: Taps, func: Any, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, *biases: Any) -> Any:
        b_ih, b_hh = biases or (None, None)
        with taps:
            state = step(F.linear(input, w_ih, b_ih), _state(hx), (w_hh, b_hh, None))
        return state if len(state) > 1 else state[0]

    return run


def _layers(step: Step) -> Callable[..., Any]:
    def run(taps: Taps, func: Any, input: Tensor, second: Any, third: Any, *rest: Any) -> Any:
        packed = isinstance(third, Tensor) or (isinstance(third, (list, tuple)) and isinstance(rest[0], (list, tuple)))
        if packed:
            hx, (weights, has_bias, count, dropout, training, both) = third, rest
            sizes, first = second.tolist(), False
        else:
            hx, weights, (has_bias, count, dropout, training, both, first) = second, third, rest
            x = input.transpose(0, 1) if first else input
            sizes = [x.shape[1]] * x.shape[0]
        if dropout and training:
            taps.unknown(*weights)
            return func(input, second, third, *rest)
        with taps:
            steps = list(input.split(sizes) if packed else x.unbind(0))
            steps, finals = _run(step, steps, _state(hx), list(weights), has_bias, count * (1 + both), both)
            out = torch.cat(steps) if packed else torch.stack(steps, int(first))
        return (out, *(torch.stack(part) for part in zip(*finals, strict=True)))

    return run


def _run(
    step: Step, steps: list[Tensor], state: State, weights: list[Tensor], has_bias: bool, count: int, both: bool
) -> tuple[list[Tensor], list[State]]:
    """All layers and directions, over steps ``[n_t, features]`` with n_t not increasing."""
    each = len(weights) // count
    sizes = [len(x) for x in steps]
    finals: list[State] = []
    for layer in range(0, count, 1 + both):
        ways = []
        for way in range(1 + both):
            own = weights[(layer + way) * each : (layer + way + 1) * each]
            b_ih, b_hh = (own[2], own[3]) if has_bias else (None, None)
            projection = own[-1] if each == (5 if has_bias else 3) else None
            ragged = len(set(sizes)) > 1
            mapped = F.linear(torch.cat(steps) if ragged else torch.stack(steps), own[0], b_ih)
            gates = list(mapped.split(sizes) if ragged else mapped.unbind(0))
            start = tuple(part[layer + way] for part in state)
            outs, final = _walk(step, gates, start, (own[1], b_hh, projection), reverse=way == 1)
            ways.append(outs)
            finals.append(final)
        steps = [torch.cat(parts, -1) for parts in zip(*ways, strict=True)] if both else ways[0]
    return steps, finals


def _walk(
    step: Step, gates: list[Tensor], start: State, weights: Sequence[Any], reverse: bool
) -> tuple[list[Tensor], State]:
    """One direction of one layer: the output of each step, and the last state of each sequence."""
    outs, ended = list(gates), []
    order = range(len(gates))
    state = tuple(part[: len(gates[-1 if reverse else 0])] for part in start)
    for t in reversed(order) if reverse else order:
        size, before = len(gates[t]), len(state[0])
        if size > before:  # sequences that end here start, when walked backwards
            state = tuple(torch.cat([now, part[before:size]]) for now, part in zip(state, start, strict=True))
        elif size < before:
            ended.append(tuple(now[size:] for now in state))
            state = tuple(now[:size] for now in state)
        state = step(gates[t], state, weights)
        outs[t] = state[0]
    for more in reversed(ended):
        state = tuple(torch.cat(pair) for pair in zip(state, more, strict=True))
    return outs, state


def _state(hx: Any) -> State:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


RULES: dict[Any, Rule] = {
    **{getattr(torch, name): _layers(step) for name, step in STEPS.items()},
    **{getattr(torch, f"{name}_cell"): _cell(step) for name, step in STEPS.items()},
}
