"""Too little memory is known for what it is, whichever library says so and in whichever words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import RunConfig
from taskoffer_trainer import rank
from taskoffer_trainer.out_of_memory import is_out_of_memory
from taskoffer_trainer.stop import Stop

pytestmark = pytest.mark.trainer

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "70368744177664 bytes. Error code 12 (Cannot allocate memory)"
)
SAID = [
    (
        "OutOfMemoryError",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB",
        True,
    ),
    ("OutOfMemoryError", "whatever it says", True),
    ("MemoryError", "", True),
    ("AcceleratorError", "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
    ("RuntimeError", "CUDA error: out of memory", True),
    ("RuntimeError", "CUDA driver error: out of memory", True),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("RuntimeError", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
    ("RuntimeError", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
    ("RuntimeError", CPU, True),
    ("AcceleratorError", "CUDA error: an illegal memory access was encountered", False),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`", False),
    ("RuntimeError", "The size of tensor a (4) must match the size of tensor b (3)", False),
    ("ValueError", "CUDA out of memory", False),
    # The next attempt does without the compiler.
    ("CompilerError", "backend='inductor' raised: CUDA out of memory", False),
]


def made(name: str, message: str) -> BaseException:
    import torch

    kinds: dict[str, type[BaseException]] = {
        "OutOfMemoryError": torch.OutOfMemoryError,
        "AcceleratorError": torch.AcceleratorError,
        "CompilerError": type("CompilerError", (RuntimeError,), {"__module__": "torch._dynamo.exc"}),
    }
    kind = kinds.get(name) or {"MemoryError": MemoryError, "RuntimeError": RuntimeError, "ValueError": ValueError}[name]
    return kind(message)


@pytest.mark.parametrize(("name", "message", "memory"), SAID, ids=[f"{one[0]}: {one[1][:50]}" for one in SAID])
def test_lack_of_memory_is_known_by_class_or_message(
    name: str,
    message: str,
    memory: bool,
    base_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = made(name, message)
    assert is_out_of_memory(error) is memory

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(rank, "_train", fail)
    config = RunConfig.model_validate({**base_config, "outputDir": "/o", "checkpointDir": "/c"})
    ended = rank.run(config, tmp_path, 0, Stop())
    assert (ended.exit_code, ended.reason) == ((138, "OutOfMemory") if memory else (70, "InternalError"))


def test_what_torch_raises_on_this_machine_is_known() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    assert is_out_of_memory(caught.value)
