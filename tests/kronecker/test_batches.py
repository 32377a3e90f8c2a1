"""The result does not depend on how the data is cut into batches, nor on what is kept of the first walk over it."""

import pytest
from torch import nn

from kronecker.cases import APPROXIMATIONS, PROBLEMS, build, close, cnn, plan, real, seeded, tokens


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_any_cut_gives_the_same_corrected_factors(fisher_type, approximation):
    """So many data that no eigenvalue is zero, and none is repeated."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Flatten()))
    problem = model, nn.MSELoss(), real(40, 2, 3), real(40, 8)
    options = {"fisher_type": fisher_type, "kfac_approx": approximation, "mc_samples": 2}
    whole, parts = build("ekfac", problem, **options), build("ekfac", problem, 1, 19, 20, **options)
    close(parts.to_dense(), whole.to_dense(), 1e-9)


def kept_bytes(op):
    (note,) = [note for note in op.explain().notes if note.startswith("rows kept")]
    number, unit = note.split(": ")[1].split()
    return float(number) * {"B": 1, "KiB": 1024}[unit]


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", ["ekfac", "kfoc"])
def test_a_second_walk_gives_what_kept_rows_give(kind, name, fisher_type):
    problem, options = PROBLEMS[name](), {"fisher_type": fisher_type, "check_deterministic": False}
    kept = build(kind, problem, 3, 2, 1, **options)
    dense = kept.to_dense()
    some = build(kind, problem, 3, 2, 1, memory_budget=int(0.9 * kept_bytes(kept)), **options)
    swept = build(kind, problem, 3, 2, 1, memory_budget=0, **options)
    for other in (some, swept):
        close(other.to_dense(), dense, 1e-12)
    passes = [int(next(n for n in op.explain().notes if "backward" in n).split()[0]) for op in (kept, some, swept)]
    assert passes[0] < passes[1] < passes[2]
    assert kept_bytes(swept) == 0 < kept_bytes(kept)


@pytest.mark.parametrize("problem", [cnn, tokens])
def test_the_plan_knows_what_will_be_kept(problem):
    (planned,) = [n for n in plan("ekfac", problem()).notes if n.startswith("rows of this batch")]
    (kept,) = [n for n in build("ekfac", problem()).explain().notes if n.startswith("rows kept")]
    assert planned.startswith(f"rows of this batch: {kept.removeprefix('rows kept for the second look: ')};")
