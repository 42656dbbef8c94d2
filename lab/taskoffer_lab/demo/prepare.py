"""One part of the preparation as a process of its own: `python -m taskoffer_lab.demo.prepare PART`.

Parts run side by side. As processes they can be ended at any moment, with everything that they started.
"""

import argparse
import ctypes
import os
import signal
import sys

from taskoffer_lab.errors import LabError
from taskoffer_lab.process_table import start_time

_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    """Do one part and return the exit code; progress goes to stderr, the result to stdout."""
    parser = argparse.ArgumentParser(prog="python -m taskoffer_lab.demo.prepare", description=__doc__)
    parser.add_argument("part", choices=("tools", "images", "material"))
    parser.add_argument("--endpoint", help="for images: http://HOST:PORT of a running registry")
    parser.add_argument("--parent", type=int, help="process id whose end ends this one too")
    arguments = parser.parse_args(argv)
    if arguments.parent is not None:
        _end_with(arguments.parent)
    try:
        if arguments.part == "tools":
            _tools()
        elif arguments.part == "images":
            _images(arguments.endpoint)
        else:
            _material()
    except (LabError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with(parent: int) -> None:
    """Get SIGINT when the parent ends, so that a build cleans up as after Ctrl-C (prctl(2))."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() != parent or start_time(parent) is None:
        raise SystemExit(130)


def _tools() -> None:
    from taskoffer_lab.base_images import ensure_base_images
    from taskoffer_lab.toolchain import ensure_tools

    ensure_tools(["controlplane", "node"])
    ensure_base_images()


def _images(endpoint: str) -> None:
    from taskoffer_lab.images import ensure_images

    images = ensure_images(endpoint)
    print(f"{images.trainer}\n{images.operator}")


def _material() -> None:
    from taskoffer_lab.demo.material import build_material, material

    build_material(material())


if __name__ == "__main__":
    sys.exit(main())
