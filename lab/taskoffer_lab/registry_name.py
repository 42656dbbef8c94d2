"""The name under which nodes of the lab pull the lab's own images."""

REGISTRY = "registry.taskoffer.local"
"""Not a DNS name: each node's containerd maps it to the lab registry's address (`certs.d/hosts.toml`)."""

PAUSE_IMAGE = "registry.k8s.io/pause:3.10.2"
"""The sandbox image, built on the spot from the source in the Kubernetes module."""

BUSYBOX_IMAGE = f"{REGISTRY}/busybox:1"
"""A shell for cheap pods; present on every node of the lab without a pull."""
