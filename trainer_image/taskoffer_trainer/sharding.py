"""Shares out a model over the GPUs of a run (FSDP2), for a model of which a copy does not fit one of them.

Every rank keeps its part of each parameter, of its gradient and of the optimizer's state; what a layer needs is
gathered when the layer is due and dropped after it. Gradients are reduced after each piece of a step and not once for
all of them: they are those of an adapter, some hundredths of what a piece gathers anyway, and would until then lie
whole on every GPU.

torch's ``fully_shard`` is called here and not through accelerate, because accelerate does so only when the training
begins, and the base model is measured before; because it would gather the whole base model for every checkpoint of an
adapter; and because on a CPU it trains copies instead without a word (accelerate 1.15). What is saved has the form that
a run with copies saves, so that each can go on from the other, over any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from taskoffer.api.contract import ExitCode
from taskoffer_trainer.failures import INTERNAL_ERROR, TrainerError
from taskoffer_trainer.world import World

__all__ = ["gathered", "is_shared_out", "local", "put_back", "read_adapter", "share_out"]


def is_shared_out(model: Any) -> bool:
    """Tell whether each rank holds only its part of a model, so that a forward pass needs all ranks."""
    return isinstance(_root(model), FSDPModule)


def _root(model: Any) -> Any:
    """Return the model below its adapter, whose modules hold the adapter's parameters as well.

    All passes go through it, those of PEFT's wrapper and those that generate without the wrapper.
    """
    model = getattr(model, "_orig_mod", model)  # What torch.compile has wrapped.
    return model.get_base_model() if isinstance(model, PeftModel) else model


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, which is all of it where it is not shared out; a view, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_out(model: nn.Module, world: World, device: torch.device) -> None:
    """Hand a model's parameters and buffers from rank 0 to all ranks, of which each keeps its part; all call it.

    It goes layer by layer, so that beside its part a rank never holds more than one layer. Only rank 0 has to hold
    values before; the others need no more than a skeleton on the meta device.

    Args:
        model: with its adapter, not yet on a GPU.
        world: all ranks.
        device: this rank's.

    Raises:
        TrainerError: ``BAD_CONFIG`` when transformers does not say what a layer of this model is.
    """
    layers = list(_layers(model))
    if not layers:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "LayersUnknown",
            f"train.fsdp: transformers does not say which modules of {type(model).__name__} are its layers, so its "
            "parameters cannot be shared out; use a GPU that holds the whole model and leave train.fsdp out",
        )
    _take_types(model, world)
    mesh = init_device_mesh(device.type, (world.size,))
    root = _root(model)
    for module in (*layers, *_embeddings(root), root):
        _hand_out(module, device)
        # Frozen numbers of no dimension, which some models scale with, cannot be cut; every rank keeps them.
        whole = {one for one in module.parameters() if one.dim() == 0 and not one.requires_grad}
        # What is left for the root, as a rule the head, is needed at the end of a forward pass and at the beginning of
        # the backward pass: it stays gathered in between.
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not root, ignored_params=whole)
    register_fsdp_forward_method(root, "generate")
    mine = sum(local(parameter).nbytes for parameter in model.parameters())
    every = sum(parameter.nbytes for parameter in model.parameters())
    print(
        f"model: shared out over {mesh.size()} processes, {mine / 1e6:,.1f} of {every / 1e6:,.1f} MB on this one",
        flush=True,
    )


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that transformers wants to have on one device, from the first to the last."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    inside = ""
    for name, module in model.named_modules():
        if type(module).__name__ in names and not (inside and name.startswith(inside)):
            inside = f"{name}."
            yield module


def _embeddings(model: Any) -> Iterator[nn.Module]:
    """Yield the embedding of the tokens where it can be dropped after its use: not where it is the head as well."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, nn.Embedding) and head is not None and embedding.weight is not head.weight:
        yield embedding


def _take_types(model: nn.Module, world: World) -> None:
    """Give a skeleton the types of rank 0's tensors: from disk, some models keep a few of theirs in float32.

    Raises:
        TrainerError: ``INTERNAL`` when the skeleton is one of another model.
    """
    tensors = {name: tensor for kind in (model.named_parameters, model.named_buffers) for name, tensor in kind()}
    said = world.share({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    for name in {*said, *tensors}:
        shape, dtype = said.get(name, (None, None))
        if name not in tensors or tensors[name].shape != shape:
            raise TrainerError(
                ExitCode.INTERNAL, INTERNAL_ERROR, f"{name} of the model has another shape in rank {world.rank}"
            )
        if tensors[name].dtype != dtype:
            tensors[name].data = tensors[name].data.to(dtype)


def _hand_out(module: nn.Module, device: torch.device) -> None:
    """Put rank 0's values on every rank's device; a parameter that several modules share stays one."""
    handed: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            if parameter not in handed:
                value = _from_first(parameter, device)
                handed[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(part, name, handed[parameter])
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, _from_first(buffer, device))


def _from_first(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return rank 0's values on this rank's device."""
    value = torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)
    if dist.get_rank() == 0:
        value.copy_(tensor.detach())
    with torch.no_grad():
        dist.broadcast(value, src=0)
    return value.detach()


def gathered(tensors: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return values with their tensors whole, on the CPU of rank 0; an empty dictionary in the others.

    All ranks call it, with the same keys in the same order. Values that are no tensors are kept.
    """
    first = dist.get_rank() == 0
    found = {}
    for name, value in tensors.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            # One after the other, so that no GPU ever holds more than one of them whole.
            found[name] = whole.detach().cpu() if isinstance(whole, torch.Tensor) else whole
    return found


def put_back(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor as ``like`` is: shared out in the same way, of which this rank's part is copied."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    value = whole.to(like.device)
    # Every rank has the whole, so none has to send anything.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def read_adapter(model: nn.Module, file: Path) -> None:
    """Read an adapter from disk into a model that is shared out; each rank keeps its part.

    Raises:
        TrainerError: ``RESTART`` when the file holds another adapter than the model has.
    """
    parts = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(file, framework="pt", device="cpu") as adapter, torch.no_grad():
        if set(adapter.keys()) != set(parts):
            raise TrainerError(ExitCode.RESTART, "CheckpointBroken", f"{file} does not hold this model's adapter")
        for name, part in parts.items():
            local(part).copy_(local(put_back(adapter.get_tensor(name), part)))
