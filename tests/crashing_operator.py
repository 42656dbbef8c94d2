"""The operator with an admission cycle that can be made to fail: ``crashing_operator.py FILE run …``.

The first cycle that finds the file raises an error, as a defect in the decision would.
"""

from __future__ import annotations

import sys
from pathlib import Path

from taskoffer.cli.main import main
from taskoffer.decision.cycle import Plan, plan
from taskoffer.decision.snapshot import Snapshot
from taskoffer.reconcile import admission


def crash_once(file: Path) -> None:
    """Let the cycle raise when the file is there."""

    def planned(snapshot: Snapshot) -> Plan:
        if file.exists():
            raise RuntimeError(f"the cycle fails because {file} is there")
        return plan(snapshot)

    admission.plan = planned  # type: ignore[attr-defined]


if __name__ == "__main__":
    crash_once(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
