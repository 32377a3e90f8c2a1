"""The visual tour: curvature matrices of a model, measured, drawn and kept. Needs the extra `tour`.

`curvops.tour(model, loss, data)` takes it of your own model: see `curvops.tour.tour`, which this module is when called.
"""

import sys
from importlib.util import find_spec
from inspect import signature
from types import ModuleType

from curvops.extras import package_of

if _missing := [
    name for name in ("PIL", "matplotlib", "tueplots", "plotly", "safetensors", "tqdm") if find_spec(name) is None
]:
    raise ModuleNotFoundError(
        f"curvops.tour needs {package_of(_missing[0])}: pip install 'curvops[tour]'", name=_missing[0]
    )

from curvops.tour.block_figure import plot_blocks, plot_spectra
from curvops.tour.coarse import Effort, coarse_tour
from curvops.tour.coarse_files import CoarseFile, load_coarse, save_coarse
from curvops.tour.compute import Tour
from curvops.tour.figure import plot_matrices, save_figure
from curvops.tour.files import Finished, MatrixFile, OutputError, load_matrices, save_matrices
from curvops.tour.films import film
from curvops.tour.groups import module_groups
from curvops.tour.matrices import OPERATORS, Measured, each_matrix, make_operator
from curvops.tour.own import TourOptions, tour, tour_checkpoints
from curvops.tour.page import write_page
from curvops.tour.panels import Look, color_domain, log_abs, shared_look, unchanged
from curvops.tour.run import run_tour
from curvops.tour.setups import Setup, digits, tutorial
from curvops.tour.style import figure_style

__all__ = [
    "OPERATORS",
    "CoarseFile",
    "Effort",
    "Finished",
    "Look",
    "MatrixFile",
    "Measured",
    "OutputError",
    "Setup",
    "Tour",
    "TourOptions",
    "coarse_tour",
    "color_domain",
    "digits",
    "each_matrix",
    "figure_style",
    "film",
    "load_coarse",
    "load_matrices",
    "log_abs",
    "make_operator",
    "module_groups",
    "plot_blocks",
    "plot_matrices",
    "plot_spectra",
    "run_tour",
    "save_coarse",
    "save_figure",
    "save_matrices",
    "shared_look",
    "tour",
    "tour_checkpoints",
    "tutorial",
    "unchanged",
    "write_page",
]


class _Callable(ModuleType):
    """This module when it is called."""

    __call__ = staticmethod(tour)
    __signature__ = signature(tour)


sys.modules[__name__].__class__ = _Callable
