"""The exams of adapters for language models, on rows that no trainer saw."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BATCH = 16
MAX_LENGTH = 256
ANSWER_TOKENS = 24
DRAWN_TOKENS = 16
SEED = 7
_IGNORED = -100


def examine(model_folder: Path, adapter: Path, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Load a base model and an adapter from disk and measure both on the rows.

    Returns:
        Losses in nats per token of the answers before and after, the number of adapter tensors, and what both say
        to the first row's question.

    Raises:
        ValueError: A tensor of the file is not finite, or is not in the loaded model as it is on disk.
    """
    import torch

    base, tokenizer = _base(model_folder)
    prompt = _question(rows[0])
    with torch.inference_mode():
        before, said_before = _loss(base, tokenizer, rows), _answer(base, tokenizer, prompt)
    tuned, tensors = _tuned(base, adapter)
    with torch.inference_mode():
        after, said_after = _loss(tuned, tokenizer, rows), _answer(tuned, tokenizer, prompt)
    return {
        "before": before,
        "after": after,
        "tensors": tensors,
        "prompt": prompt,
        "answer_before": said_before,
        "answer_after": said_after,
    }


def examine_preferences(model_folder: Path, adapter: Path, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Compare by how much the adapter made each text likelier with what it did to the text's words backwards.

    Returns:
        The share of rows whose text gained more than its words backwards: `before` is 0.5, that of no change, and
        `after` is measured; `margin`, the mean difference of the gains in nats; the number of adapter tensors.

    Raises:
        ValueError: As for :func:`examine`.
    """
    import torch

    base, tokenizer = _base(model_folder)
    backwards = [{**row, "output": " ".join(reversed(row["output"].split()))} for row in rows]
    with torch.inference_mode():
        old = [_log_probs(base, tokenizer, some) for some in (rows, backwards)]
        tuned, tensors = _tuned(base, adapter)
        new = [_log_probs(tuned, tokenizer, some) for some in (rows, backwards)]
    chosen, rejected = ([now - then for now, then in zip(*pair, strict=True)] for pair in zip(new, old, strict=True))
    margins = [more - less for more, less in zip(chosen, rejected, strict=True)]
    share = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins)
    return {"before": 0.5, "after": share, "margin": math.fsum(margins) / len(margins), "tensors": tensors}


def examine_rewards(model_folder: Path, adapter: Path, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Draw a completion of each row's instruction and count the vowels in it, which is what the example rewards.

    Returns:
        The mean share of vowels in the completions without and with the adapter, and the number of adapter tensors.

    Raises:
        ValueError: As for :func:`examine`.
    """
    import torch

    base, tokenizer = _base(model_folder)
    with torch.inference_mode():
        before = _vowels(base, tokenizer, rows)
        tuned, tensors = _tuned(base, adapter)
        after = _vowels(tuned, tokenizer, rows)
    return {"before": before, "after": after, "tensors": tensors}


def _base(folder: Path) -> tuple[Any, Any]:
    """Load a base model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _tuned(base: Any, adapter: Path) -> tuple[Any, int]:
    """Put an adapter from disk on a base model; return it and the number of the adapter's tensors."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    tuned = PeftModel.from_pretrained(base, adapter).eval()
    loaded = get_peft_model_state_dict(tuned)
    stored = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{adapter}: tensor {name} is not finite")
        if name not in loaded or not torch.equal(loaded[name].to(tensor.dtype), tensor):
            raise ValueError(f"{adapter}: tensor {name} is not in the loaded model as it is on disk")
    return tuned, len(stored)


def _question(row: dict[str, str]) -> str:
    return "\n".join(part for part in (row["instruction"], row["input"]) if part)


def _chat(tokenizer: Any, question: str) -> str:
    message = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def _loss(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> float:
    """Return the mean negative log likelihood of the answers' tokens."""
    found = list(_answer_log_probs(model, tokenizer, rows))
    mean = -math.fsum(total for total, _ in found) / sum(count for _, count in found)
    if not math.isfinite(mean):
        raise ValueError(f"the loss over {len(found)} rows is {mean}")
    return mean


def _log_probs(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> list[float]:
    """Return the log probability of each row's answer in nats."""
    return [total for total, _ in _answer_log_probs(model, tokenizer, rows)]


def _answer_log_probs(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> Iterator[tuple[float, int]]:
    """Yield the log probability of each row's answer and the number of its tokens."""
    import torch

    for ids, labels, mask in _batches(tokenizer, rows):
        logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, :-1]
        wanted = torch.tensor(labels)[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), wanted, ignore_index=_IGNORED, reduction="none"
        )
        for total, count in zip(losses.sum(1).tolist(), (wanted != _IGNORED).sum(1).tolist(), strict=True):
            yield -total, count


def _vowels(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> float:
    """Return the mean share of vowels in one drawn completion of each row's instruction."""
    import torch

    shares = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for row in rows:
            given = tokenizer(_chat(tokenizer, row["instruction"]), add_special_tokens=False, return_tensors="pt")
            said = model.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=DRAWN_TOKENS,
                do_sample=True,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            )
            text = tokenizer.decode(said[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
            shares.append(sum(letter in "aeiou" for letter in text) / max(1, len(text)))
    return math.fsum(shares) / len(shares)


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
