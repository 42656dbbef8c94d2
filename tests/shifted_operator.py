"""The operator on a machine whose wall clock is wrong: ``shifted_operator.py SECONDS run …``.

Its monotonic clock is right, as everywhere.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from taskoffer.adapters import clock

_right = clock.utcnow


def shift(by: timedelta) -> None:
    """Let every module that is imported from now on see another time."""
    clock.utcnow = lambda: _right() + by


if __name__ == "__main__":
    shift(timedelta(seconds=float(sys.argv[1])))
    from taskoffer.cli.main import main

    sys.exit(main(sys.argv[2:]))
