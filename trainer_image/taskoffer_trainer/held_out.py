"""Held-out loss and sample answers: one definition for the base model, the training and the export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taskoffer_trainer.tokens import TokenRow

__all__ = ["answers", "held_out_loss"]

ANSWER_TOKENS = 64
"""Longest sample answer in tokens."""


def _tensors(rows: Sequence[TokenRow], pad: int, device: Any) -> dict[str, Any]:
    import torch

    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    labels = torch.full((len(rows), width), -100, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        ids[place, :length] = torch.tensor(row.input_ids)
        labels[place, :length] = torch.tensor(row.labels)
        mask[place, :length] = 1
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def held_out_loss(
    model: Any,
    batches: Sequence[Sequence[TokenRow]],
    pad: int,
    between: Callable[[], None] = lambda: None,
    shared: bool = False,
) -> float:
    """Return the mean negative log-likelihood per answer token, in nats, over all rows.

    The mean runs over tokens and not over batches, so it depends neither on the batch size nor on the number
    of processes.

    Args:
        model: a causal language model with TRL's fused head, which never builds all logits at once.
        batches: the rows.
        pad: token id to pad with.
        between: called before each batch; may raise to leave early.
        shared: every rank takes its share of the batches and the sums are added up; all ranks must call it.

    Raises:
        ValueError: when no row has an answer token.
    """
    import torch
    import torch.distributed as dist

    shared = shared and dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    device = next(model.parameters()).device
    # Sums in double precision on the CPU: the same in every order to far more digits than are reported.
    total = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches[rank::world]:
                between()
                outputs = model(**_tensors(batch, pad, device), fused_lm_head=True)
                total[0] -= outputs.log_probs.double().sum().cpu()
                total[1] += outputs.label_mask.sum().cpu()
    finally:
        model.train(was_training)
    if shared:
        total = total.to(device)
        dist.all_reduce(total)
    if not total[1] > 0:
        raise ValueError("none of the held-out rows has an answer token")
    return float(total[0] / total[1])


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], between: Callable[[], None] = lambda: None
) -> list[str]:
    """Let the model answer each prompt, always taking the likeliest token, and return the answers' texts.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; a chat template is used where it has one.
        prompts: what a user would say.
        between: called before each prompt; may raise to leave early.
    """
    import torch

    was_training = model.training
    model.eval()
    found = []
    try:
        for prompt in prompts:
            between()
            text = prompt
            if tokenizer.chat_template:
                message = [{"role": "user", "content": prompt}]
                text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
            ids = inputs["input_ids"].to(model.device)
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=ANSWER_TOKENS,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=tokenizer.pad_token_id,
                )
            found.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    finally:
        model.train(was_training)
    return found
