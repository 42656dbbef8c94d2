"""Command line: ``python -m taskoffer_lab.images`` builds both images and pushes them to a registry."""

import argparse
import contextlib
import sys

from taskoffer_lab.errors import LabError
from taskoffer_lab.images.ensure import ensure_images
from taskoffer_lab.images.registry import Registry


def main(argv: list[str] | None = None) -> int:
    """Build and push; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m taskoffer_lab.images", description=__doc__)
    parser.add_argument("--endpoint", help="http://HOST:PORT of a running registry; default: the lab's own storage")
    arguments = parser.parse_args(argv)
    try:
        with contextlib.ExitStack() as stack:
            endpoint = arguments.endpoint or stack.enter_context(Registry.start("127.0.0.1")).endpoint
            images = ensure_images(endpoint)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{images.trainer}\n{images.operator}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
