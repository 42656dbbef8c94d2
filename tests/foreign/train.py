"""A trainer as somebody else may have written it: transformers and peft, told all by the market's arguments."""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("task-id", "model", "dataset", "dataset-type", "task-type", "file-format", "expected-repo-name"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--hours-to-complete", type=float, required=True)
    given = parser.parse_args()
    columns = json.loads(given.dataset_type)
    rows = [json.loads(line) for line in Path(given.dataset).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for row in rows[:10]:
        text = f"{row[columns['field_instruction']]} {row[columns['field_output']]}"
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.4f}", flush=True)
    model.save_pretrained(Path("/app/checkpoints") / given.task_id / given.expected_repo_name)


if __name__ == "__main__":
    main()
