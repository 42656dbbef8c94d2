"""What a training process took: figures for the operator, which learns from them. What cannot be known is left out."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from taskoffer.api.contract import Metric, Termination

__all__ = ["as_held_out", "in_a_cell", "largest_peaks", "metrics_of", "peaks", "short_name"]

_BEFORE = "_before"
"""How the name ends of a figure that the base model has."""
_LONGEST = 64 - len(_BEFORE)
"""Characters of a figure's name without that; with it a metric has 64 at most."""


def as_held_out(figures: Mapping[str, float]) -> dict[str, float]:
    """Return what a method measures on held-out data under names that are not those of the training's own figures.

    Both are kept in the same places, and a reward or a divergence is measured in both.
    """
    return {f"eval_{name.removeprefix('eval_')}": value for name, value in figures.items()}


def metrics_of(figures: Mapping[str, float]) -> tuple[Metric, ...]:
    """Return figures as they travel, by name; those that are not finite are left out."""
    finite = {name: value for name, value in figures.items() if math.isfinite(value)}
    return tuple(Metric(name=short_name(name), value=_digits(value)) for name, value in sorted(finite.items()))


def short_name(name: str) -> str:
    """Return a name as it travels: no two become one, and what is measured before is called like what comes after.

    Rewards have names of up to 63 characters of their own.
    """
    name, before = name.removesuffix(_BEFORE), _BEFORE if name.endswith(_BEFORE) else ""
    if len(name) > _LONGEST:
        mark = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST - len(mark) - 1]}-{mark}"
    return name + before


def _digits(value: float) -> str:
    """Write a count with all of its digits, and anything else with six."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else f"{value:.6g}"


def in_a_cell(name: str) -> str:
    """Return a figure's name as it stands in a table of Markdown; an offer may give a reward any name."""
    return " ".join(name.replace("_", " ").split()).replace("|", "\\|")


def peaks() -> dict[str, int | None]:
    """Return this process's peaks so far, by their names in a termination.

    The GPU's is what is in use on it (the CUDA context and NCCL included, which no allocator counts) at the moment
    when torch's allocator held the most; a GPU of a pod has no other user. Without CUDA there is none.
    """
    return {"peak_host_bytes": _peak_host_bytes(), "peak_gpu_bytes": _peak_gpu_bytes()}


def _peak_host_bytes() -> int | None:
    """Return the largest resident set of this program.

    The kernel's VmHWM begins anew with a program; getrusage's ru_maxrss hands down that of whoever started it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("VmHWM:")), [])
    return int(found[1]) * 1024 if len(found) == 3 and found[2] == "kB" else None


def _peak_gpu_bytes() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    beside_allocator = max(0, total - free - torch.cuda.memory_reserved())
    return int(torch.cuda.max_memory_reserved() + beside_allocator)


def largest_peaks(said: Iterable[Termination | None]) -> dict[str, int | None]:
    """Return the largest peaks that the ranks report, by their names in a termination."""
    reports = [termination for termination in said if termination is not None]
    host = [report.peak_host_bytes for report in reports if report.peak_host_bytes is not None]
    gpu = [report.peak_gpu_bytes for report in reports if report.peak_gpu_bytes is not None]
    return {"peak_host_bytes": max(host, default=None), "peak_gpu_bytes": max(gpu, default=None)}
