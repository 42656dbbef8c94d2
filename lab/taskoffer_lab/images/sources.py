"""What goes into an image: a copy of exactly the files that its Dockerfile names, and a key of their content."""

import hashlib
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.errors import LabError
from taskoffer_lab.images.base import BASE_RECIPE
from taskoffer_lab.paths import package_root

_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.pyo")
_KEY_LENGTH = 12


@dataclass(frozen=True)
class ImageSource:
    """One image: its name in the registry, and the Dockerfile in the repository that makes it."""

    name: str
    dockerfile: str


TRAINER = ImageSource("taskoffer-trainer", "Dockerfile.trainer")
OPERATOR = ImageSource("taskoffer-operator", "Dockerfile.operator")


@dataclass(frozen=True)
class BuildContext:
    """A copy of an image's files that nobody changes any more.

    Attributes:
        source: Which image.
        folder: The build context.
        key: 12 hexadecimal digits of the digest of base recipe, Dockerfile and every file.
    """

    source: ImageSource
    folder: Path
    key: str


def repository_root() -> Path:
    """Return the checkout that this package runs from.

    Raises:
        LabError: It was installed without the Dockerfiles.
    """
    root = package_root().parent
    if not (root / TRAINER.dockerfile).is_file():
        raise LabError(f"no {TRAINER.dockerfile} in {root}", "run the lab from a checkout of the repository")
    return root


def copied_paths(dockerfile: str) -> list[str]:
    """Return what a Dockerfile copies out of the build context, in order, each once."""
    joined = dockerfile.replace("\\\n", " ")
    found: dict[str, None] = {}
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0].upper() in ("COPY", "ADD") and not any(word.startswith("--from") for word in words):
            found.update(dict.fromkeys(word for word in words[1:-1] if not word.startswith("--")))
    return list(found)


def snapshot(source: ImageSource, target: Path, root: Path | None = None) -> BuildContext:
    """Copy an image's files into `target`, readable by all, and return them with their key.

    Raises:
        LabError: The Dockerfile names a file that is not there.
    """
    root = root or repository_root()
    dockerfile = (root / source.dockerfile).read_text(encoding="utf-8")
    target.mkdir(parents=True)
    (target / source.dockerfile).write_text(dockerfile, encoding="utf-8")
    for name in copied_paths(dockerfile):
        origin, copy = root / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, copy, ignore=_IGNORED, dirs_exist_ok=True)
        elif origin.is_file():
            shutil.copyfile(origin, copy)
        else:
            raise LabError(f"{source.dockerfile} copies {name}, which is not in {root}", "restore the file")
    digest = hashlib.sha256(f"base {BASE_RECIPE}\0".encode())
    for path in sorted(target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # The containers' user is not the one who checked out.
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(target)}\0{len(content)}\0".encode() + content)
    return BuildContext(source, target, digest.hexdigest()[:_KEY_LENGTH])
