"""Answers as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from decimal import Decimal

from taskoffer.api.inquiry import Counterfactual, Explained, OfferAnswer, QueueAnswer, Queued, Start
from taskoffer.decision.finish import duration_text


def explanation(answer: OfferAnswer) -> str:
    """Return an explanation of one offer."""
    offer, now = answer.offer, answer.now
    parts = [
        _headline(offer),
        *_facts(offer, now),
        *_block("WHAT STANDS AGAINST IT", _causes(offer)),
        *_block("WHAT WOULD CHANGE THE ANSWER (each tried by deciding again)", _counterfactuals(offer)),
        *_block("SCORE", _terms(offer)),
        *_block("ESTIMATES", _estimates(offer)),
    ]
    if not answer.leading:
        parts += ["", "(answered by a replica that does not lead: it knows what the leader has written)"]
    return "\n".join(parts)


def _headline(offer: Explained) -> str:
    name = f"{offer.namespace}/{offer.name}"
    if offer.state == "Finished" and offer.stored_reason is not None:
        verdict = {"Admit": "admitted", "Wait": "accepted, and would wait", "Reject": "refused again"}[offer.verdict]
        same = (offer.reason, offer.message) == (offer.stored_reason, offer.stored_message)
        return (
            f"{name}: REFUSED ({offer.stored_reason}) {offer.stored_message}\n"
            f"  offered again now it would be {verdict}" + ("" if same else f" ({offer.reason}): {offer.message}")
        )
    if offer.state == "Finished":
        return f"{name}: FINISHED ({offer.reason}) {offer.message}"
    if offer.state == "Admitted":
        return f"{name}: ADMITTED  {offer.message}"
    if offer.verdict == "Admit":
        return f"{name}: ABOUT TO BE ADMITTED  {offer.message}"
    if offer.verdict == "Reject":
        return f"{name}: REFUSED ({offer.reason}) {offer.message}"
    accepted = "accepted, " if offer.accepted else ""
    return f"{name}: WAITING ({accepted}{offer.reason}) {offer.message}"


def _facts(offer: Explained, now: datetime) -> Iterator[str]:
    """Yield the lines below the headline: policy, GPUs, place in the queue, booking."""
    facts = [
        f"policy {offer.policy}" if offer.policy else "",
        f"size class {offer.size_class}" if offer.size_class else "",
        f"lane {offer.lane}" if offer.lane else "",
        f"{offer.gpus} GPU(s)" if offer.gpus else "",
        f"score {offer.score}" if offer.score else "",
    ]
    if any(facts):
        yield "  " + ", ".join(fact for fact in facts if fact)
    if offer.state == "Pending" and offer.stored_reason is not None:
        yield f"  its status still says {offer.stored_reason}"
    if offer.queued is not None and offer.queued.position is not None:
        yield f"  number {offer.queued.position} in the queue; {_outlook(offer.queued, now)}"
    if offer.admission is not None:
        nodes = ", ".join(f"{part.count} on {part.node_name}" for part in offer.admission.assignments)
        due = f", due {_clock(offer.admission.deadline, now)}" if offer.admission.deadline is not None else ""
        yield f"  {nodes}; job {offer.admission.job_name}{due}"
    if offer.ends is not None:
        yield f"  predicted to end {_clock(offer.ends, now)} ({_in(offer.ends, now)})"


def _outlook(queued: Queued, now: datetime) -> str:
    if queued.start is None:
        return f"no predicted start: {queued.outlook}" if queued.outlook else "too far back for a predicted start"
    return f"predicted to start {_clock(queued.start.expected, now)} ({_in(queued.start.expected, now)}), " + _between(
        queued.start, now
    )


def _between(start: Start, now: datetime) -> str:
    latest = _clock(start.latest, now) if start.latest is not None else "an open end"
    return f"between {_clock(start.earliest, now)} and {latest}"


def _block(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Yield a titled block, or nothing where it has no lines."""
    found = list(lines)
    if found:
        yield from ("", title, *(f"  {line}" for line in found))


def _causes(offer: Explained) -> Iterator[str]:
    causes = list(offer.refusals)
    if offer.binding is not None and offer.binding.reason not in {cause.reason for cause in causes}:
        causes.insert(0, offer.binding)
    for cause in causes:
        yield f"{cause.reason}: {cause.message}"
        if cause.remedy:
            yield f"    {cause.remedy}"


def _counterfactuals(offer: Explained) -> list[str]:
    lines = table([("*" if c.replaces else " ", _result(c), c.change) for c in offer.counterfactuals])
    if any(c.replaces for c in offer.counterfactuals):
        lines.append(
            "* takes a new offer: a refusal is final, and only active, expiresAt and priorityClassName ever change"
        )
    return lines


def _result(found: Counterfactual) -> str:
    if found.verdict == "Wait":
        return f"accepted, then {found.reason}"
    return "admitted" if found.after else "admitted now"


def _terms(offer: Explained) -> list[str]:
    if not offer.terms:
        return []
    rows = [("TERM", "POINTS", "HOW"), *((term.name, term.points, term.how) for term in offer.terms)]
    return table([*rows, ("sum", str(sum((Decimal(t.points) for t in offer.terms), Decimal(0))), "")], right={1})


def _estimates(offer: Explained) -> list[str]:
    return table([(item.name, item.value, item.message) for item in offer.estimates])


def waiting(answer: QueueAnswer) -> str:
    """Return the queue as a table."""
    if not answer.offers:
        return "nobody waits" if not answer.waiting else f"none of the {answer.waiting} waiting offer(s) matches"
    rows = [("#", "OFFER", "POLICY", "GPUS", "SCORE", "WAITS", "REASON", "START", "BETWEEN"), *_rows(answer)]
    shown = f"{len(answer.offers)} of {answer.matching} shown" if len(answer.offers) < answer.matching else "all shown"
    elsewhere = f" ({answer.matching} match)" if answer.matching < answer.waiting else ""
    lines = [*table(rows, right={0, 3, 4, 5}), "", f"{answer.waiting} wait{elsewhere}, {shown}"]
    lines += [f"- {note}" for note in answer.notes]
    if not answer.leading:
        lines.append("- answered by a replica that does not lead: it knows what the leader has written")
    return "\n".join(lines)


def _rows(answer: QueueAnswer) -> Iterator[Sequence[str]]:
    now = answer.now
    for place in answer.offers:
        start = _clock(place.start.expected, now) if place.start is not None else "-"
        yield (
            str(place.position) if place.position is not None else "-",
            f"{place.namespace}/{place.name}",
            place.policy or "-",
            str(place.gpus) if place.gpus is not None else "-",
            place.score or "-",
            _span(max(0.0, (now - place.since).total_seconds())),
            place.reason,
            start,
            _between(place.start, now).removeprefix("between ").replace(" and ", " .. ")
            if place.start is not None
            else place.outlook or "-",
        )


def table(rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Return rows as lines whose columns are aligned, some of them at the right."""
    cells, at_right = [list(row) for row in rows], set(right)
    if not cells:
        return []
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in at_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _clock(moment: datetime, now: datetime) -> str:
    """Write a moment in UTC: only the time where it is today."""
    return moment.strftime("%H:%M:%SZ" if moment.date() == now.date() else "%Y-%m-%d %H:%MZ")


def _in(moment: datetime, now: datetime) -> str:
    seconds = (moment - now).total_seconds()
    return f"in {_span(seconds)}" if seconds > 0 else f"{_span(-seconds)} overdue"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else duration_text(seconds)
