"""placeholder"""

from collections.abc import Callable
from typing import Any

from taskoffer_lab.controlplane import ControlPlane
from taskoffer_lab.process_table import ProcessTable


class NodeSet:
    def __init__(self, plane: ControlPlane, table: ProcessTable) -> None: ...
    def start_early(self) -> None: ...
    def start_kubelets(self) -> None: ...
    def wait_ready(self, check: Callable[[], None]) -> None: ...
    def act(self, name: str, action: str) -> dict[str, Any]:
        return {}

    def act_inside(self, name: str, action: str) -> dict[str, Any]:
        return {}

    def running(self) -> dict[str, bool]:
        return {}
