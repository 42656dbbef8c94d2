"""Which errors say that memory did not suffice: the ranks answer those with smaller pieces or gentler settings."""

from __future__ import annotations

import sys

__all__ = ["is_out_of_memory"]

_SAID = (
    # CUDA's runtime and driver, HIP, NCCL and MPS: with torch.AcceleratorError, or plain RuntimeErrors.
    "out of memory",
    # cuBLAS, cuDNN, cuSOLVER and cuSPARSE, which allocate room to work in beside torch's allocator.
    "STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",
    # c10's allocator of the CPU, as accelerate's should_reduce_batch_size has it.
    "DefaultCPUAllocator: can't allocate memory",
)
"""What such errors say that have no class of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell by class or message whether an error stands for too little memory, of a GPU or of the machine.

    torch's caching allocator raises ``torch.OutOfMemoryError``; what allocates beside it raises other RuntimeErrors.
    """
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # A compiler that ran out of memory has an answer of its own: the next attempt does without it.
    compiling = any(kind.__module__.startswith("torch._dynamo") for kind in type(error).__mro__)
    return isinstance(error, RuntimeError) and not compiling and any(words in str(error) for words in _SAID)
