"""Found by every process of a test that puts this folder into PYTHONPATH: memory suffices for so many rows at once.

``TEST_ROWS_THAT_FIT`` is ``ROWS`` for all ranks or ``RANK:ROWS`` for one, and ``TEST_HELD_OUT_ROWS_THAT_FIT`` the same
for evaluations. The real trainer meets a real exception, raised where a GPU would raise it: half way through the rows
of a step or of an evaluation. Steps meet the one of CUDA's runtime, evaluations that of the CPU's allocator; neither
has the class of those of torch's allocator of the GPU.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Patch(importlib.abc.MetaPathFinder):
    """Changes a module right after it was loaded."""

    def __init__(self, target: str, change: Callable[[ModuleType, int], None], rows: int) -> None:
        self.target, self.change, self.rows = target, change, rows

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.change(module, self.rows)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _limit_steps(module: ModuleType, rows: int) -> None:
    trainer = module.StepTrainer
    piece = trainer._piece

    def _piece(self: Any, model: Any, given: Any, *more: Any) -> Any:
        found = piece(self, model, given, *more)
        if len(given) > rows:
            import torch

            raise torch.AcceleratorError("CUDA error: out of memory")
        return found

    trainer._piece = _piece


def _limit_evaluations(module: ModuleType, rows: int) -> None:
    evaluation = module.Evaluation
    add_up = evaluation.add_up

    def _add_up(self: Any, model: Any, given: Any, work: Any, *more: Any) -> Any:
        def limited(piece: Any) -> Any:
            found = work(piece)
            if len(piece) > rows:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
            return found

        return add_up(self, model, given, limited, *more)

    evaluation.add_up = _add_up


for variable, target, change in (
    ("TEST_ROWS_THAT_FIT", "taskoffer_trainer.steps", _limit_steps),
    ("TEST_HELD_OUT_ROWS_THAT_FIT", "taskoffer_trainer.evaluating", _limit_evaluations),
):
    rank, _, number = os.environ.get(variable, "").rpartition(":")
    if number and (not rank or rank == os.environ.get("RANK", "0")):
        import importlib.util

        if target in sys.modules:
            # The process is a copy of one that had loaded it.
            change(sys.modules[target], int(number))
        else:
            sys.meta_path.insert(0, _Patch(target, change, int(number)))
