"""The remedies of refusals, put into words that claim no more than is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.verdict import Refusal, Remedy

Again = Callable[[TaskOfferSpec], Sequence[Refusal]]


def told(refusals: Sequence[Refusal], spec: TaskOfferSpec, again: Again) -> tuple[Refusal, ...]:
    """Return refusals with their remedies in words.

    "Accepted" is said only where the changed offer was looked at again and nothing stood against it. Otherwise a remedy
    is said to make its own filter pass: several refusals take several changes, some changes are the reader's to make,
    and whether an offer would still meet a deadline of its own is not known here.

    Args:
        refusals: What stands against the offer.
        spec: The offer.
        again: Looks at a changed offer. It is asked once for each remedy of an only refusal.
    """
    tried = len(refusals) == 1 and spec.deadline is None
    return tuple(_told(refusal, spec, again if tried else None) for refusal in refusals)


def _told(refusal: Refusal, spec: TaskOfferSpec, again: Again | None) -> Refusal:
    if not refusal.remedies:
        return refusal
    accepted, passes, blocked = [], [], []
    for remedy in refusal.remedies:
        if again is None or remedy.change is None:
            passes.append(remedy)
        elif not (left := again(spec.model_copy(update=dict(remedy.change)))):
            accepted.append(remedy)
        elif all(other.reason is not refusal.reason for other in left):
            blocked.append(f"{_passing([remedy])}, but then {left[0].reason.value}: {left[0].message}")
    words = [f"accepted {_either(accepted)}"] if accepted else blocked[:1]
    words += [_passing(passes)] if passes else []
    return Refusal(refusal.reason, refusal.message, "; ".join(words))


def _passing(remedies: Sequence[Remedy]) -> str:
    return f"this filter passes {_either(remedies)}"


def _either(remedies: Sequence[Remedy]) -> str:
    first, *rest = (remedy.says for remedy in remedies)
    return " or ".join([first, *(says.removeprefix("with ") for says in rest)])
