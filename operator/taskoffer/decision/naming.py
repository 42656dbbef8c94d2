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


def step_name(training_job: str, step: str, repeats: int = 0) -> str:
    """Return the name of the batch/v1 Job of a step around the training, as in ``offer-0123abcd-prepare``.

    A Job is not made twice, so that of a step that is begun again has another name, as ``offer-0123abcd-pre-1``. It is
    short, because it becomes a label value like that of an attempt.
    """
    return f"{training_job}-{step.lower()[:3]}-{repeats}" if repeats else f"{training_job}-{step.lower()}"
