"""One measured training, in a process of its own: ours, or TRL's SFTTrainer as its documentation uses it.

Prints one JSON line: CPU and wall seconds of the steps after the first ten, the losses, and for ours the CPU seconds
spent in our callbacks. Called by ``trainer.py``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 10
"""Steps that are left out: the first ones fill caches."""


class Stopwatch:
    """CPU and wall time from the end of one step to the end of another."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seen = steps, 0
        self.begun = self.ended = (0.0, 0.0)

    def step(self) -> None:
        """Take in the end of a step."""
        self.seen += 1
        if self.seen == WARM_UP:
            self.begun = time.process_time(), time.perf_counter()
        if self.seen == self.steps:
            self.ended = time.process_time(), time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Return the CPU and the wall seconds of a step, in the mean."""
        count = self.steps - WARM_UP
        cpu, wall = ((end - begin) / count for begin, end in zip(self.begun, self.ended, strict=True))
        return {"cpu_per_step": cpu, "wall_per_step": wall}


def plain(given: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL as its documentation shows it: prompt and completion, a LoRA config, nothing else."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    watch = Stopwatch(given["steps"])

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step()

    rows = [json.loads(line) for line in Path(given["data"]).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    asked = ["\n".join(part for part in (row["instruction"], row["input"]) if part) for row in rows]
    dataset = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in asked],
            "completion": [[{"role": "assistant", "content": row["output"]}] for row in rows],
        }
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32),
        args=SFTConfig(
            output_dir=given["folder"],
            max_steps=given["steps"],
            per_device_train_batch_size=given["batch"],
            learning_rate=given["learning_rate"],
            lr_scheduler_type="cosine",
            # No warm-up on either side: ours begins above a rate of 0, theirs with it.
            warmup_steps=0,
            max_length=given["max_length"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=given["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {**watch.seconds(), "losses": losses, "callbacks_per_step": 0.0}


def ours(given: dict[str, Any]) -> dict[str, Any]:
    """Train with a rank of the trainer, everything in place: guard, progress, tuning, clock."""
    from transformers.trainer_callback import CallbackHandler

    from taskoffer_trainer import rank
    from taskoffer_trainer.clock import STARTED, now

    folder = Path(given["folder"])
    config = {
        "jobName": "benchmark",
        "taskID": "benchmark",
        "taskType": "InstructText",
        "gpus": 1,
        "model": {"name": "lab/llama", "path": given["model"]},
        "data": {
            "path": given["data"],
            "instruct": {"fieldInstruction": "instruction", "fieldInput": "input", "fieldOutput": "output"},
            "evalFraction": 0.02,
            "evalRowsMax": 4,
        },
        "lora": {"r": 8, "loraAlpha": 16},
        "train": {
            "perDeviceTrainBatchSize": given["batch"],
            "maxSteps": given["steps"],
            "learningRate": given["learning_rate"],
            "lrSchedulerType": "cosine",
            "warmupSteps": 0,
            "maxLength": given["max_length"],
            "evalSteps": 10 * given["steps"],
            "saveSteps": 10 * given["steps"],
            "gradientCheckpointing": False,
            "bf16": False,
            "seed": given["seed"],
        },
        "outputDir": str(folder / "out"),
        "checkpointDir": str(folder / "checkpoints"),
    }
    for name in ("out", "checkpoints", "run"):
        (folder / name).mkdir(parents=True)
    (folder / "run" / "run.json").write_text(json.dumps(config), encoding="utf-8")
    os.environ.update({"TASKOFFER_RUN_DIR": str(folder / "run"), STARTED: now().isoformat()})
    watch, spent = Stopwatch(given["steps"]), [0.0]
    _watch_callbacks(CallbackHandler, watch, spent)
    code = rank.main()
    if code != 0:
        raise SystemExit(f"our trainer ended with exit code {code}")
    state = next((folder / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {**watch.seconds(), "losses": losses, "callbacks_per_step": spent[0] / (given["steps"] - WARM_UP)}


def _watch_callbacks(handler: Any, watch: Stopwatch, spent: list[float]) -> None:
    """Time every call of our own callbacks that belongs to a step; evaluations and saves are none."""
    original: Callable[..., Any] = handler.call_event
    in_steps = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log")

    def call_event(self: Any, event: str, *arguments: Any, **more: Any) -> Any:
        if event in in_steps and watch.seen >= WARM_UP:
            for callback in self.callbacks:
                if type(callback).__module__.startswith("taskoffer_trainer"):
                    _timed(callback, event, spent)
        found = original(self, event, *arguments, **more)
        if event == "on_step_end":
            watch.step()
        return found

    handler.call_event = call_event


def _timed(callback: Any, event: str, spent: list[float]) -> None:
    """Let a callback's method add its CPU time; once for each."""
    method = getattr(callback, event)
    if getattr(method, "timed", False):
        return

    def timed(*arguments: Any, **more: Any) -> Any:
        began = time.process_time()
        try:
            return method(*arguments, **more)
        finally:
            spent[0] += time.process_time() - began

    timed.timed = True  # type: ignore[attr-defined]
    setattr(callback, event, timed)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    result = (ours if asked["kind"] == "ours" else plain)(asked)
    print("result " + json.dumps(result), flush=True)
    # Library destructors can hang or abort.
    os._exit(0)
