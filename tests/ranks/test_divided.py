"""Models of ``fully_shard`` whose data are divided over the processes that have the parts."""

import pytest
import torch
from launch import elastic
from ranks import divided

from curvops.sharding import LEAST

REFUSED = {
    "written": ("RuntimeError: the model changes a parameter in place (clamp)",) * 2,
    "replaced": (
        "ValueError: params: 'inner.weight' are no longer tensors",
        "RanksError: process 0 of 2 failed with ValueError: params: 'inner.weight' are no longer tensors",
    ),
    "sent": (
        "RanksError: process 1 of 2 failed with TypeError: data: a process without data borrows a batch",
        "TypeError: data: a process without data borrows a batch of another, which cannot be sent (",
    ),
    "order": ("RanksError: the processes compute different things: process 0 a use of parameter",) * 2,
    "failing": ("RanksError: process 1 of 2 failed with ArithmeticError: bad data", "ArithmeticError: bad data"),
    "backward": ("RanksError: process 1 of 2 failed with OutOfMemoryError: no room", "OutOfMemoryError: no room"),
    "past": ("RuntimeError: a parameter that is cut over the processes is taken by RedistributeBackward",) * 2,
    "past, kfac": ("AttributeError: 'Parameter' object has no attribute 'full_tensor'",) * 2,
    "loader": ("RanksError: process 1 of 2 failed with OSError: the disk is gone", "OSError: the disk is gone"),
    "none": ("ValueError: data: the loader is empty",) * 2,
    "number": ("ValueError: num_data: expected 7 data, the loader yields 9",) * 2,
    "columns": ("RanksError: the processes compute different things",) * 2,
    "jacobian": ("ValueError: process_group: a Jacobian's parameters must not be cut",) * 2,
    "plain": ("ValueError: params: 'scale' are not cut over the processes that divide the data",) * 2,
    "whole data": ("RanksError: Determinism check: the processes that have parts of the parameters have different",)
    * 2,
    "axis": ("ValueError: process_group: '0.weight', '1.0.weight', …, '2.bias' are cut over processes of this group",)
    * 4,
}


@pytest.mark.skipif(torch.__version__ < LEAST, reason="second derivatives of DTensors are wrong")
@pytest.mark.parametrize(("number", "results"), [(2, 25), (3, 3), (4, 4)])
def test_data_are_divided_over_the_processes_that_have_the_parts(number, results):
    """The matrices are those of one process that has the whole model and all data."""
    for rank, report in enumerate(elastic(number, divided.main)):
        for name, text in report.pop("refused", {}).items():
            assert text.startswith(REFUSED[name][rank]), (name, text)
        assert {name: error for name, error in report.items() if not error < 1e-10} == {}
        assert len(report) == results
