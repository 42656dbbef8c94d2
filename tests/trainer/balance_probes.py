"""Probes of mixtures of experts; see ``probing``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probing import Probe, main, probe, tiny_mixture, train


@probe
def balance(found: Probe) -> Any:
    """A step with a mixture of experts, cut in several ways, and by TRL itself with one row at once."""
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder = tiny_mixture(Path(found.base["model"]["path"]), found.folder / "moe", router_aux_loss_coef=0.5)
    step = {"maxSteps": 1, "evalSteps": 1, "saveSteps": 1, "lrSchedulerType": "constant", "warmupSteps": 0}

    def made(rows: int, **changes: Any) -> Any:
        train = {**step, "perDeviceTrainBatchSize": rows, "gradientAccumulationSteps": 4 // rows, **changes}
        return found.course(model={"name": "acme/tiny-moe", "path": str(folder)}, train=train)

    def seen(log: list[dict[str, float]]) -> list[float]:
        return [log[0]["loss"], log[0]["grad_norm"]]

    said = {str(rows): seen(train(made(rows)).trainer.state.log_history) for rows in (1, 2, 4)}
    for rows in (1, 4):
        said[f"packed {rows}"] = seen(train(made(rows, packing=True)).trainer.state.log_history)
    spare = made(4)
    taken = [spare.trainer.train_dataset[row] for row in spare.steps.batches(0).of(0)]
    for name, coefficient in (("plain", None), ("plain without", 0.0)):
        AcceleratorState._reset_state(True)
        arguments = SFTConfig(
            output_dir=str(found.folder / name),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=1,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            save_strategy="no",
            report_to="none",
            router_aux_loss_coef=coefficient,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        base = made(4).trainer.model
        plain = SFTTrainer(
            model=base, args=arguments, train_dataset=Dataset.from_list(taken), processing_class=spare.tokenizer
        )
        plain.train()
        said[name] = seen(plain.state.log_history)
    return said


@probe
def balance_of_pairs(found: Probe) -> Any:
    """Losses and gradients of pairs with a mixture of experts: at once, in pieces, and TRL's own of a single one."""
    import torch
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    from taskoffer_trainer.dpo import PreferenceTrainer

    rows = [
        {"prompt_ids": [5, 6, 7 + n], "chosen_ids": list(range(20 + n, 24 + 2 * n)), "rejected_ids": [40, 41 + n]}
        for n in range(4)
    ]
    said = {}
    for coefficient in (0.0, 0.5):
        AcceleratorState._reset_state(True)
        place = found.folder / f"{coefficient}"
        folder = tiny_mixture(Path(found.base["model"]["path"]), place, router_aux_loss_coef=coefficient)
        trainer = PreferenceTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=DPOConfig(output_dir=str(place / "out"), use_cpu=True, bf16=False, activation_checkpointing=False),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        seen = {}
        for name, pieces in {"whole": [rows], "pieces": [rows[:1], rows[1:]]}.items():
            trainer.model.zero_grad()
            losses = [trainer.piece_loss(trainer.model, piece) for piece in pieces]
            for loss in losses:
                loss.total.backward()
            total = float(sum(loss.total.detach() for loss in losses))
            grown = [one.grad.flatten() for one in trainer.model.parameters() if one.requires_grad]
            seen[name] = [total / len(rows), float(torch.cat(grown).norm()) / len(rows)]
        batch = trainer._prepare_inputs(trainer.data_collator(rows[:1]))
        seen["plain"] = float(trainer.compute_loss(trainer.model, batch).detach())
        seen["single"] = float(trainer.piece_loss(trainer.model, rows[:1]).total.detach())
        said[str(coefficient)] = seen
    return said


if __name__ == "__main__":
    main()
