"""How a node's containerd finds the lab's image registry: a `hosts.toml` that it reads at every pull."""

import urllib.parse
from pathlib import Path

from taskoffer_lab.errors import LabError
from taskoffer_lab.registry_name import REGISTRY


def hosts_folder(node: Path) -> Path:
    """Return the folder that containerd's `config_path` names, below the node's folder."""
    return node / "certs.d"


def render_hosts(endpoint: str, host_address: str) -> str:
    """Return the `hosts.toml` for an endpoint.

    Args:
        endpoint: `http://HOST:PORT`; the host 0.0.0.0 stands for every address of this machine.
        host_address: This machine's address as the node sees it.

    Raises:
        LabError: The endpoint cannot be reached from a node.
    """
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise LabError(f"registry endpoint {endpoint!r} is not http://HOST:PORT")
    host = parts.hostname
    if host in ("localhost", "127.0.0.1", "::1"):
        raise LabError(
            f"registry endpoint {endpoint} is on loopback, which a node does not share",
            f"bind the registry to 0.0.0.0 or {host_address}",
        )
    if host == "0.0.0.0":
        host = host_address
    port = f":{parts.port}" if parts.port else ""
    url = f"{parts.scheme}://{host}{port}"
    return f'server = "{url}"\n\n[host."{url}"]\n  capabilities = ["pull", "resolve"]\n'


def write_hosts(node: Path, endpoint: str, host_address: str) -> None:
    """Write the `hosts.toml` of one node."""
    folder = hosts_folder(node) / REGISTRY
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(render_hosts(endpoint, host_address))
