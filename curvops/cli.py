"""The command line: `curvops tour`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

_SETUPS = ("tutorial", "digits")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    0 is success, 1 a failure that one line on stderr explains, 2 a mistake in the arguments, and
    130 an interruption with Ctrl-C.
    """
    given = vars(_parser().parse_args(arguments))
    kept: object = "nothing"
    try:
        os.environ.setdefault("MPLBACKEND", "agg")  # figures go to files: no window is needed
        import torch

        from curvops.tour import Finished, run_tour

        given["dtype"] = getattr(torch, given["dtype"])
        kept = finished = Finished()
        with warnings.catch_warnings():
            # PyTorch 2.15's own, when it loads its rules for forward mode
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            run_tour(**given, finished=finished)
    except ModuleNotFoundError as error:
        return _fail(f"the tour needs {error.name}: pip install 'curvops[tour]'")
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail(f"interrupted; kept {kept}", 130)
    return 0


def _fail(reason: str, status: int = 1) -> int:
    print(f"curvops tour: {reason}", file=sys.stderr)
    return status


def _setups(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in _SETUPS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated choice of {', '.join(_SETUPS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="curvops", description="Curvature matrices of PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tour = commands.add_parser(
        "tour",
        help="compute and draw six curvature matrices of small models",
        description="Compute six curvature matrices of small models; print time and memory of each; "
        "keep matrices and figures.",
    )
    tour.add_argument("--output", default="tour", metavar="DIR", help="folder for the files (default: %(default)s)")
    tour.add_argument(
        "--setups",
        type=_setups,
        default=list(_SETUPS),
        metavar="NAME,NAME",
        help=f"what to look at: {', '.join(_SETUPS)} (default: all)",
    )
    tour.add_argument("--device", help="where to compute, such as cpu or cuda (default: a GPU if there is one)")
    tour.add_argument(
        "--dtype", choices=["float32", "float64"], default="float32", help="precision (default: %(default)s)"
    )
    tour.add_argument("--seed", type=int, default=0, help="of data, weights and samples (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
