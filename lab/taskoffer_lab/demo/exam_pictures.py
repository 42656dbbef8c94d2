"""The exam of an adapter for pictures: diffusers loads it onto a fresh pipeline, which then draws another picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

EDGE = 64
DRAWING_STEPS = 4
SEED = 7
PROMPT = "shapes, a yellow circle on a blue ground"
WEIGHTS = "pytorch_lora_weights.safetensors"


def examine_pictures(model_folder: Path, adapter: Path, _rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Draw the same prompt with the same seed without and with the adapter.

    Returns:
        `before`, which is 0, and `after`: the mean absolute difference of the two pictures in levels of 255; and the
        number of adapter tensors.

    Raises:
        ValueError: A tensor of the file is not finite, or is not in the pipeline's network after loading.
    """
    import numpy
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stored = load_file(adapter / WEIGHTS)
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{adapter}: tensor {name} is not finite")
    pipeline = DiffusionPipeline.from_pretrained(model_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> Any:
        generator = torch.Generator().manual_seed(SEED)
        asked = {"height": EDGE, "width": EDGE, "num_inference_steps": DRAWING_STEPS, "output_type": "np"}
        return pipeline(PROMPT, generator=generator, **asked).images[0]

    before = draw()
    pipeline.load_lora_weights(adapter, weight_name=WEIGHTS, adapter_name="exam")
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    loaded = get_peft_model_state_dict(network, adapter_name="exam")
    if len(loaded) != len(stored):
        raise ValueError(f"{adapter}: {len(stored)} tensors are on disk and {len(loaded)} in the network after loading")
    after = draw()
    if not bool(numpy.isfinite(after).all()):
        raise ValueError(f"{adapter}: the picture drawn with it has pixels that are not finite")
    return {"before": 0.0, "after": float(numpy.abs(after - before).mean() * 255), "tensors": len(stored)}
