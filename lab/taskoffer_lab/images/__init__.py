"""The product's images: built from its Dockerfiles without a container engine, and served to the nodes.

:func:`ensure_images` is all that most callers need; :class:`Registry` serves what it pushes.
"""

from taskoffer_lab.images.ensure import Images, ensure_images
from taskoffer_lab.images.registry import Registry, registry_command

__all__ = ["Images", "Registry", "ensure_images", "registry_command"]
