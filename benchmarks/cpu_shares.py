"""Whose code the operator's CPU time goes to: samples of its stacks, taken from outside with py-spy.

    python benchmarks/cpu_shares.py STACKS

reads what ``py-spy record --format raw`` has written: one stack per line, outermost frame first, and how often it was
seen. A sample belongs to the owner of its innermost frame that has one, so that the standard library, pydantic and
everything else counts for whoever called it. The event loop itself and the HTTP client's own work have their own lines.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

OWNERS = (
    ("HTTP client", re.compile(r"\((?:\S*/)?(?:aiohttp|kubernetes)/")),
    ("kopf", re.compile(r"\((?:\S*/)?kopf/")),
    ("decision", re.compile(r"\((?:\S*/)?taskoffer/decision/")),
    ("the rest of the operator", re.compile(r"\((?:\S*/)?taskoffer/(?!handlers/run|cli/|__main__)")),
)
"""Names and the frames that they own; a frame reads ``function (path:line)``."""
ELSE = "event loop and system calls"
RATE = 200
"""Samples per second."""


class Sampler:
    """A py-spy that samples a process while it is wanted."""

    def __init__(self, pid: int, target: Path) -> None:
        self._target = target
        target.unlink(missing_ok=True)
        program = Path(sys.executable).with_name("py-spy")
        command = [program, "record", "--pid", str(pid), "--format", "raw", "--full-filenames", "--rate", str(RATE)]
        self._process = subprocess.Popen(
            [*command, "--output", target, "--duration", "3600"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # It prints nothing before its first sample; what it reads first are the process's memory maps.
        time.sleep(1.0)

    def kill(self) -> None:
        """End the sampling, whatever it has seen; harmless when it has ended."""
        self._process.kill()

    def stop(self) -> dict[str, float]:
        """End the sampling; return each owner's share.

        Raises:
            RuntimeError: when nothing was sampled.
        """
        self._process.send_signal(2)
        _, said = self._process.communicate(timeout=60)
        if not self._target.is_file():
            raise RuntimeError(f"py-spy has sampled nothing: {said.strip()}")
        return shares(self._target.read_text())


def shares(stacks: str) -> dict[str, float]:
    """Return each owner's share of all samples, the largest first."""
    counted: Counter[str] = Counter()
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        counted[owner(frames.split(";"))] += int(count)
    total = sum(counted.values())
    return {name: count / total for name, count in counted.most_common()}


def owner(frames: list[str]) -> str:
    """Name the owner of a stack's innermost frame that has one."""
    for frame in reversed(frames):
        for name, owns in OWNERS:
            if owns.search(frame):
                return name
    return ELSE


def main() -> int:
    """Print the shares of a file of stacks."""
    for name, share in shares(Path(sys.argv[1]).read_text()).items():
        print(f"{share:6.1%}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
