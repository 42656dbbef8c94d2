"""placeholder"""

from pathlib import Path


def write_hosts(node: Path, endpoint: str, host: str) -> None: ...
