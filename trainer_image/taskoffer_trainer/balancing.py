"""The balance of a mixture's experts: the auxiliary loss that TRL adds where a model's configuration asks for one.

The loss (Switch Transformer, arXiv:2101.03961, equations 4 to 6) is a product of two means over the tokens that go
through the model together: how often each expert is chosen, and how likely each is. So it would change with the size of
a piece. Here it is taken of every row by itself, and the mean over the rows of the step is added. That is what TRL does
with one row at once and the rows of a step accumulated, however a step is cut here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.models.mixtral import modeling_mixtral

__all__ = ["balanced_by_row", "row_balances"]


def row_balances(
    router_logits: Sequence[torch.Tensor], top_k: int, units: torch.Tensor, mask: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the balancing loss of each unit: ``top_k`` where all experts are chosen alike, and more where not.

    Args:
        router_logits: one tensor of shape (tokens, experts) for each layer with experts.
        top_k: experts that each token goes through.
        units: the number of the unit that each token belongs to, shape (tokens).
        mask: 1 for each token that counts, else 0, shape (tokens).
        count: how many units there are.
    """
    experts = router_logits[0].shape[-1]
    chosen = torch.zeros(count, experts, device=mask.device)
    likely = torch.zeros(count, experts, device=mask.device)
    for logits in router_logits:
        weights = torch.softmax(logits.to(mask.device), dim=-1).float()
        taken = torch.zeros_like(weights).scatter(1, weights.topk(top_k, dim=-1).indices, 1.0)
        chosen = chosen.index_add(0, units, taken * mask[:, None])
        likely = likely.index_add(0, units, weights * mask[:, None])
    tokens = len(router_logits) * torch.zeros(count, device=mask.device).index_add(0, units, mask)
    return experts * (chosen * likely).sum(dim=1) / tokens.clamp(min=1).square()


@contextlib.contextmanager
def balanced_by_row(trainer: Any, lengths: Sequence[int], share: float, rows_of_unit: int = 1) -> Iterator[None]:
    """Let TRL add ``share`` times the sum of the units' balancing losses, instead of the loss of all tokens together.

    Args:
        trainer: TRL's, which knows whether there is anything to add, and with which coefficient.
        lengths: tokens of each row, which either are padded to a common length or follow each other in one row.
        share: see above.
        rows_of_unit: rows that belong together: the first of all units come first, then their second ones.
    """
    if not trainer.aux_loss_enabled:
        yield
        return

    def balance(router_logits: Any, _experts: int, top_k: int, attention_mask: torch.Tensor | None) -> torch.Tensor:
        units, mask = _tokens(router_logits[0], lengths, attention_mask)
        count = len(lengths) // rows_of_unit
        found = row_balances(router_logits, top_k, units % count, mask, count)
        means.append(float(found.detach().mean()))
        return share * found.sum()

    # TRL looks the function up each time, and gives it the logits, which it does not hand out otherwise.
    means: list[float] = []
    plain = modeling_mixtral.load_balancing_loss_func
    modeling_mixtral.load_balancing_loss_func = balance
    try:
        yield
    finally:
        modeling_mixtral.load_balancing_loss_func = plain
    # What TRL reports is to be the loss itself, and not the share that it was given.
    trainer._metrics["train" if trainer.model.training else "eval"]["aux_loss"][-1] = means[0]


def _tokens(
    logits: torch.Tensor, lengths: Sequence[int], attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which row each token belongs to, and whether it counts."""
    rows = torch.arange(len(lengths), device=logits.device)
    known = torch.tensor(lengths, device=logits.device)
    if logits.shape[0] == sum(lengths):
        return rows.repeat_interleave(known), torch.ones(logits.shape[0], device=logits.device)
    width = logits.shape[0] // len(lengths)
    if attention_mask is None:
        attention_mask = torch.arange(width, device=logits.device) < known[:, None]
    return rows.repeat_interleave(width), attention_mask.reshape(-1).float()
