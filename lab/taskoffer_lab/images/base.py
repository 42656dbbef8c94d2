"""The base image: a Debian made by debootstrap from the host's own mirror, for no image can be pulled here.

It gets the name that the Dockerfiles have as their default base, and what the official slim image drops is
dropped here too. Sources inside it carry no credentials; those of the host are lent to builds (`apt_credentials`).
"""

import re
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.images.store import BuildStore

SUITE = "bookworm"
BASE_IMAGE = f"docker.io/library/debian:{SUITE}-slim"
"""What the Dockerfiles build on."""

BASE_RECIPE = "1"
"""Part of every image's key: change it when what is made here changes."""

DEFAULT_MIRROR = "http://deb.debian.org/debian"
DEFAULT_SECURITY = "http://deb.debian.org/debian-security"

_CODENAMES = "buster|bullseye|bookworm|trixie|forky|sid|stable|testing|oldstable|unstable"
_MAIN_SUITE = re.compile(rf"(?:{_CODENAMES})")
_SECURITY_SUITE = re.compile(rf"(?:{_CODENAMES})(?:-security|/updates)")
_SLIM = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian")

# dpkg syncs every file that it unpacks, which takes minutes on a busy disk; in memory it costs nothing.
_BOOTSTRAP = """
set -e
mkdir "$4/ram"
mount -t tmpfs -o size=2g tmpfs "$4/ram"
debootstrap --variant=minbase --include=ca-certificates "$2" "$4/ram/system" "$3"
cp -a "$4/ram/system/." "$1"
"""


@dataclass(frozen=True)
class SourceEntry:
    """One binary source of apt: an address, a suite and its components."""

    uri: str
    suite: str
    components: tuple[str, ...]


@dataclass(frozen=True)
class Mirror:
    """Where Debian's packages come from. The addresses may carry a user and a password."""

    main: str = DEFAULT_MIRROR
    security: str | None = DEFAULT_SECURITY


def read_sources(apt: Path = Path("/etc/apt")) -> list[SourceEntry]:
    """Return the enabled binary sources of a host, both formats, in apt's order of files."""
    entries: list[SourceEntry] = []
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]
    for path in files:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".list":
            entries += _one_line_entries(text)
        elif path.suffix == ".sources":
            entries += _deb822_entries(text)
    return entries


def host_mirror(apt: Path = Path("/etc/apt")) -> Mirror:
    """Return the Debian mirror of the host, or Debian's own where the host has none (another distribution)."""
    main = security = None
    for entry in read_sources(apt):
        parts = urllib.parse.urlsplit(entry.uri)
        is_debian = "debian" in f"{parts.hostname}{parts.path}" and "main" in entry.components
        if not is_debian or parts.scheme not in ("http", "https"):
            continue
        if main is None and _MAIN_SUITE.fullmatch(entry.suite):
            main = entry.uri.rstrip("/")
        if security is None and _SECURITY_SUITE.fullmatch(entry.suite):
            security = entry.uri.rstrip("/")
    # A mirror of one's own may be the only one that can be reached, so nothing else is mixed in.
    return Mirror() if main is None else Mirror(main, security)


def without_credentials(uri: str) -> str:
    """Return an address without user and password."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def render_sources(mirror: Mirror) -> str:
    """Return the `sources.list` of the base image."""
    main = without_credentials(mirror.main)
    lines = [f"deb {main} {SUITE} main", f"deb {main} {SUITE}-updates main"]
    if mirror.security is not None:
        lines.append(f"deb {without_credentials(mirror.security)} {SUITE}-security main")
    return "\n".join(lines) + "\n"


def apt_credentials(mirror: Mirror, apt: Path = Path("/etc/apt")) -> str:
    """Return apt's `auth.conf` for the mirror: the host's own entries and those out of the addresses."""
    lines = []
    for path in [apt / "auth.conf", *sorted((apt / "auth.conf.d").glob("*.conf"))]:
        if path.is_file():
            lines += path.read_text(encoding="utf-8").splitlines()
    for uri in dict.fromkeys(filter(None, (mirror.main, mirror.security))):
        parts = urllib.parse.urlsplit(uri)
        if parts.username:
            user, password = urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or "")
            lines.append(f"machine {without_credentials(uri)} login {user} password {password}")
    return "".join(f"{line}\n" for line in lines)


def ensure_base(store: BuildStore) -> None:
    """Make the base image if the store has none of this recipe."""
    marker = f"localhost/taskoffer-base:{BASE_RECIPE}"
    if store.has_image(marker):
        return
    mirror = host_mirror()
    root, context = store.temporary / "base", store.temporary / "base-context"
    context.mkdir(parents=True)
    root.mkdir()
    store.isolated(
        ["sh", "-c", _BOOTSTRAP, "sh", root, SUITE, mirror.main, store.temporary],
        f"making the base image (debootstrap {SUITE})",
    )
    slim_down(root)
    (root / "etc/apt/sources.list").write_text(render_sources(mirror), encoding="utf-8")
    store.isolated(["tar", "-C", root, "-cf", context / "base.tar", "."], "packing the base image")
    shutil.rmtree(root)
    (context / "Dockerfile").write_text('FROM scratch\nADD base.tar /\nCMD ["bash"]\n', encoding="utf-8")
    arguments = ["build", "--isolation", "chroot", "--tag", BASE_IMAGE, "--tag", marker, str(context)]
    store.buildah(arguments, "storing the base image")


def slim_down(root: Path) -> None:
    """Remove documentation and logs, and keep later installations from bringing documentation (as in slim)."""
    for name in _SLIM:
        folder = root / name
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.name != "copyright":
                path.unlink()
    for name in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
        for path in (root / name).rglob("*"):
            if path.is_file():
                path.unlink()
    rules = [f"path-exclude /{name}/*\n" for name in _SLIM]
    rules.append("path-include /usr/share/doc/*/copyright\n")
    (root / "etc/dpkg/dpkg.cfg.d/docker").write_text("".join(rules), encoding="utf-8")
    # A build that loses power starts anew; as in the official images, packages are unpacked without a sync.
    (root / "etc/dpkg/dpkg.cfg.d/docker-apt-speedup").write_text("force-unsafe-io\n", encoding="utf-8")


def _one_line_entries(text: str) -> Iterator[SourceEntry]:
    for line in text.splitlines():
        plain = re.sub(r"\[[^\]]*\]", " ", line.partition("#")[0]).split()
        if len(plain) >= 3 and plain[0] == "deb":
            yield SourceEntry(plain[1], plain[2], tuple(plain[3:]))


def _deb822_entries(text: str) -> Iterator[SourceEntry]:
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n[ \t]*\n", kept):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')} {line.strip()}"
            else:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "0") or "deb" not in fields.get("types", "").split():
            continue
        components = tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield SourceEntry(uri, suite, components)
