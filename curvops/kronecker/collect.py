"""What is collected during a sweep: Kronecker factors, blocks of whole gradients, diagonals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from curvops.kronecker.captured import Captured
from curvops.kronecker.correction import BasisDiagonal
from curvops.kronecker.factors import BlockRule, Factors, Moments, WholeGradients, whole_gradients
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.replay import Collector, rows_of
from curvops.kronecker.state import Eigen, Entry, Moment, Whole
from curvops.kronecker.sweep import Sweep
from curvops.kronecker.uses import LinearUse


class MomentCollector(Collector):
    """Kronecker factors of the linear groups."""

    def __init__(self, sweep: Sweep, moments: Moments) -> None:
        self._sweep, self._moments = sweep, moments
        self.clear()

    def clear(self) -> None:
        self._factors: dict[Key, Factors] = {}
        self._units: dict[str, int] = {}
        self._weights: dict[Key, Key] = {}  # of biases that share the second moment of their outputs

    def add(self, place: int, captured: Captured) -> None:
        if captured.first:
            self._units[captured.route] = self._units.get(captured.route, 0) + captured.tape.units
        weights = self._weights_of(captured)
        self._part(captured, weights)
        known = set(self._factors)
        for key in sorted(captured.uses, key=weights.__contains__):  # weights before their biases
            group, weight = self._sweep.groups[key], weights.get(key)
            if group.kind != "linear":
                continue
            factors = self._factors.setdefault(key, Factors())
            if weight is not None and not {key, weight} & known:
                self._moments.side(group, factors, "right", False, self._factors[weight].sides["right"].outputs)
                self._weights[key] = weight
            self._moments.add(group, factors, captured, outputs=key not in self._weights)

    def _weights_of(self, captured: Captured) -> dict[Key, Key]:
        """The weights of separate biases that enter with them and nowhere else, so that they have Σ g gᵀ in common."""

        def applied(k: int) -> bool:
            use = captured.tape.uses[k]
            return isinstance(use, LinearUse) and use.input_side == "right"

        weights: dict[tuple[int, ...], Key] = {}
        biases: dict[Key, tuple[int, ...]] = {}
        for key, uses in captured.uses.items():
            places, roles = tuple(k for k, _ in uses), {role for _, role in uses}
            if roles == {"bias"}:
                biases[key] = places
            elif roles == {"weight"} and all(map(applied, places)):
                weights[places] = key
        shapes = {key: self._sweep.groups[key].shape[:2] for key in captured.uses}
        pairs = ((bias, weights.get(places)) for bias, places in biases.items())
        return {bias: weight for bias, weight in pairs if weight is not None and shapes[weight] == shapes[bias]}

    def _part(self, captured: Captured, weights: Mapping[Key, Key]) -> None:
        """Give biases a moment of their own that now enter elsewhere than their weights."""
        for bias, weight in list(self._weights.items()):
            if {bias, weight} & captured.uses.keys() and weights.get(bias) != weight:
                side = self._factors[bias].sides["right"]
                side.outputs = side.outputs.clone()
                del self._weights[bias]

    def entries(self) -> dict[Key, Moment]:
        """What was collected."""
        known = self._sweep.fisher_type != "forward-only"
        found = {key: Moment(factors.finished(), known) for key, factors in self._factors.items()}
        if self._moments.approximation == "expand":
            return found
        # inputs were averaged over positions, so they are divided by the number of units, those included
        # whose data never reached the layer
        return {key: self._per_unit(key, moment) for key, moment in found.items()}

    def _per_unit(self, key: Key, moment: Moment) -> Moment:
        route = self._sweep.routes[self._sweep.groups[key].names[0]].units
        units = "batches" if route == "whole" else "data"
        return replace(moment, units=units).divided_by(self._units[route])


class WholeCollector(Collector):
    """Blocks of whole gradients of the groups that are no linear maps."""

    def __init__(self, sweep: Sweep, rule: BlockRule | None, dtype: torch.dtype) -> None:
        self._sweep, self._rule, self._dtype = sweep, rule, dtype
        self._wholes: dict[Key, WholeGradients] = {}

    def clear(self) -> None:
        self._wholes = {}

    def add(self, place: int, captured: Captured) -> None:
        for key in (*captured.uses, *captured.leaves):
            group = self._sweep.groups[key]
            if group.kind == "linear":
                continue
            if key not in self._wholes:
                size = len(group.places)
                dense = self._rule is not None and self._rule.block(size, group)
                self._wholes[key] = WholeGradients(size, dense, self._dtype, group.places.device)
            gradients = whole_gradients(group, captured)
            if gradients is not None:
                self._wholes[key].add(gradients)

    def entries(self) -> dict[Key, Entry]:
        """What was collected; without gradients (forward-only) the identity."""
        if self._sweep.fisher_type == "forward-only":
            return {
                key: Whole(torch.ones(len(g.places), dtype=self._dtype, device=g.places.device), scaled=False)
                for key, g in current_groups(self._sweep).items()
                if g.kind != "linear"
            }
        return {key: Whole(whole.moment) for key, whole in self._wholes.items()}


class DiagonalCollector(Collector):
    """Diagonals of the linear groups' blocks, from whole per-datum gradients."""

    def __init__(self, sweep: Sweep, dtype: torch.dtype, budget: int) -> None:
        self._sweep, self._dtype, self._budget = sweep, dtype, budget
        self._diagonals: dict[Key, BasisDiagonal] = {}

    def clear(self) -> None:
        self._diagonals = {}

    def add(self, place: int, captured: Captured) -> None:
        for key, found in rows_of(self._sweep, captured).items():
            if key not in self._diagonals:
                group = self._sweep.groups[key]
                self._diagonals[key] = BasisDiagonal(group, None, None, self._dtype, self._budget)
            self._diagonals[key].add([found])

    def entries(self) -> dict[Key, Entry]:
        """What was collected."""
        return {key: Eigen(None, None, diagonal.total) for key, diagonal in self._diagonals.items()}


def current_groups(sweep: Sweep) -> dict[Key, Group]:
    """The groups that parameters are seen in; without those of routes that a later batch has refuted."""
    return {
        key: group
        for key, group in sweep.groups.items()
        if all((group.kind == "leaf") != sweep.routes[name].tapped for name in group.names)
    }
