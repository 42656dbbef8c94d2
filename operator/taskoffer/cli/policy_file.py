"""CapacityPolicies from files, for the commands that need no cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taskoffer.api.faults import faults_of
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.meta import API_VERSION, name_problem
from taskoffer.cli.errors import CommandError

_BEGIN = f"one begins with apiVersion: {API_VERSION} and kind: CapacityPolicy"


def read_policy(path: Path) -> CapacityPolicySpec:
    """Return the spec of the CapacityPolicy in a YAML file.

    Raises:
        CommandError: with code 2 when the file cannot be read or holds something else, 1 when the policy is not valid.
    """
    return valid_spec(_manifest(path), str(path))


def valid_spec(manifest: dict[str, Any], source: str) -> CapacityPolicySpec:
    """Return the spec of a CapacityPolicy.

    Args:
        manifest: An object of this kind.
        source: What it is called in errors.

    Raises:
        CommandError: with code 1 and a line for each fault, when it is not valid.
    """
    from pydantic import ValidationError

    faults = list(_envelope_faults(manifest))
    spec = None
    try:
        if "spec" in manifest:
            spec = CapacityPolicySpec.model_validate(manifest["spec"])
    except ValidationError as error:
        faults += faults_of(error, CapacityPolicySpec, prefix=("spec",), values=True)
    if faults or spec is None:
        raise CommandError("\n  ".join([f"{source} is not a valid CapacityPolicy:", *faults]), 1)
    return spec


def _envelope_faults(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong around the spec; a server would refuse it as well."""
    version, metadata = manifest.get("apiVersion"), manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    faults = []
    if version != API_VERSION:
        faults.append(f"apiVersion: {'is missing' if version is None else f'is {version!r}'}: write {API_VERSION}")
    if name is None:
        faults.append("metadata.name: is missing: set it")
    elif (problem := name_problem(str(name))) is not None:
        faults.append(f"metadata.name: {str(name)[:60]!r} {problem}")
    if "spec" not in manifest:
        faults.append("spec: is missing: set it, or begin with a preset")
    return faults


def _manifest(path: Path) -> dict[str, Any]:
    """Read the one object of a file and say what else there is."""
    found = [document for document in _documents(path) if document is not None]
    if not found:
        raise CommandError(f"{path} is empty and holds no CapacityPolicy: {_BEGIN}", 2)
    if len(found) > 1:
        raise CommandError(f"{path} holds {len(found)} YAML documents: keep one CapacityPolicy in it", 2)
    (manifest,) = found
    if isinstance(manifest, list):
        raise CommandError(f"{path} holds a list and no CapacityPolicy: {_BEGIN}, without a '-' before it", 2)
    if not isinstance(manifest, dict):
        raise CommandError(f"{path} holds no CapacityPolicy, only the text {str(manifest)[:60]!r}: {_BEGIN}", 2)
    kind = manifest.get("kind")
    if kind != "CapacityPolicy":
        what = "an object without kind" if kind is None else f"the kind {str(kind)[:60]!r}"
        raise CommandError(f"{path} holds no CapacityPolicy but {what}: {_BEGIN}", 2)
    return manifest


def _documents(path: Path) -> list[Any]:
    import yaml

    try:
        # Bytes, so that YAML's own rules for byte order marks and UTF-16 hold.
        return list(yaml.safe_load_all(path.read_bytes()))
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror or error}", 2) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise CommandError(f"{path} cannot be read as YAML{where}: {error.problem or error.context}", 2) from None
    except yaml.reader.ReaderError as error:
        raise CommandError(f"{path} cannot be read: byte {error.position} is no text in UTF-8", 2) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        # Odd dates, numbers of thousands of digits and very deep nesting are no YAML errors to the reader of YAML.
        raise CommandError(f"{path} cannot be read: {' '.join(str(error).split())}", 2) from None
