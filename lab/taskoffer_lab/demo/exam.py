"""An exam for adapters that shares nothing with the trainer: other rows, other code, another process.

`python -m taskoffer_lab.demo.exam` reads one JSON document from stdin and writes one to stdout:
`{"rows": FILE, "pupils": [{"name", "model", "adapter"}]}` →
`{NAME: {"before", "after", "tensors", "prompt", "answer_before", "answer_after"}}`.
"""

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BATCH = 16
MAX_LENGTH = 256
ANSWER_TOKENS = 24
_IGNORED = -100


def main() -> int:
    """Examine every adapter of the request and return the exit code."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    request = json.load(sys.stdin)
    rows = [json.loads(line) for line in Path(request["rows"]).read_text(encoding="utf-8").splitlines()]
    answers = {}
    for pupil in request["pupils"]:
        print(f"examining {pupil['name']}", file=sys.stderr, flush=True)
        answers[pupil["name"]] = examine(Path(pupil["model"]), Path(pupil["adapter"]), rows)
    json.dump(answers, sys.stdout)
    return 0


def examine(model_folder: Path, adapter: Path, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Load a base model and an adapter from disk and measure both on the rows.

    Returns:
        Losses in nats per token of the answers before and after, the number of adapter tensors, and what both say
        to the first row's question.

    Raises:
        ValueError: A tensor of the file is not finite, or is not in the loaded model as it is on disk.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    prompt = _question(rows[0])
    with torch.inference_mode():
        before, said_before = _loss(base, tokenizer, rows), _answer(base, tokenizer, prompt)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    loaded = get_peft_model_state_dict(tuned)
    stored = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{adapter}: tensor {name} is not finite")
        if name not in loaded or not torch.equal(loaded[name].to(tensor.dtype), tensor):
            raise ValueError(f"{adapter}: tensor {name} is not in the loaded model as it is on disk")
    with torch.inference_mode():
        after, said_after = _loss(tuned, tokenizer, rows), _answer(tuned, tokenizer, prompt)
    return {
        "before": before,
        "after": after,
        "tensors": len(stored),
        "prompt": prompt,
        "answer_before": said_before,
        "answer_after": said_after,
    }


def _question(row: dict[str, str]) -> str:
    return "\n".join(part for part in (row["instruction"], row["input"]) if part)


def _chat(tokenizer: Any, question: str) -> str:
    message = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def _loss(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> float:
    """Return the mean negative log likelihood of the answers' tokens."""
    import torch

    total, count = 0.0, 0
    for ids, labels, mask in _batches(tokenizer, rows):
        logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, :-1]
        wanted = torch.tensor(labels)[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=_IGNORED, reduction="sum"
        )
        total += float(losses)
        count += int((wanted != _IGNORED).sum())
    mean = total / count
    if not math.isfinite(mean):
        raise ValueError(f"the loss over {count} tokens is {mean}")
    return mean


def _batches(
    tokenizer: Any, rows: Sequence[dict[str, str]]
) -> Iterator[tuple[list[list[int]], list[list[int]], list[list[int]]]]:
    """Yield token ids, labels and attention masks, padded on the right; only answers have labels."""
    encoded = []
    for row in rows:
        given = tokenizer(_chat(tokenizer, _question(row)), add_special_tokens=False)["input_ids"]
        said = tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids = (given + said)[:MAX_LENGTH]
        encoded.append((ids, ([_IGNORED] * len(given) + said)[:MAX_LENGTH]))
    for start in range(0, len(encoded), BATCH):
        part = encoded[start : start + BATCH]
        longest = max(len(ids) for ids, _ in part)
        yield (
            [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in part],
            [labels + [_IGNORED] * (longest - len(labels)) for _, labels in part],
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in part],
        )


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    """Return the likeliest continuation that repeats no pair of tokens (a model this small would only do that)."""
    inputs = tokenizer(_chat(tokenizer, question), add_special_tokens=False, return_tensors="pt")
    said = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        no_repeat_ngram_size=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    # A model that knows nothing also says control characters, which neither a terminal nor a picture can take.
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(str(text).split()))


if __name__ == "__main__":
    sys.exit(main())
