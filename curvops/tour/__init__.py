"""The visual tour: matrices of small models, measured, drawn and kept. Needs the extra `tour`."""

from curvops.tour.block_figure import plot_blocks, plot_spectra
from curvops.tour.coarse import Effort, coarse_tour
from curvops.tour.coarse_files import CoarseFile, load_coarse, save_coarse
from curvops.tour.figure import color_domain, figure_style, log_abs, plot_matrices, save_figure, unchanged
from curvops.tour.files import MatrixFile, OutputError, load_matrices, save_matrices
from curvops.tour.matrices import OPERATORS, Measured, each_matrix, make_operator
from curvops.tour.run import Finished, run_tour
from curvops.tour.setups import Setup, digits, tutorial

__all__ = [
    "OPERATORS",
    "CoarseFile",
    "Effort",
    "Finished",
    "MatrixFile",
    "Measured",
    "OutputError",
    "Setup",
    "coarse_tour",
    "color_domain",
    "digits",
    "each_matrix",
    "figure_style",
    "load_coarse",
    "load_matrices",
    "log_abs",
    "make_operator",
    "plot_blocks",
    "plot_matrices",
    "plot_spectra",
    "run_tour",
    "save_coarse",
    "save_figure",
    "save_matrices",
    "tutorial",
    "unchanged",
]
