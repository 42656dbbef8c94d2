"""Names that follow from other names, with the length rules of Kubernetes in one place."""

from __future__ import annotations


def job_name(offer_name: str, offer_uid: str) -> str:
    """Return the name of an offer's TrainingJob: the offer's name and the first 8 characters of its UID.

    The UID keeps an offer that was deleted and created again under the same name apart from the first one.
    """
    return f"{offer_name}-{offer_uid[:8]}"


def attempt_name(training_job: str, number: int) -> str:
    """Return the name of the batch/v1 Job of an attempt, counted from 1."""
    return f"{training_job}-{number}"
