"""Held-out loss and sample answers: one definition for the base model, the training and the export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from taskoffer_trainer.tokens import ANSWER_TOKENS, TokenRow, prompt_room

__all__ = ["answer_losses", "answers", "padded", "turns"]

Batch = TypeVar("Batch")


def padded(rows: Sequence[TokenRow], pad: int, device: Any) -> dict[str, Any]:
    """Return rows as the tensors of one batch, filled up to the longest row on the right.

    Args:
        rows: at least one.
        pad: token id to fill up with.
        device: where the tensors go.
    """
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


def turns(batches: Sequence[Batch], rank: int, world: int, all_alike: bool) -> list[tuple[Batch, float]]:
    """Return a rank's share of the batches, each with how much it counts.

    Args:
        batches: all of them.
        rank: whose share.
        world: how many ranks there are.
        all_alike: every rank has to have as many batches, because the model is shared out and a pass through it needs
            all ranks; what fills a share up counts nothing.
    """
    mine = [(batch, 1.0) for batch in batches[rank::world]]
    lacking = -(-len(batches) // world) - len(mine) if all_alike else 0
    return mine + [(batches[0], 0.0)] * lacking


def answer_losses(model: Any, rows: Sequence[TokenRow], pad: int) -> tuple[float, float]:
    """Return the sum of the answer tokens' negative log-likelihoods in nats, and the number of these tokens.

    Args:
        model: a causal language model with TRL's fused head, which never builds all logits at once.
        rows: at least one.
        pad: token id to pad with.
    """
    outputs = model(**padded(rows, pad, next(model.parameters()).device), fused_lm_head=True)
    # Sums in double precision: the same in every order to far more digits than are reported.
    return -float(outputs.log_probs.double().sum()), float(outputs.label_mask.sum())


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    longest: int,
    between: Callable[[], None] = lambda: None,
    most: int = ANSWER_TOKENS,
    between_tokens: Callable[[], None] | None = None,
) -> list[str]:
    """Let the model answer each prompt, always taking the likeliest token, and return the answers' texts.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; a chat template is used where it has one.
        prompts: what a user would say; of one that is too long its end is answered.
        longest: tokens of the longest row that the model is trained with.
        between: called before each prompt; may raise to leave early.
        most: longest answer in tokens.
        between_tokens: called after each token; may raise to leave early.
    """
    import torch

    def heard(ids: Any, _scores: Any, **_: Any) -> Any:
        """Be asked after each token whether to stop; the answer is always no."""
        if between_tokens is not None:
            between_tokens()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

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
            ids = inputs["input_ids"][:, -prompt_room(longest) :].to(model.device)
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(most, longest - ids.shape[1]),
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=tokenizer.pad_token_id,
                    stopping_criteria=[heard] if between_tokens is not None else None,
                )
            found.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    finally:
        model.train(was_training)
    return found
