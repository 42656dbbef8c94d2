"""Labels, annotations and paths that taskoffer puts on objects and into pods."""

from __future__ import annotations

import re

from taskoffer.api.v1alpha1.meta import GROUP

OFFER_UID_LABEL = f"{GROUP}/offer-uid"
"""On Jobs and pods: UID of the offer that the GPUs are charged to."""

JOB_LABEL = f"{GROUP}/job"
"""On Jobs and pods: name of the TrainingJob."""

ATTEMPT_LABEL = f"{GROUP}/attempt"
"""On Jobs and pods: number of the attempt."""

STEP_LABEL = f"{GROUP}/step"
"""On pods, and on Jobs around a training: prepare, train or submit; network policies choose by it."""

POLICY_LABEL = f"{GROUP}/policy"
"""On Jobs and pods: CapacityPolicy that the GPUs are booked under."""

LANE_LABEL = f"{GROUP}/lane"
"""On Jobs and pods: lane that the GPUs are booked in."""

DEVICES_ANNOTATION = f"{GROUP}/devices"
"""On ResourceClaims: the devices that the claim names, for those who do not read CEL."""

NODE_ANNOTATION = f"{GROUP}/node"
"""On ResourceClaims: the node of the devices."""

TUNING_ANNOTATION = f"{GROUP}/tuning"
"""On pods: the tuning request, which the kubelet hands on into a file of the pod."""

MANAGED_BY = {"app.kubernetes.io/managed-by": "taskoffer"}

CONTAINER = "trainer"
STEP_CONTAINER = "step"
FOLDER_CONTAINER = "folders"
"""Makes the folders that a trainer of an offer's own writes to, before that starts."""
RUN_DIR = "/etc/taskoffer"
MODEL_DIR = "/data/model"
DATASET_DIR = "/data/dataset"
OUTPUT_DIR = "/data/output"
CACHE_DIR = "/cache"
TRAINER_DIR = "/app/trainer"
"""Where the repository of an offer's own trainer lies in its pod."""
SECRETS_DIR = "/etc/taskoffer-secrets"

TRAINER_UID = 65532
"""User and group of the training container; the image's own user."""


def label_value(text: str) -> str:
    """Turn a text into what a label value may be: 63 characters, with a letter or digit at both ends."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:63].strip("-._")
