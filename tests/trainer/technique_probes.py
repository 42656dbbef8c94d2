"""Probes of single techniques; see ``probing``."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from probing import (
    Probe,
    clamps,
    environment,
    history,
    listening,
    main,
    probe,
    tiny_mixture,
    train,
    trained,
)


@probe
def bf16(found: Probe) -> Any:
    with environment(TASKOFFER_CPU_BF16="1"):
        course = found.course(train={"bf16": True, "maxSteps": 16})
        train(course)
    parameters = list(course.trainer.model.named_parameters())
    return {
        "base": sorted({str(one.dtype) for name, one in parameters if not one.requires_grad}),
        "adapter": sorted({str(one.dtype) for name, one in parameters if one.requires_grad}),
        "said": course.progress.in_force["dtype"],
        "clamps": clamps(course),
        "losses": history(course, "loss"),
    }


@probe
def attention(found: Probe) -> Any:
    import torch

    said, logits = {}, {}
    chains = {
        "none": [],
        "all": ["flash_attention_3", "flash_attention_2", "sdpa", "eager"],
        "flash": ["flash_attention_2"],
        "eager": ["eager"],
    }
    for name, wishes in chains.items():
        course = found.course(train={"attnImplementation": wishes})
        model = course.trainer.model
        model.eval()
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            logits[name] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        reasons = [clamp for clamp in clamps(course) if clamp["field"] == "train.attnImplementation"]
        report = json.loads(course.progress.report().model_dump_json(by_alias=True))
        in_force = {one["name"]: one["value"] for one in report["inForce"]}
        said[name] = {
            "inUse": in_force["attnImplementation"],
            "clamps": reasons,
            "loaded": model.config._attn_implementation,
        }
    return {**said, "apart": float((logits["eager"] - logits["all"]).abs().max())}


@probe
def checkpointing(found: Probe) -> Any:
    result = {}
    for on in (False, True):
        course = found.course(train={"gradientCheckpointing": on, "maxSteps": 3, "evalSteps": 100, "saveSteps": 100})
        calls = [0]
        layer = course.trainer.model.get_base_model().model.layers[0]

        def counted(*_: Any, calls: list[int] = calls, module: Any = layer) -> None:
            calls[0] += module.training

        # A layer that is computed again for its gradient begins again; it need not come to its end.
        layer.input_layernorm.register_forward_pre_hook(counted)
        train(course)
        result[str(on)] = {"calls": calls[0], "losses": history(course, "loss")}
    return result


@probe
def packing(found: Probe) -> Any:
    import torch

    result: dict[str, Any] = {}
    for way in ("sdpa", "eager"):
        course = found.course(train={"packing": True, "maxLength": 160, "attnImplementation": [way], "maxSteps": 4})
        trainer, rows = course.trainer, list(course.trainer.train_dataset)
        rows = sorted(rows, key=lambda row: -len(row["seq_lengths"]))[:6]
        model = trainer.model.eval()
        single = []
        for row in rows:
            starts = [sum(row["seq_lengths"][:place]) for place in range(len(row["seq_lengths"]) + 1)]
            single += [
                {"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]}
                for start, end in itertools.pairwise(starts)
            ]
        with torch.no_grad():
            together = trainer.piece_loss(model, rows)
            packed, trainer.data_collator = trainer.data_collator, _padded(course)
            apart = [trainer.piece_loss(model, [row]) for row in single]
            trainer.data_collator = packed
            before = _logits(trainer, model, rows[0])
            changed = dict(rows[0])
            changed["input_ids"] = [7] * rows[0]["seq_lengths"][0] + rows[0]["input_ids"][rows[0]["seq_lengths"][0] :]
            after = _logits(trainer, model, changed)
        first = rows[0]["seq_lengths"][0]
        model.train()
        train(course)
        result[way] = {
            "rows": len(course.data.train),
            "sequences": len(trainer.train_dataset),
            "together": [float(together.total), float(together.count)],
            "apart": [sum(float(one.total) for one in apart), sum(float(one.count) for one in apart)],
            "firstChanged": float((before[:first] - after[:first]).abs().max()),
            "secondChanged": float((before[first:] - after[first:]).abs().max()),
            "losses": history(course, "loss"),
        }
    return result


def _padded(course: Any) -> Any:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=course.tokenizer.pad_token_id)


def _logits(trainer: Any, model: Any, row: dict[str, Any]) -> Any:
    batch = trainer.data_collator([row])
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]


@probe
def clipping(found: Probe) -> Any:
    import torch

    norms: list[float] = []

    def look(_args: Any, _state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        gradients = [one.grad.norm() for one in model.parameters() if one.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))

    course = found.course(train={"maxGradNorm": 0.01, "maxSteps": 4, "evalSteps": 100, "saveSteps": 100})
    with listening(course, "on_pre_optimizer_step", look):
        train(course)
    return {"before": history(course, "grad_norm"), "after": norms}


@probe
def tokens(found: Probe) -> Any:
    result = {}
    for most in (None, 200):
        settings = {"perDeviceTrainBatchSize": 8, "maxSteps": 3, "evalSteps": 100, "saveSteps": 100}
        course = found.course(train={**settings, "perDeviceTrainMaxTokens": most})
        padded: list[int] = []
        plain = course.trainer.piece_loss

        def seen(model: Any, piece: Any, padded: list[int] = padded, plain: Any = plain) -> Any:
            padded.append(len(piece) * max(len(row["input_ids"]) for row in piece))
            return plain(model, piece)

        course.trainer.piece_loss = seen
        train(course)
        losses = history(course, "loss")
        result[str(most)] = {"padded": padded, "losses": losses, "evaluated": course.evaluation.size}
    return result


@probe
def context(found: Probe) -> Any:
    """A model that knows 96 positions and fails beyond them, asked for rows and for a sample of more tokens."""
    import shutil

    import transformers

    folder = found.folder / "model"
    settings = transformers.GPT2Config(vocab_size=1024, n_positions=96, n_embd=64, n_layer=2, n_head=4)
    transformers.set_seed(1)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    for pattern in ("*token*", "chat_template*"):
        for file in Path(found.base["model"]["path"]).glob(pattern):
            shutil.copy(file, folder)
    course = found.course(
        model={"path": str(folder)},
        samplePrompts=["Say " + "again and " * 300],
        train={"maxSteps": 2, "evalSteps": 2, "saveSteps": 2, "maxLength": 2048},
    )
    train(course)
    return {
        "answers": len(course.answer(course.trainer.model, lambda: None)),
        "losses": history(course, "eval_loss"),
        "clamps": clamps(course),
        "longest": max(len(row.input_ids) for row in course.data.train),
    }


@probe
def optimizers(found: Probe) -> Any:
    result = {}
    for name in ("adamw_torch_fused", "adamw_torch", "adafactor"):
        course = train(found.course(train={"optim": name, "maxSteps": 3, "evalSteps": 100, "saveSteps": 100}))
        optimizer = getattr(course.trainer.optimizer, "optimizer", course.trainer.optimizer)
        state = next(iter(optimizer.state.values()))
        fused = optimizer.param_groups[0].get("fused")
        result[name] = {"class": type(optimizer).__name__, "fused": bool(fused), "state": sorted(state)}
    return result


@probe
def scales(found: Probe) -> Any:
    from peft.tuners.lora import Linear

    wishes = {
        "plain": {"r": 8, "loraAlpha": 16},
        "rslora": {"r": 16, "loraAlpha": 16, "useRslora": True},
        "pattern": {
            "r": 8,
            "loraAlpha": 16,
            "rankPattern": [{"module": "q_proj", "r": 4}, {"module": "k_proj", "r": 64}],
        },
    }
    result = {}
    for name, lora in wishes.items():
        course = found.course(lora=lora)
        layers = {
            path.rpartition(".")[2]: [module.r["default"], module.scaling["default"]]
            for path, module in course.trainer.model.named_modules()
            if isinstance(module, Linear)
        }
        result[name] = {"layers": layers, "clamps": clamps(course)}
    return result


@probe
def experts(found: Probe) -> Any:
    from taskoffer_trainer.checkpoints import Checkpoint

    folder = tiny_mixture(Path(found.base["model"]["path"]), found.folder / "moe")
    changes = {
        "model": {"name": "acme/tiny-moe", "path": str(folder)},
        "lora": {"r": 32, "loraAlpha": 64, "loraDropout": 0.1},
        "train": {"maxSteps": 16},
    }
    course = train(found.course(**changes))
    wrapped = {
        name.split(".mlp.")[1].removesuffix(".default.weight"): list(one.shape)
        for name, one in course.trainer.model.named_parameters()
        if one.requires_grad and ".layers.0.mlp." in name
    }
    measured = history(course, "eval_loss")[-1]
    kept = Path(course.config.checkpoint_dir) / "checkpoint-16"
    verified = course.verify(kept, Checkpoint(kept, 16, measured))
    return {
        "clamps": clamps(course),
        "adapters": wrapped,
        "losses": history(course, "loss"),
        "measured": measured,
        "verified": verified.eval_loss,
    }


@probe
def nan_steps(found: Probe) -> Any:
    import torch

    course = found.course(train={"maxSteps": 16})
    trainer, plain = course.trainer, course.trainer.piece_loss

    def poisoned(model: Any, piece: Any) -> Any:
        loss = plain(model, piece)
        if trainer.state.global_step in (3, 4):
            return type(loss)(loss.total * math.nan, loss.count, loss.tokens)
        return loss

    trainer.piece_loss = poisoned
    train(course)
    weights = list(trained(course).values())
    return {
        "losses": history(course, "loss"),
        "evaluated": history(course, "eval_loss"),
        "skipped": course.progress.metrics["skipped_steps"],
        "finite": bool(all(torch.isfinite(one).all() for one in weights)),
    }


@probe
def buckets(_found: Probe) -> Any:
    import torch
    import torch.distributed as dist

    from taskoffer.api.contract import TrainSettings
    from taskoffer_trainer.steps import StepTrainer
    from taskoffer_trainer.world import World

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World()
    # Six weights of 1 MiB.
    model = torch.nn.ModuleList(torch.nn.Linear(512, 512, bias=False) for _ in range(6))
    result = {}
    for mib in (1, 2, 200, None):
        config = SimpleNamespace(train=TrainSettings(ddp_bucket_cap_mb=mib))
        steps = SimpleNamespace(config=config, world=world, messages=0)
        for one in model:
            one.weight.grad = torch.ones_like(one.weight)
        StepTrainer._reduce(SimpleNamespace(steps=steps), model, 4.0)  # type: ignore[arg-type]
        values = {float(value) for one in model for value in one.weight.grad.unique()}
        result[str(mib)] = {"messages": steps.messages, "values": sorted(values)}
    world.part()
    return result


@probe
def evaluations(found: Probe) -> Any:
    course = found.course(train={"maxSteps": 10, "evalSteps": 4, "saveSteps": 4})
    course.steps.stretch = 1
    train(course)
    entries = course.trainer.state.log_history
    plain = [entry["step"] for entry in entries if "eval_loss" in entry]
    slow = found.course(train={"maxSteps": 20, "evalSteps": 2, "saveSteps": 2, "saveTotalLimit": 3})
    callbacks = slow.trainer.callback_handler.callbacks
    place = next(place for place, one in enumerate(callbacks) if type(one).__name__ == "EvaluationPace")
    callbacks.insert(place, _Slow(slow.timings))
    train(slow)
    entries = slow.trainer.state.log_history
    kept = sorted(int(path.name.partition("-")[2]) for path in Path(slow.config.checkpoint_dir).glob("checkpoint-*"))
    kept_file = json.loads((Path(slow.config.checkpoint_dir) / f"checkpoint-{kept[-1]}" / "steps.json").read_text())
    return {
        "plain": plain,
        "slow": [entry["step"] for entry in entries if "eval_loss" in entry],
        "kept": kept,
        "stretch": kept_file["stretch"],
        "clamps": [clamp for clamp in clamps(slow) if clamp["field"] == "train.evalSteps"],
    }


class _Slow:
    """Lets every step have taken 1,500 s, and every evaluation 1,000 s."""

    def __init__(self, timings: Any) -> None:
        self.timings = timings

    def __getattr__(self, name: str) -> Any:
        def event(_args: Any, _state: Any, control: Any, **_: Any) -> Any:
            self.timings.steps.clear()
            self.timings.steps.append(1500.0)
            self.timings.evaluate = 1000.0
            return control

        if name.startswith("on_"):
            return event
        raise AttributeError(name)


if __name__ == "__main__":
    main()
