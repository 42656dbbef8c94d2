"""Held-out figures of preference pairs: one definition for the base model, the training and the export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from taskoffer_trainer.dpo_tokens import TokenPair
from taskoffer_trainer.held_out import padded
from taskoffer_trainer.tokens import IGNORED, TokenRow

if TYPE_CHECKING:
    from taskoffer_trainer.evaluating import Evaluation

__all__ = ["PairFigures", "log_probs"]


def log_probs(model: Any, pairs: Sequence[TokenPair], pad: int) -> Any:
    """Return the log-probability of each answer, summed over its tokens, in nats.

    Args:
        model: a causal language model with TRL's fused head.
        pairs: what to look at.
        pad: token id to pad with.

    Returns:
        A tensor of shape ``(2, pairs)`` in double precision on the CPU: chosen, then rejected.
    """
    import torch

    rows = [_row(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [_row(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    device = next(model.parameters()).device
    with torch.no_grad():
        outputs = model(**padded(rows, pad, device), fused_lm_head=True)
    return outputs.log_probs.double().sum(dim=1).cpu().view(2, len(pairs))


def _row(prompt: list[int], answer: list[int]) -> TokenRow:
    return TokenRow(prompt + answer, [IGNORED] * len(prompt) + answer)


def _switched_off(model: Any) -> bool:
    """Tell whether a model is its base model for now, which then needs no second pass."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return all(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))


class PairFigures:
    """Measures a model with an adapter against the same model without it, on the held-out pairs.

    What the base model says of the pairs never changes, so it is computed once and kept.
    """

    def __init__(self, pairs: Sequence[TokenPair], pad: int, beta: float) -> None:
        self.pairs, self.pad, self.beta = pairs, pad, beta
        self._base: dict[int, Any] = {}

    def measure(
        self, model: Any, evaluation: Evaluation, shared: bool, between: Callable[[], None]
    ) -> dict[str, float]:
        """Return the figures over all pairs; they depend neither on batches nor on the number of processes.

        With r = beta * (log-probability under the model - under the base model) of an answer, as in the DPO paper
        (arXiv:2305.18290, section 4), and the margin m = r(chosen) - r(rejected):

        * ``eval_loss``: mean of -log sigmoid(m), whatever loss is trained: ln 2 for a model that did not change;
        * ``eval_accuracy``: share of pairs with m > 0, where m = 0 counts half: 0.5 for a model that did not change;
        * ``eval_margin``, ``eval_reward_chosen`` and ``eval_reward_rejected``: means of m and of both r.

        Args:
            model: a PEFT model; where its adapter is switched off already, the figures are those of no change.
            evaluation: goes through the pairs.
            shared: every rank takes its share of the pairs and the sums are added up; all ranks must call it.
            between: called between pieces of the work; may raise to leave early.
        """

        def work(numbers: Sequence[int]) -> Sequence[float]:
            return self._sums(model, numbers)

        found = evaluation.over(model, range(len(self.pairs)), work, 4, shared, between)
        loss, right, chosen, rejected = found
        pairs = len(self.pairs)
        return {
            "eval_loss": loss / pairs,
            "eval_accuracy": right / pairs,
            "eval_margin": (chosen - rejected) / pairs,
            "eval_reward_chosen": chosen / pairs,
            "eval_reward_rejected": rejected / pairs,
        }

    def _sums(self, model: Any, numbers: Sequence[int]) -> Sequence[float]:
        import torch

        now = log_probs(model, [self.pairs[number] for number in numbers], self.pad)
        lacking = [number for number in numbers if number not in self._base]
        if lacking and _switched_off(model):
            self._base.update(zip(numbers, now.unbind(dim=1), strict=True))
        elif lacking:
            with model.disable_adapter():
                base = log_probs(model, [self.pairs[number] for number in lacking], self.pad)
            self._base.update(zip(lacking, base.unbind(dim=1), strict=True))
        rewards = self.beta * (now - torch.stack([self._base[number] for number in numbers], dim=1))
        margins = rewards[0] - rewards[1]
        losses = -torch.nn.functional.logsigmoid(margins)
        right = (margins > 0).double() + 0.5 * (margins == 0).double()
        found: list[float] = torch.stack([losses.sum(), right.sum(), *rewards.sum(dim=1)]).tolist()
        return found
