"""The cluster providers by name."""

from pathlib import Path

from taskoffer_lab.cluster import Provider
from taskoffer_lab.errors import LabError
from taskoffer_lab.kind_provider import KindProvider
from taskoffer_lab.kubeconfig_provider import KubeconfigProvider
from taskoffer_lab.local_provider import LocalProvider

PROVIDERS = ("local", "kind", "kubeconfig")


def provider(name: str, kubeconfig: Path | None = None) -> Provider:
    """Return a provider.

    Args:
        name: One of `PROVIDERS`.
        kubeconfig: For the `kubeconfig` provider; None is the usual place.

    Raises:
        LabError: No such provider.
    """
    if name == "local":
        return LocalProvider()
    if name == "kind":
        return KindProvider()
    if name == "kubeconfig":
        return KubeconfigProvider(kubeconfig)
    raise LabError(f"no provider {name!r}", f"there are: {', '.join(PROVIDERS)}")
