"""Probes of models with few positions, and of such as are stretched; see ``probing``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from probing import Probe, clamps, main, probe

POSITIONS = 48


def tiny_opt(llama: Path, folder: Path) -> Path:
    """Build a model with learned positions, with the tokenizer of another tiny model."""
    import transformers

    sizes = {"vocab_size": 1024, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
    config = transformers.OPTConfig(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    transformers.set_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for pattern in ("*token*", "chat_template*"):
        for file in llama.glob(pattern):
            shutil.copy(file, folder)
    return folder


@probe
def learned_positions(found: Probe) -> Any:
    """A whole run of a model that has no place for the rows' ends, nor for the end of what it is asked."""
    folder = tiny_opt(Path(found.base["model"]["path"]), found.folder / "opt")
    model = {"name": "acme/tiny-opt", "path": str(folder)}
    train = {"maxSteps": 2, "evalSteps": 1, "saveSteps": 1, "maxLength": 160}
    course = found.whole(model=model, train=train, samplePrompts=["Quote it. " * 40])
    termination = course.run()
    rows = [*course.data.train, *course.data.held_out]
    return {
        "code": int(termination.exit_code),
        "clamps": [clamp for clamp in clamps(course) if clamp["field"] == "train.maxLength"],
        "longest": max(len(row.input_ids) for row in rows),
    }


@probe
def stretching(found: Probe) -> Any:
    """A rotary model as it is and stretched, in every way that it is loaded."""
    from taskoffer_trainer.models import _skeleton, load_again, load_model

    said = {}
    for name, model in {"plain": {}, "stretched": {"yarnFactor": 4}}.items():
        course = found.whole(model=model)
        loaded = [load(course.config, course.device) for load in (load_model, load_again, _skeleton)]
        said[name] = {
            "positions": [one.config.max_position_embeddings for one in loaded],
            "scaling": [one.model.rotary_emb.attention_scaling for one in loaded[:2]],
            "slowest": [float(one.model.rotary_emb.inv_freq.min()) for one in loaded[:2]],
            "type": [one.config.rope_parameters["rope_type"] for one in loaded],
        }
    return said


@probe
def stretched_run(found: Probe) -> Any:
    """A whole run of a stretched model."""
    course = found.whole(model={"yarnFactor": 2}, train={"maxSteps": 2, "evalSteps": 1, "saveSteps": 1})
    termination = course.run()
    return {
        "code": int(termination.exit_code),
        "inForce": course.progress.in_force,
        "card": (Path(course.config.output_dir) / "adapter" / "README.md").read_text(),
    }


if __name__ == "__main__":
    main()
