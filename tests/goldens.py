"""Expected objects as YAML files beside the tests.

``TASKOFFER_WRITE_GOLDENS=1 pytest tests/unit`` writes them anew; the difference is then reviewed like code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent / "unit" / "golden"


def assert_golden(name: str, made: Any) -> None:
    """Compare an object with ``golden/<name>.yaml``."""
    path = _FOLDER / f"{name}.yaml"
    if os.environ.get("TASKOFFER_WRITE_GOLDENS"):
        path.write_text(yaml.safe_dump(made, sort_keys=False, width=110), encoding="utf-8")
    assert made == yaml.safe_load(path.read_text(encoding="utf-8")), f"differs from {path.name}"
