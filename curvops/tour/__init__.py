"""The visual tour: matrices of small models, measured, drawn and kept. Needs the extra `tour`."""

from curvops.tour.coarse import Effort, coarse_tour
from curvops.tour.coarse_files import CoarseFile, load_coarse, save_coarse
from curvops.tour.compute import Finished, Tour
from curvops.tour.figure import plot_matrices, save_figure
from curvops.tour.files import MatrixFile, OutputError, load_matrices, save_matrices
from curvops.tour.groups import module_groups
from curvops.tour.matrices import OPERATORS, Measured, each_matrix, make_operator
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
    "coarse_tour",
    "color_domain",
    "digits",
    "each_matrix",
    "figure_style",
    "load_coarse",
    "load_matrices",
    "log_abs",
    "make_operator",
    "module_groups",
    "plot_matrices",
    "run_tour",
    "save_coarse",
    "save_figure",
    "save_matrices",
    "shared_look",
    "tutorial",
    "unchanged",
]
