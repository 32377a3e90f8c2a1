"""The command line: `curvops tour|check|spectrum|kfac|explain|new`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    0 is success, 1 a failure that one line on stderr explains (after the traceback where the user's own code failed),
    2 a mistake in the arguments, 130 an interruption with Ctrl-C, and 143 one by SIGTERM.
    """
    try:
        from curvops.cli.commands import run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print("curvops: the command line needs click: pip install 'curvops[tour]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("curvops: interrupted", file=sys.stderr)
        return 130
    return run(arguments)
