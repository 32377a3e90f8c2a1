"""How Sphinx builds the site: `make docs`."""

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from sphinx_gallery.sorting import ExplicitOrder

import curvops

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "curvops"
author = "The curvops authors"
version = release = curvops.__dict__.get("__version__", "0.1.0")
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/sg_execution_times.rst"]
nitpicky = True
# other projects' names, type variables and private helpers have no page here, and nothing is downloaded
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|np|numpy|collections|typing|matplotlib|pathlib|plotly|scipy|optional)\b.*"),
    (r"py:obj", r".*"),
    (r"py:(class|exc)", r".*"),
]

autodoc_mock_imports = ["laplace", "linear_operator"]
html_theme = "furo"
html_title = "curvops"
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "inherited-members": False, "show-inheritance": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # an order of examples cannot be kept between builds

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def strictly(_: Any, name: str, when: str) -> None:
    """Warnings of a tutorial are errors, as in the tests; those of Sphinx itself are not."""
    if when == "before":
        outside[:] = warnings.filters
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    else:
        warnings.filters[:] = outside  # type: ignore[index]


outside: list[Any] = []
# what needs an environment of its own is run by its own chore, not here
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"laplace_transformer|minilm|processes|accelerated",
    "within_subsection_order": ExplicitOrder(
        [
            f"{name}.py"
            for name in (
                "visual_tour",
                "spectra",
                "papyan",
                "kfac_transformer",
                "laplace_posterior",
                "influence",
                "natural_gradient",
                "newton_cg",
                "migrating",
            )
        ]
    ),
    "abort_on_example_error": True,
    "capture_repr": (),
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_signature": False,
    "show_memory": False,
    "min_reported_time": 1,
    "write_computation_times": False,
    "reset_modules": ("matplotlib", strictly),
    "reset_modules_order": "both",
    "plot_gallery": True,
}

# PyTorch's own, when it loads its rules for forward mode
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of each table of a font that a PDF leaves out


def magnitudes(*event: Any) -> None:
    """Keep |λ| of a docstring from being read as a substitution."""
    lines = event[-1]
    lines[:] = [re.sub(r"(?<!`)\|([^\s|`]+)\|(?!`)", r"\\|\1\\|", line) for line in lines]


def tutorials(*event: Any) -> None:
    """Links of a page to the tutorials' files, which a reader of the repository follows, are to their pages on the site."""
    text = event[-1]
    text[0] = re.sub(r"\]\(\.\./examples(?:/(\w+)\.py)?\)", lambda found: f"](gallery/{found[1] or 'index'})", text[0])


def setup(app: Any) -> None:
    """Sphinx's own hook."""
    app.connect("source-read", tutorials)
    app.connect("autodoc-process-docstring", magnitudes)
