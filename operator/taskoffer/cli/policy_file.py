"""CapacityPolicies from files, for the commands that need no cluster."""

from __future__ import annotations

from pathlib import Path

from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.cli.errors import CommandError


def read_policy(path: Path) -> CapacityPolicySpec:
    """Return the spec of the CapacityPolicy in a YAML file.

    Raises:
        CommandError: with code 2 when the file cannot be read or holds something else, 1 when the policy is not valid.
    """
    import yaml
    from pydantic import ValidationError

    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("kind") != "CapacityPolicy":
            raise CommandError(f"{path} holds no CapacityPolicy: give a manifest of this kind", 2)
        return CapacityPolicySpec.model_validate(manifest.get("spec") or {})
    except ValidationError as error:
        raise CommandError(f"{path} is not a valid CapacityPolicy:\n{error}", 1) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        # Odd dates, numbers of thousands of digits and very deep nesting are no YAML errors to the reader of YAML.
        raise CommandError(f"{path} cannot be read: {error}", 2) from None
